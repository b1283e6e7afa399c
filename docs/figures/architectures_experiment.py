"""Draw the figures of docs/experiment-architectures.md and print its tables, from the suite of `make experiment-architectures`.

python docs/figures/architectures_experiment.py [suites/architectures [runs]]    (without the suite: architectures_values.csv)
"""

import sys
from pathlib import Path
from typing import Any

import pandas as pd
from drawing import HERE, cell, lines, save

from picolm.analyze import table
from picolm.analyze.intervals import interval
from picolm.store import Run
from picolm.suite.convergence import figures

MODELS = {"decoder": "decoder", "statespace": "state space", "diffusion": "diffusion (bound)"}
NAMES = ("decoder", "state space", "diffusion")
SIZES, ROWS = ("300k", "1m"), ("once", "often")
EPOCH, LOGGED = 96, 6  # steps that read all rows where they are few, and what is logged in them
LOSSES = {
    "val/paloma/nats_per_token": "held out",
    "val/paloma_bound/bound_nats_per_token": "held out",
    "train/bound_nats_per_token": "training",
    "train/loss": "training",
}
PROBED = {
    "overfitting.generalization_gap": "gap",
    "induction.copy_advantage": "copy advantage",
    "induction.prefix_matching": "prefix matching",
}
INSIDE = {
    ("cka", "activations"): "CKA with the last step",
    ("per", "weights"): "effective rank of weights",
    ("per", "gradients"): "effective rank of gradients",
}
FIGURES = {  # of the table: (metric, kind, figure): its title
    ("cka", "activations", "settled at 0.9 (share of training)"): "CKA settled at 0.9, share of training",
    ("cka", "activations", "mean over training"): "CKA, mean over training",
    ("per", "weights", "last"): "effective rank of weights, at the end",
    ("per", "gradients", "last"): "effective rank of gradients, at the end",
}


def condense(suite: Path, runs: Path) -> None:
    """Write what the figures are drawn from beside this file: one value per run, step and thing that is measured."""
    values = table.load(suite / "architectures")
    found = [(run, *rest) for run in values["run"].unique() for rest in losses(runs / run)]
    for metric, name in PROBED.items():
        own = values[values["metric"] == metric].dropna(subset="value")
        best = own.groupby(["run", "step"])["value"].max()  # of heads the one that does it most
        found += [(run, step, name, value) for (run, step), value in best.items()]
    for (metric, kind), name in INSIDE.items():
        own = values[(values["metric"] == metric) & (values["kind"] == kind)]
        each = own.groupby(["run", "step", "component", "layer", "module"], dropna=False)["value"].mean()
        found += [(run, step, name, value) for (run, step), value in each.groupby(["run", "step"]).mean().items()]
    summary = figures(values[values["metric"].isin(["cka", "per"])])
    for (metric, kind, figure), name in FIGURES.items():
        own = summary[(summary["metric"] == metric) & (summary["kind"] == kind) & (summary["figure"] == figure)]
        means = own.groupby("run")["value"].agg(lambda each: each.mean(skipna=False))
        found += [(run, -1, name, value) for run, value in means.items()]
    made = pd.DataFrame(found, columns=["run", "step", "of", "value"])
    made["run"] = made["run"].str.removeprefix("architectures-")
    made.round({"value": 5}).to_csv(HERE / "architectures_values.csv", index=False)


def losses(run: Path) -> Any:
    """Yield (step, held out or training, nats per token) of a run; a bound for diffusion."""
    for entry in Run.open(run).metrics():
        named = {LOSSES[key]: entry[key] for key in LOSSES if key in entry}  # of a bound, both keys have the same value
        yield from ((entry["step"], name, value) for name, value in named.items())


def draw_losses(values: pd.DataFrame) -> None:
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 3, figsize=(10, 5.4), layout="constrained", sharex=True, sharey="col")
    for row, size in zip(panels, SIZES):
        for axes, (model, title) in zip(row, MODELS.items()):
            for of, style in (("held out", "-"), ("training", "--")):
                own = values[(values["of"] == of) & (values["step"] >= 96)]
                if of == "training":
                    own = own.assign(
                        value=own.groupby("run")["value"].transform(lambda each: each.rolling(LOGGED).mean())
                    )
                groups = [f"{model}-{size}-{rows}" for rows in ROWS]
                labels = [f"{of}, rows read {'once' if rows == 'once' else '16 times'}" for rows in ROWS]
                lines(axes, own, groups, "value", labels, linestyle=style)
            axes.set_title(f"{title}, {size}")
            axes.set_xticks([0, 512, 1024, 1536])
        row[0].set_ylabel("nats per token")
    for axes in panels[-1]:
        axes.set_xlabel("step (updates)")
    panels[0, -1].legend(frameon=False, fontsize=8)
    save(figure, "architectures_loss")


