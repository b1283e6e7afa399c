"""Draw the figure of docs/experiment-memorization.md and print its tables, from what `make experiment-memorization` left.

python docs/figures/memorization_experiment.py [suites/memorization]    (without it: from memorization_values.csv)
"""

import sys
from pathlib import Path

import pandas as pd
from drawing import HERE, cell, lines, save

from picolm.analyze import table
from picolm.analyze.intervals import interval

SIZES = {"small": "width 48", "middle": "width 96", "large": "width 192"}
SHOWN = {"early": 100, "middle": 400, "late": 700}  # the first step of each group of canaries
SPAN, AFTER = 50, 250  # steps that show a group; steps after which it is looked at again
EACH = 8  # canaries of a group


def condense(suite: Path) -> None:
    """Write beside this file, by run, step and group, how far canaries are below rows like them, and their exposure."""
    values = table.load(suite)
    values = values[values["metric"].isin(["memorization.canary_loss", "memorization.exposure"])].copy()
    values["run"] = values["run"].str.removeprefix("memorization-")
    values["shown"] = (values["bin"].astype(int) // EACH).map(dict(enumerate(SHOWN)))
    values["of"] = values["metric"].str.removeprefix("memorization.").replace("canary_loss", "memorized")
    loss = values["of"] == "memorized"
    values.loc[loss, "value"] = values.loc[loss, "chance"] - values.loc[loss, "value"]
    means = values.groupby(["run", "step", "shown", "of"], sort=False)["value"].mean().reset_index()
    means.round(5).to_csv(HERE / "memorization_values.csv", index=False)


def half_life(since: list[int], values: list[float]) -> float:
    """Return the steps after the last showing at which a curve first is half of what it was then, linear between saved steps."""
    level = values[0] / 2
    place = next((place for place, value in enumerate(values) if value <= level), None)
    if place is None:
        return float("nan")
    (low, high), (first, then) = (values[place - 1 : place + 1], since[place - 1 : place + 1])
    return first + (low - level) / (low - high) * (then - first)


def figures(values: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each run and group: what was memorized, how long it takes to lose half of it, and what is left."""
    rows = []
    for (run, shown), own in values.groupby(["run", "shown"]):
        end = SHOWN[shown] + SPAN
        of = {name: part.set_index("step")["value"].sort_index() for name, part in own.groupby("of")}
        later = of["memorized"].loc[end:]
        rows.append({
            "run": run, "size": run.rpartition("-")[0], "shown": shown,
            "nats a token below rows like it, after the last showing": later.loc[end],
            "exposure then, bits": of["exposure"].loc[end],
            "steps until half of these nats are left": half_life([step - end for step in later.index], later.tolist()),
            f"share of them left {AFTER} steps later": later.loc[end + AFTER] / later.loc[end],
            f"exposure {AFTER} steps later, bits": of["exposure"].loc[end + AFTER],
        })  # fmt: skip
    return pd.DataFrame(rows)


def print_tables(found: pd.DataFrame) -> None:
    """Markdown: the figures by size and by when the canaries were shown, and how the first and last of both differ."""
    print(
        "| | shown | "
        + " | ".join(SIZES.values())
        + " | largest - smallest |\n|---|---"
        + "|---" * (len(SIZES) + 1)
        + "|"
    )
    for figure in [name for name in found if name not in ("run", "size", "shown")]:
        digits = 0 if figure.startswith("steps") else 2
        by = found.assign(seed=found["run"].str.rpartition("-")[2]).pivot(
            index=["shown", "seed"], columns="size", values=figure
        )
        for shown in SHOWN:
            own = by.loc[shown]
            apart = (own["large"] - own["small"]).tolist()
            cells = [cell(interval(own[size].tolist()), digits) for size in SIZES] + [signed(apart, digits)]
            print(f"| {figure} | from step {SHOWN[shown]} | " + " | ".join(cells) + " |")
        apart = by.loc["late"] - by.loc["early"]
        ends = [signed(apart[size].tolist(), digits) for size in SIZES]
        print("| | late - early | " + " | ".join(ends) + " | |")


def signed(differences: list[float], digits: int) -> str:
    """Return the mean of differences within pairs of runs of one seed, or within runs, with its 95 % interval."""
    mean, low, high, _ = interval(differences)
    return f"{mean:+.{digits}f} ± {(high - low) / 2:.{digits}f}"


def draw(values: pd.DataFrame) -> None:
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, len(SHOWN), figsize=(10, 5.4), layout="constrained", sharex=True, sharey="row")
    for column, (shown, first) in enumerate(SHOWN.items()):
        for axes, of in zip(panels[:, column], ("memorized", "exposure")):
            own = values[(values["shown"] == shown) & (values["of"] == of)]
            lines(axes, own, list(SIZES), "value", list(SIZES.values()))
            axes.axvspan(first, first + SPAN, color="0.85", linewidth=0)
            if of == "memorized":
                axes.axhline(0, color="0.6", linewidth=0.8)
                axes.set_title(f"shown from step {first} to {first + SPAN - 5}")
        panels[-1, column].set_xlabel("step (updates)")
    panels[0, 0].set_ylabel("nats a token\nbelow rows like it")
    panels[1, 0].set_ylabel("exposure (bits, at most 7)")
    panels[0, -1].legend(frameon=False, fontsize=8, loc="upper left")
    save(figure, "memorization_curves")


def main() -> None:
    suite = Path(sys.argv[1] if len(sys.argv) > 1 else "suites/memorization")
    if suite.exists():
        condense(suite / "memorization" if (suite / "memorization").exists() else suite)
    values = pd.read_csv(HERE / "memorization_values.csv")
    values["group"] = values["run"].str.rpartition("-")[0]
    draw(values)
    print_tables(figures(values))


if __name__ == "__main__":
    main()
