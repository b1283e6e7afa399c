"""Draw the figures of docs/experiment-nano.md and print its tables, from the suite that `make suite` left.

python docs/figures/nano.py [suites/pico-nano]    (needs matplotlib; without the suite it draws from nano_*.csv beside this file)
"""

import sys
from pathlib import Path
from typing import Any

import pandas as pd
from drawing import HERE, apart, cell, lines, save

from picolm.analyze import table
from picolm.analyze.intervals import interval
from picolm.store import Run
from picolm.suite.convergence import by_group, by_run, figures

MATTERS = {
    ("attention", "activations"): "output of attention",
    ("mlp", "activations"): "output of the MLP",
    ("ov_circuit", "activations"): "values through OV",
    ("ov_circuit", "weights"): "weights of OV",
    ("mlp", "weights"): "weights of the MLP's output",
    ("ov_circuit", "gradients"): "gradients of OV",
    ("mlp", "gradients"): "gradients of the MLP's output",
}
SHARE = "(share of training)"
SHOWN = {  # of each kind of matrix and metric, the rows of the table
    ("cka", "activations"): ["mean over training", *(f"settled at {level} {SHARE}" for level in (0.8, 0.9, 0.95))],
    ("pwcca", "activations"): [f"settled at 0.9 {SHARE}"],
    ("per", "weights"): ["first", "last", "last / first", f"fallen to 95% {SHARE}"],
    ("per", "gradients"): ["first", "last", "last / first", "mean over training"],
}


def condense(suite: Path) -> None:
    """Write what the figures are drawn from beside this file: values with heads averaged, and the losses of all runs."""
    members = pd.read_csv(suite / "members.csv")
    values = table.load(suite / "convergence")
    shared = set.intersection(*(set(own["step"]) for _, own in values.groupby("run")))
    values = values[values["step"].isin(shared)]  # a run that was interrupted has a step more than the others
    keys = ["run", "step", "split", "component", "kind", "layer", "metric"]
    means = values.groupby(keys, sort=False, dropna=False)["value"].mean().reset_index()
    means["run"] = means["run"].str.removeprefix("pico-nano-")
    means.round({"value": 5}).to_csv(HERE / "nano_values.csv", index=False)
    runs = Path(sys.argv[2]) if len(sys.argv) > 2 else Path("runs")
    names = {"train/loss": "train", "val/paloma/nats_per_token": "held out"}
    losses = [
        (name.removeprefix("pico-nano-"), entry["step"], names[key], round(entry[key], 5))
        for name in members["run"]
        for entry in Run.open(runs / name).metrics()
        for key in names
        if key in entry
    ]
    pd.DataFrame(losses, columns=["run", "step", "of", "nats_per_token"]).to_csv(HERE / "nano_losses.csv", index=False)
    members["run"] = members["run"].str.removeprefix("pico-nano-")
    members.round(5).to_csv(HERE / "nano_runs.csv", index=False)


def draw(axes: Any, frame: pd.DataFrame, groups: list[str], value: str, linear: bool = False) -> None:
    """A line with its band per size, and a thin one per run. linear: steps as they are, not their logarithms."""
    lines(axes, frame, groups, value, [group.upper() for group in groups])
    axes.set_xlim(0, frame["step"].max())
    if linear:
        axes.set(xticks=[0, 256, 512, 768, 1024], ylim=(-0.02, 1.02))
        return
    axes.set_xscale("symlog", linthresh=1, linscale=0.5)
    axes.set_xticks([0, 1, 4, 16, 64, 256, 1024], ["0", "1", "4", "16", "64", "256", "1024"])
    axes.minorticks_off()


def by_metric(values: pd.DataFrame, groups: list[str], metric: str, kinds: tuple[str, ...], label: str) -> None:
    """A panel per matrix of a metric."""
    from matplotlib import pyplot

    chosen = [(key, title) for key, title in MATTERS.items() if key[1] in kinds]
    columns = 3 if len(chosen) == 3 else 2
    rows = len(chosen) // columns
    figure, panels = pyplot.subplots(
        rows, columns, figsize=(3.8 * columns, 0.6 + 2.6 * rows), layout="constrained", sharex=True, squeeze=False
    )
    for axes, ((component, kind), title) in zip(panels.flat, chosen):
        own = values[(values["metric"] == metric) & (values["component"] == component) & (values["kind"] == kind)]
        draw(axes, own, groups, "value", linear=kinds == ("activations",))
        axes.set_title(title)
        axes.set_ylim(-0.02, 1.02)
    for axes in panels[-1]:
        axes.set_xlabel("step (updates)")
    for axes in panels[:, 0]:
        axes.set_ylabel(label)
    panels.flat[0].legend(frameon=False)
    save(figure, f"nano_{metric}")


def by_layer(values: pd.DataFrame, groups: list[str]) -> None:
    """CKA of each layer on its own."""
    from matplotlib import pyplot

    layers = sorted(values["layer"].dropna().unique())
    figure, panels = pyplot.subplots(
        3, len(layers), figsize=(11, 6.6), layout="constrained", sharex=True, sharey=True, squeeze=False
    )
    for row, (component, name) in zip(panels, (("attention", "attention"), ("mlp", "MLP"), ("ov_circuit", "OV"))):
        for axes, layer in zip(row, layers):
            chosen = (values["metric"] == "cka") & (values["component"] == component) & (values["layer"] == layer)
            draw(axes, values[chosen], groups, "value", linear=True)
            axes.set_title(f"{name}, layer {layer:.0f}")
            axes.set_xticks([0, 512, 1024])
        row[0].set_ylabel("CKA with the last step")
    panels[0, 0].legend(frameon=False, fontsize=8)
    figure.supxlabel("step (updates)", fontsize=10)
    save(figure, "nano_layers")