def draw_inside(values: pd.DataFrame) -> None:
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 3, figsize=(10, 5.2), layout="constrained", sharex=True, sharey="col")
    for row, rows in zip(panels, ROWS):
        for axes, name in zip(row, INSIDE.values()):
            own = values[values["of"] == name]
            lines(axes, own, [f"{model}-1m-{rows}" for model in MODELS], "value", list(NAMES))
            axes.set_title(f"{name}, {'once' if rows == 'once' else '16 times'}")
            axes.set_xscale("symlog", linthresh=1, linscale=0.5)
            axes.set_xticks([0, 1, 4, 16, 64, 256, 1024], ["0", "1", "4", "16", "64", "256", "1024"])
            axes.minorticks_off()
    for axes in panels[-1]:
        axes.set_xlabel("step (updates)")
    panels[0, 0].legend(frameon=False, fontsize=8)
    save(figure, "architectures_inside")


def ends(values: pd.DataFrame) -> pd.DataFrame:
    """Return one row per run and figure of the table, with its value."""
    found = []
    for (group, seed), own in values.groupby(["group", "seed"]):
        held = own[own["of"] == "held out"].set_index("step")["value"]
        last = own["step"].max()
        training = own[(own["of"] == "training") & (own["step"] > last - EPOCH)]["value"].mean()
        found += [
            (group, seed, "held-out loss at the end", held[last]),
            (group, seed, "lowest held-out loss", held.min()),
            (group, seed, "step of the lowest", held.idxmin()),
            (group, seed, f"held out minus training, last {EPOCH} steps", held[last] - training),
        ]
        for name in PROBED.values():
            there = own[(own["of"] == name) & (own["step"] == last)]["value"]
            found += [(group, seed, f"{name} at the end", value) for value in there]
        found += [(group, seed, row["of"], row["value"]) for row in own[own["step"] == -1].to_dict("records")]
    return pd.DataFrame(found, columns=["group", "seed", "figure", "value"])


def print_tables(found: pd.DataFrame) -> None:
    """Markdown: means with intervals over seeds, and what reading rows 16 times changes, within seeds."""
    by = found.set_index(["figure", "group", "seed"])["value"].sort_index()
    for name in dict.fromkeys(found["figure"]):
        print(f"\n| {name} | " + " | ".join(f"{MODELS[model]}, {size}" for model in MODELS for size in SIZES) + " |")
        print("|---" * (len(MODELS) * len(SIZES) + 1) + "|")
        digits = 0 if name.startswith("step") else 3
        columns = {
            rows: [by.get((name, f"{model}-{size}-{rows}")) for model in MODELS for size in SIZES] for rows in ROWS
        }
        for rows, title in zip(ROWS, ("read once", "read 16 times")):
            print(f"| {title} | " + " | ".join(shown(each, digits) for each in columns[rows]) + " |")
        apart = [None if one is None or two is None else two - one for one, two in zip(*columns.values())]
        print("| difference | " + " | ".join(shown(each, digits, sign="+") for each in apart) + " |")


def shown(each: Any, digits: int, sign: str = "") -> str:
    if each is None:
        return ""
    text = cell(interval(each.tolist()), digits)
    return sign + text if sign and not text.startswith(("-", "n")) else text


def main() -> None:
    suite = Path(sys.argv[1] if len(sys.argv) > 1 else "suites/architectures")
    runs = Path(sys.argv[2] if len(sys.argv) > 2 else "runs")
    if suite.exists():
        condense(suite, runs)
    values = pd.read_csv(HERE / "architectures_values.csv")
    parts = values["run"].str.rpartition("-")
    values["group"], values["seed"] = parts[0], parts[2].astype(int)
    draw_losses(values)
    draw_inside(values)
    print_tables(ends(values))


if __name__ == "__main__":
    main()
