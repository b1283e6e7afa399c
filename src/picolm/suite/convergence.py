"""When a layer has settled, when a matrix has lost rank, and how both differ between groups of runs.

Pure functions of the long table of an analysis. Only saved steps are known, so a figure is exact up to the distance
between them. The kind of a metric decides which figures its curve has: a similarity with the last step rises until it
has settled, a distance from it falls, and for a quantity neither is known. A missing value stays missing: no curve is
shortened, and no mean leaves missing values out. Confidence intervals are Student's t over runs (seeds); with three
runs they are wide, as they should be.
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
    """Return the first step from which on the value is never below `level` and never missing.

    NaN when the last value is below `level` or missing.
    """
    below = [place for place, value in enumerate(values) if not value >= level]
    first = below[-1] + 1 if below else 0
    return float(steps[first]) if first < len(steps) else math.nan


def fallen_step(steps: Sequence[float], values: Sequence[float], share: float) -> float:
    """Return the first step at which the value is at most `share` of the first value.

    NaN when there is none, when a value before it is missing, and when the first value is not positive.
    """
    for step, value in zip(steps, values):
        if math.isnan(value) or not values[0] > 0:
            return math.nan
        if value <= share * values[0]:
            return float(step)
    return math.nan


def mean_over_training(steps: Sequence[float], values: Sequence[float]) -> float:
    """Return the mean of a curve over the steps of training (trapezoidal rule); NaN for fewer than two steps.

    It has no threshold, and late steps count as much as early ones.
    """
    if len(steps) < 2:
        return math.nan
    return float(np.trapezoid(values, steps) / (steps[-1] - steps[0]))


def curves(table: "pd.DataFrame") -> "pd.DataFrame":
    """Return one row per matrix of a run: `steps`, `values` (averaged over heads), and `end`, the run's last step.

    Comparisons with other layers, other runs, and steps other than the last are left out. The value is NaN at a step
    where a head has none.
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
    """Return one row per matrix of a run and figure, with the `value`.

    Similarities with the last step: the share of training after which they stay at or above `settled`. Distances from
    it: the share after which they stay at or below 1 - `settled` of their first value. Quantities: the first value, the
    last value, and the share of training after which they are at most `fallen` of the first. All: the mean over
    training. NaN when the value at the last step of the run is missing, since the curve then ends before training does.
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
    """Return the `figures` of each run: the mean over its layers, or with `layers` each layer.

    The mean is NaN when a layer has no value.
    """
    apart = ("run", "module") if layers else ("run", "module", "layer")
    keys = ["group", *(name for name in ONE_MATRIX if name not in apart), "figure", "run"]
    rows = table.assign(group=table["run"].map(groups))
    return rows.groupby(keys, dropna=False, sort=False)["value"].agg(_mean).reset_index()


def by_group(table: "pd.DataFrame", groups: Mapping[str, str], layers: bool = False) -> "pd.DataFrame":
    """Return the mean and confidence interval of `by_run` over the runs of each group.

    n: number of runs that have the figure in every layer. of: number of all runs.
    """
    import pandas as pd

    each = by_run(table, groups, layers)
    keys = [name for name in each.columns if name not in ("run", "value")]
    records = []
    for key, rows in each.groupby(keys, dropna=False, sort=False):
        mean, low, high, n = interval(rows["value"].tolist())
        records.append(dict(zip(keys, key)) | {"mean": mean, "low": low, "high": high, "n": n, "of": len(rows)})
    return pd.DataFrame(records)