def losses(frame: pd.DataFrame, groups: list[str]) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 3.2), layout="constrained")
    draw(axes, frame[frame["of"] == "held out"], groups, "nats_per_token")
    axes.set(xlabel="step (updates)", ylabel="held-out loss (nats per token)")
    axes.legend(frameon=False)
    save(figure, "nano_loss")


def print_tables(values: pd.DataFrame, members: pd.DataFrame, groups: list[str]) -> None:
    """Markdown: means with intervals by size, and the difference of the smallest and the largest with its own."""
    ends = [members.loc[members["group"] == g, "val/paloma/nats_per_token"] for g in groups]
    lost = [interval(end.tolist()) for end in ends]
    print("| | " + " | ".join(g.upper() for g in groups) + " | smallest - largest (Welch) |")
    print("|---" * (len(groups) + 2) + "|")
    print("| held-out loss, nats per token | " + " | ".join(map(cell, lost)) + " | " + apart(ends[0], ends[-1]) + " |")
    full = values.assign(module="", options="", against_run=None, against_step=None, against_layer=None)
    found = pd.concat([figures(full, settled=level) for level in (0.8, 0.9, 0.95)]).drop_duplicates(
        ["run", "metric", "component", "kind", "layer", "figure"]
    )
    found = pd.concat([found, ratios(found)])
    belongs = dict(zip(members["run"], members["group"]))
    grouped, each = by_group(found, belongs), by_run(found, belongs)
    for (metric, kind), wanted in SHOWN.items():
        for component, title in [(name, title) for (name, of), title in MATTERS.items() if of == kind]:
            for figure in wanted:
                of = {"metric": metric, "kind": kind, "component": component, "figure": figure}
                by = grouped[(grouped[list(of)] == pd.Series(of)).all(axis=1)].set_index("group")
                cells = [tuple(by.loc[g, ["mean", "low", "high", "n"]]) for g in groups]
                runs = each[(each[list(of)] == pd.Series(of)).all(axis=1)].set_index("group")["value"]
                name = f"{metric.upper()}, {title}: {figure}"
                print(
                    f"| {name} | "
                    + " | ".join(map(cell, cells))
                    + f" | {apart(runs.loc[groups[0]], runs.loc[groups[-1]])} |"
                )


def print_layers(values: pd.DataFrame, members: pd.DataFrame, groups: list[str]) -> None:
    """Markdown: when the CKA of each layer has settled at 0.9, by size."""
    full = values.assign(module="", options="", against_run=None, against_step=None, against_layer=None)
    found = figures(full[full["metric"] == "cka"])
    settled = found[found["figure"].str.startswith("settled")]
    grouped = by_group(settled, dict(zip(members["run"], members["group"])), layers=True)
    print("\n| settled at 0.9 (share of training) | " + " | ".join(g.upper() for g in groups) + " |")
    print("|---" * (len(groups) + 1) + "|")
    order = [name for name, of in MATTERS if of == "activations"]
    for (component, layer), rows in sorted(
        grouped.groupby(["component", "layer"]), key=lambda part: order.index(part[0][0])
    ):
        by = rows.set_index("group")
        cells = [cell(tuple(by.loc[g, ["mean", "low", "high", "n"]])) for g in groups if g in by.index]
        print(f"| {MATTERS[component, 'activations']}, layer {layer} | " + " | ".join(cells) + " |")


def ratios(found: pd.DataFrame) -> pd.DataFrame:
    """Last over first effective rank: what is left of it, whatever the shape of the matrix."""
    keys = [name for name in found.columns if name not in ("figure", "value")]
    rank = found[found["metric"] == "per"]
    wide = (
        rank[rank["figure"].isin(["first", "last"])]
        .pivot_table(index=keys, columns="figure", values="value")
        .reset_index()
    )
    return wide.assign(figure="last / first", value=wide["last"] / wide["first"])[[*keys, "figure", "value"]]


def main() -> None:
    if len(sys.argv) > 1 or Path("suites/pico-nano").exists():
        condense(Path(sys.argv[1] if len(sys.argv) > 1 else "suites/pico-nano"))
    values, lost, members = (pd.read_csv(HERE / f"nano_{name}.csv") for name in ("values", "losses", "runs"))
    values["split"] = values["split"].fillna("")  # weights have none
    groups = list(dict.fromkeys(members["group"]))
    belongs = dict(zip(members["run"], members["group"]))
    values["group"], lost["group"] = values["run"].map(belongs), lost["run"].map(belongs)
    losses(lost, groups)
    by_metric(values, groups, "cka", ("activations",), "CKA with the last step")
    by_metric(values, groups, "pwcca", ("activations",), "PWCCA with the last step")
    by_metric(values, groups, "per", ("weights", "gradients"), "proportional effective rank")
    by_layer(values, groups)
    print_tables(values.drop(columns="group"), members, groups)
    print_layers(values.drop(columns="group"), members, groups)


if __name__ == "__main__":
    main()
