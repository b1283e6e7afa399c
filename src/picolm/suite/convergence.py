"""When a layer has become what it ends as, when a matrix has lost rank, and how both differ between groups of runs.

Pure functions of the long table of an analysis. Steps are those that were saved, so a figure is exact to the distance between
them. What can be said of a curve depends on the kind of its metric: a similarity with the last step rises until it is settled, a
distance from it falls, and of a quantity neither is said. A value that is missing stays missing: no curve ends early, and no
mean is over what happens to be there. Intervals are Student's t over runs (seeds): with three of them they are wide, as three
runs deserve.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from picolm.analyze.intervals import interval
from picolm.analyze.table import completed

if TYPE_CHECKING:
    import pandas as pd

ONE_MATRIX = ["run", "metric", "metric_kind", "options", "component", "kind", "split", "module", "layer", "target"]


def settled_step(steps: Sequence[float], values: Sequence[float], level: float) -> float:
    """The first step from which on the value never falls below `level`, or is missing; NaN where it ends below or missing."""
    below = [place for place, value in enumerate(values) if not value >= level]
    first = below[-1] + 1 if below else 0
    return float(steps[first]) if first < len(steps) else math.nan


def fallen_step(steps: Sequence[float], values: Sequence[float], share: float) -> float:
    """The first step at which the value is at most `share` of what it was at first.

    NaN where it never is, where a value before it is missing, and where the first value is not positive.
    """
    for step, value in zip(steps, values):
        if math.isnan(value) or not values[0] > 0:
            return math.nan
        if value <= share * values[0]:
            return float(step)
    return math.nan


def mean_over_training(steps: Sequence[float], values: Sequence[float]) -> float:
    """The mean of a curve over the steps of training (trapezoids): no threshold, late steps count as much as early ones."""
    if len(steps) < 2:
        return math.nan
    return float(np.trapezoid(values, steps) / (steps[-1] - steps[0]))


def curves(table: "pd.DataFrame") -> "pd.DataFrame":
    """One row per matrix of a run: `steps` and `values`, heads averaged, and `end`, the last step of its run.

    Comparisons with other layers, runs and steps stay out. A step at which a head has no value has none.
    """
    table = completed(table)
    same_run = table["against_run"].isna() | (table["against_run"] == "") | (table["against_run"] == table["run"])
    rows = table[same_run & (table["against_layer"].isna() | (table["against_layer"] == table["layer"])).fillna(True)]
    last = rows.groupby("run")["step"].transform("max")
    moving = rows["target"].astype("string").str.contains("previous").fillna(False)
    kept = ~moving.astype(bool) & (rows["against_step"].isna() | (rows["against_step"] == last)).fillna(True).astype(
        bool
    )
    rows = rows.assign(end=last, value=rows["value"].astype(float))[kept]
    means = rows.groupby([*ONE_MATRIX, "end", "step"], dropna=False, sort=False)["value"].agg(_mean).reset_index()
    grouped = means.sort_values("step").groupby([*ONE_MATRIX, "end"], dropna=False, sort=False)
    return grouped.agg(steps=("step", tuple), values=("value", tuple)).reset_index()


def _mean(values: "pd.Series") -> float:
    return float(values.mean(skipna=False))


def figures(table: "pd.DataFrame", settled: float = 0.9, fallen: float = 0.95) -> "pd.DataFrame":
    """One row per matrix of a run and figure: value.

    Similarities with the last step: the share of training after which they stay at or above `settled`. Distances from it: that
    after which they stay at or below 1 - `settled` of their first value. Quantities: the first value, the last, and the share of
    training after which they are at most `fallen` of the first. All: the mean over training. NaN where the value at the last step
    of the run is missing, since training did not end where the curve does.
    """
    import pandas as pd

    records = []
    for row in curves(table).to_dict("records"):
        steps, values, end = row["steps"], row["values"], float(row["end"]) or 1.0
        if steps[-1] < row["end"]:
            steps, values = (*steps, row["end"]), (*values, math.nan)
        kind = row["metric_kind"]
        found = (
            _quantity(steps, values, fallen, end)
            if kind not in SETTLING
            else SETTLING[kind](steps, values, settled, end)
        )
        named = {name: row[name] for name in ONE_MATRIX}
        found |= {"mean over training": mean_over_training(steps, values)}
        records += [named | {"figure": figure, "value": value} for figure, value in found.items()]
    return pd.DataFrame(records, columns=[*ONE_MATRIX, "figure", "value"]).astype(
        {"layer": "Int64", "value": "float64"}
    )


def _similarity(steps: Sequence[float], values: Sequence[float], level: float, end: float) -> dict[str, float]:
    return {f"settled at {level:g} (share of training)": settled_step(steps, values, level) / end}


def _distance(steps: Sequence[float], values: Sequence[float], level: float, end: float) -> dict[str, float]:
    share = round(1 - level, 12)  # 1 - 0.9 is a little less than 0.1
    nearness = [-value for value in values]
    step = math.nan if math.isnan(values[0]) else settled_step(steps, nearness, -share * values[0])
    return {f"settled at {share:.0%} of the first (share of training)": step / end}


SETTLING = {"similarity": _similarity, "distance": _distance}


def _quantity(steps: Sequence[float], values: Sequence[float], share: float, end: float) -> dict[str, float]:
    name = f"fallen to {share:.0%} (share of training)"
    return {"first": values[0], "last": values[-1], name: fallen_step(steps, values, share) / end}


def by_run(table: "pd.DataFrame", groups: Mapping[str, str], layers: bool = False) -> "pd.DataFrame":
    """What `figures` gives, a value per run: the mean over its layers, NaN where one has none, or with `layers` each layer."""
    apart = ("run", "module") if layers else ("run", "module", "layer")
    keys = ["group", *(name for name in ONE_MATRIX if name not in apart), "figure", "run"]
    rows = table.assign(group=table["run"].map(groups))
    return rows.groupby(keys, dropna=False, sort=False)["value"].agg(_mean).reset_index()


def by_group(table: "pd.DataFrame", groups: Mapping[str, str], layers: bool = False) -> "pd.DataFrame":
    """Mean and interval over the runs of each group of what `by_run` gives.

    n: runs that have the figure in every layer, `of` how many there are.
    """
    import pandas as pd

    each = by_run(table, groups, layers)
    keys = [name for name in each.columns if name not in ("run", "value")]
    records = []
    for key, rows in each.groupby(keys, dropna=False, sort=False):
        mean, low, high, n = interval(rows["value"].tolist())
        records.append(dict(zip(keys, key)) | {"mean": mean, "low": low, "high": high, "n": n, "of": len(rows)})
    return pd.DataFrame(records)
