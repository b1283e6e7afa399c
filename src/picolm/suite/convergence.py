"""When a layer has become what it ends as, when a matrix has lost rank, and how both differ between groups of runs.

Pure functions of the long table of an analysis. Steps are those that were saved, so a figure is exact to the distance between
them. Intervals are Student's t over runs (seeds): with three of them they are wide, as three runs deserve.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from picolm.analyze.intervals import interval

if TYPE_CHECKING:
    import pandas as pd

ONE_MATRIX = ["run", "metric", "options", "component", "kind", "split", "module", "layer"]


def settled_step(steps: Sequence[float], values: Sequence[float], level: float) -> float:
    """The first step from which on the value never falls below `level`; NaN where it ends below, or a value is missing."""
    below = [place for place, value in enumerate(values) if not value >= level]
    first = below[-1] + 1 if below else 0
    return float(steps[first]) if first < len(steps) else math.nan


def fallen_step(steps: Sequence[float], values: Sequence[float], share: float) -> float:
    """The first step at which the value is at most `share` of what it was at first; NaN where it never is."""
    return next((float(step) for step, value in zip(steps, values) if value <= share * values[0]), math.nan)


def mean_over_training(steps: Sequence[float], values: Sequence[float]) -> float:
    """The mean of a curve over the steps of training (trapezoids): no threshold, late steps count as much as early ones."""
    if len(steps) < 2:
        return math.nan
    return float(np.trapezoid(values, steps) / (steps[-1] - steps[0]))


def curves(table: "pd.DataFrame") -> "pd.DataFrame":
    """One row per matrix of a run: `steps` and `values`, heads averaged. Comparisons with other layers and runs stay out."""
    same_run = table["against_run"].isna() | (table["against_run"] == "") | (table["against_run"] == table["run"])
    rows = table[same_run & (table["against_layer"].isna() | (table["against_layer"] == table["layer"])).fillna(True)]
    last = rows.groupby("run")["step"].transform("max")
    rows = rows[rows["against_step"].isna() | (rows["against_step"] == last)]
    finite = rows[np.isfinite(rows["value"].to_numpy(dtype=float))]
    means = (
        finite.groupby([*ONE_MATRIX, "step"], dropna=False, sort=False)["value"]
        .mean()
        .reset_index()
        .sort_values("step")
    )
    grouped = means.groupby(ONE_MATRIX, dropna=False, sort=False)
    return grouped.agg(steps=("step", tuple), values=("value", tuple)).reset_index()


def figures(table: "pd.DataFrame", settled: float = 0.9, fallen: float = 0.95) -> "pd.DataFrame":
    """One row per matrix of a run and figure: value. Similarities with the last step: the share of training after which they
    stay above `settled`, and their mean over training. Proportional effective rank: its value at first and in the end, and the
    share of training after which it is at most `fallen` of its first.
    """
    import pandas as pd

    records = []
    for row in curves(table).to_dict("records"):
        steps, values = row["steps"], row["values"]
        found = _rank(steps, values, fallen) if row["metric"] == "per" else _similarity(steps, values, settled)
        named = {name: row[name] for name in ONE_MATRIX}
        records += [named | {"figure": figure, "value": value} for figure, value in found.items()]
    return pd.DataFrame(records, columns=[*ONE_MATRIX, "figure", "value"]).astype(
        {"layer": "Int64", "value": "float64"}
    )


def _similarity(steps: Sequence[float], values: Sequence[float], level: float) -> dict[str, float]:
    span = steps[-1] or 1
    return {
        f"settled at {level:g} (share of training)": settled_step(steps, values, level) / span,
        "mean over training": mean_over_training(steps, values),
    }


def _rank(steps: Sequence[float], values: Sequence[float], share: float) -> dict[str, float]:
    span = steps[-1] or 1
    return {
        "first": values[0],
        "last": values[-1],
        f"fallen to {share:.0%} (share of training)": fallen_step(steps, values, share) / span,
        "mean over training": mean_over_training(steps, values),
    }


def by_group(table: "pd.DataFrame", groups: Mapping[str, str], layers: bool = False) -> "pd.DataFrame":
    """Mean and interval over the runs of each group of what `figures` gives: first the mean over the layers of a run, or, with
    `layers`, each layer. n: runs that have the figure in every layer, `of` how many there are.
    """
    import pandas as pd

    apart = ("run", "module") if layers else ("run", "module", "layer")
    keys = ["group", *(name for name in ONE_MATRIX if name not in apart), "figure"]
    records = []
    for key, rows in table.assign(group=table["run"].map(groups)).groupby(keys, dropna=False, sort=False):
        each = rows.groupby("run", sort=False)["value"].agg(lambda values: values.mean(skipna=False))
        mean, low, high, n = interval(each.tolist())
        records.append(dict(zip(keys, key)) | {"mean": mean, "low": low, "high": high, "n": n, "of": len(each)})
    return pd.DataFrame(records)
