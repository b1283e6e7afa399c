"""Draw the figures of docs/experiment-induction.md and print its tables, from the suite that `make experiment-induction` left.

python docs/figures/induction_experiment.py [suites/induction]    (without the suite: from induction_values.csv beside this file)
"""

import math
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from drawing import HERE, cell, lines, save

from picolm.analyze import table
from picolm.analyze.intervals import interval

EARLY, LATE = range(5, 15), range(150, 250)  # positions of the in-context score, whose single positions are noisy
GROUPS = {
    "attention-small": "attention only, width 48",
    "attention-wide": "attention only, width 96",
    "full-small": "with MLPs, width 48",
    "full-wide": "with MLPs, width 96",
}
CURVES = {  # name: label of the axis
    "previous_token": "previous token: share of attention",
    "prefix_matching": "prefix matching: share of attention",
    "copying": "first copy minus second: nats",
    "in_context": "early minus late positions: nats",
}
FORMED = 0.1  # prefix matching of the best head at the end; uniform attention has 0.022
DOUBLINGS = ((128, 256), (256, 512), (500, 1000))  # steps between which the loss is compared
PLATEAU = 350  # a step after the first rise of the in-context score, and before induction heads


def condense(suite: Path) -> None:
    """Write the curves of each run beside this file: of heads the best one at the end, and of rows means over positions."""
    values = table.load(suite)
    values["run"] = values["run"].str.removeprefix("induction-")
    found = []
    for run, own in values.groupby("run"):
        for name in ("previous_token", "prefix_matching"):
            by_head = pivot(own, f"induction.{name}", ["layer", "head"])
            best = by_head.iloc[-1].idxmax()
            found.append(curve(run, name, by_head[best], f"layer {best[0]:.0f}, head {best[1]:.0f}"))
        found.append(curve(run, "copying", -pivot(own, "induction.copy_advantage", ["bin"]).iloc[:, 0]))
        losses = pivot(own, "in_context.position_loss", ["bin"]).rename(columns=int)
        found.append(curve(run, "in_context", losses[list(EARLY)].mean(axis=1) - losses[list(LATE)].mean(axis=1)))
        found.append(curve(run, "loss", losses.mean(axis=1)))
    pd.concat(found).round(5).to_csv(HERE / "induction_values.csv", index=False)


def pivot(values: pd.DataFrame, metric: str, by: list[str]) -> pd.DataFrame:
    return values[values["metric"] == metric].pivot_table(index="step", columns=by, values="value", dropna=False)


def curve(run: str, name: str, values: "pd.Series[float]", head: str = "") -> pd.DataFrame:
    return pd.DataFrame({"run": run, "of": name, "step": values.index, "value": values.to_numpy(), "head": head})


def half_way(steps: list[int], values: list[float]) -> float:
    """Return the step at which a curve first passes the middle between its values at step 1 and at the end, with ln(step) linear
    between saved steps.
    """
    level = (values[1] + values[-1]) / 2
    place = next(place for place in range(2, len(steps)) if values[place] >= level)
    low, high = values[place - 1], values[place]
    share = (level - low) / (high - low)
    return math.exp(math.log(steps[place - 1]) * (1 - share) + math.log(steps[place]) * share)


def moments(values: pd.DataFrame) -> pd.DataFrame:
    """Return for each run when its curves pass the middle."""
    rows = []
    for run, own in values.groupby("run"):
        curves = {name: part.sort_values("step") for name, part in own.groupby("of")}
        ends = {name: part["value"].iloc[-1] for name, part in curves.items()}
        formed = ends["prefix_matching"] > FORMED
        when = {
            name: half_way(part["step"].tolist(), part["value"].tolist())
            for name, part in curves.items()
            if name != "loss" and (formed or name == "previous_token")
        }
        by_step = curves["in_context"].set_index("step")["value"]
        loss = curves["loss"].set_index("step")["value"]
        after = {"gained later": by_step.iloc[-4:].mean() - by_step.loc[PLATEAU]}
        after |= {f"fallen from {first}": loss.loc[first] - loss.loc[end] for first, end in DOUBLINGS}
        rows.append(
            {"run": run, "group": run.rpartition("-")[0], **ends, **after} | {f"at {k}": v for k, v in when.items()}
        )
    return pd.DataFrame(rows)


def draw(values: pd.DataFrame) -> None:
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(9, 6), layout="constrained", sharex=True)
    for axes, (name, label) in zip(panels.flat, CURVES.items()):
        own = values[(values["of"] == name) & (values["step"] >= 16)]
        lines(axes, own, list(GROUPS), "value", list(GROUPS.values()))
        low, high = own["value"].min(), own["value"].max()
        axes.set(xscale="log", title=label, ylim=(low - 0.1 * (high - low), high + 0.1 * (high - low)))
        axes.set_xticks([16, 64, 256, 1024], ["16", "64", "256", "1024"])
        axes.minorticks_off()
    for axes in panels[-1]:
        axes.set_xlabel("step (updates)")
    panels[0, 1].legend(frameon=False, fontsize=8)
    save(figure, "induction_curves")
    figure, axes = pyplot.subplots(figsize=(7.2, 3.4), layout="constrained")
    lines(axes, values[(values["of"] == "loss") & (values["step"] >= 16)], list(GROUPS), "value", list(GROUPS.values()))
    axes.set(xscale="log", xlabel="step (updates)", ylabel="held-out loss (nats per token)")
    axes.set_xticks([16, 64, 256, 1024], ["16", "64", "256", "1024"])
    axes.minorticks_off()
    axes.legend(frameon=False)
    save(figure, "induction_loss")


def print_tables(found: pd.DataFrame) -> None:
    """Markdown: the ends of the curves, and the moments with the ratios between them."""
    print("| | " + " | ".join(GROUPS.values()) + " |\n|---" + "|---" * len(GROUPS) + "|")

    def row(label: str, column: "pd.Series[float]", digits: int = 3) -> None:
        cells = [column[found["group"] == group].tolist() for group in GROUPS]
        shown = [cell(interval(each), digits) if any(map(math.isfinite, each)) else "not formed" for each in cells]
        print(f"| {label} | " + " | ".join(shown) + " |")

    for name in ("loss", *CURVES):
        row(f"{CURVES.get(name, 'held-out loss, nats per token')}, at the end", found[name])
    row(f"of the last, gained after step {PLATEAU}", found["gained later"])
    for first, end in DOUBLINGS:
        row(f"held-out loss fallen from step {first} to {end}, nats per token", found[f"fallen from {first}"])
    for name in CURVES:
        row(f"{name}: step half-way", found[f"at {name}"], 0)
    for one, other in (("previous_token", "prefix_matching"), ("prefix_matching", "copying"),
                       ("prefix_matching", "in_context"), ("previous_token", "in_context")):  # fmt: skip
        row(f"log2 of steps from {one} to {other}", (found[f"at {other}"] / found[f"at {one}"]).map(math.log2), 2)


def main() -> None:
    suite = Path(sys.argv[1] if len(sys.argv) > 1 else "suites/induction")
    if suite.exists():
        condense(suite / "induction" if (suite / "induction").exists() else suite)
    values: Any = pd.read_csv(HERE / "induction_values.csv", keep_default_na=False, na_values=[""], dtype={"head": str})
    values["group"] = values["run"].str.rpartition("-")[0]
    draw(values)
    print_tables(moments(values))


if __name__ == "__main__":
    main()
