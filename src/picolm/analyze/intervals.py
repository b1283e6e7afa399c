"""Means over runs that differ in their seed, their 95 % confidence intervals, and differences between groups of runs.

Student's t assumes that runs are draws from a normal distribution; its coverage is then as stated, from two runs on.
The percentile bootstrap assumes no distribution, but stays between the smallest and the largest run: with three runs it
covers three times in four. Groups may vary by different amounts, so their difference uses the interval of Welch (1947),
which pools no variances.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from picolm.analyze.table import COLUMNS, MEASURED

if TYPE_CHECKING:
    import pandas as pd

SUBJECT = [
    "metric",
    "options",
    "component",
    "kind",
    "split",
    "target",
    "bin",
]  # columns that identify a series over steps


@cache
def t_975(freedom: float) -> float:
    """Return the 97.5 % point of Student's t for any number of degrees of freedom from 1 on, not only integers.

    With t = sqrt(freedom) tan(a), the probability within +-t is the integral of cos(x)^(freedom - 1) from 0 to a,
    divided by that from 0 to pi / 2, which has a closed form. The integrand is smooth, so Gauss-Legendre quadrature is
    exact to the last digits.
    """
    if not freedom >= 1:
        raise ValueError(f"Student's t needs at least one degree of freedom, not {freedom}")
    nodes, weights = np.polynomial.legendre.leggauss(64)
    log_whole = 0.5 * math.log(math.pi) - math.log(2) + math.lgamma(freedom / 2) - math.lgamma((freedom + 1) / 2)
    low, high = 0.0, min(math.pi / 2, 13 / math.sqrt(freedom))  # t is 12.7 for one degree, and less for more
    for _ in range(60):
        end = (low + high) / 2
        logs = (freedom - 1) * np.log(np.cos(end / 2 * (nodes + 1))) - log_whole
        low, high = (end, high) if end / 2 * float(np.exp(logs) @ weights) < 0.95 else (low, end)
    return math.sqrt(freedom) * math.tan(low)


def interval(values: Sequence[float]) -> tuple[float, float, float, int]:
    """Return (mean, lower end, upper end, n): mean and 95 % confidence interval (Student's t) of the n finite values.

    The ends are NaN for fewer than two values.
    """
    given = np.asarray([value for value in values if math.isfinite(value)], dtype=float)
    n = len(given)
    if n < 2:
        return (float(given[0]) if n else math.nan), math.nan, math.nan, n
    half = t_975(n - 1) * float(given.std(ddof=1)) / math.sqrt(n)
    return float(given.mean()), float(given.mean()) - half, float(given.mean()) + half, n


def difference(one: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Return (difference of two means, lower end, upper end): the 95 % confidence interval of Welch, which is Student's
    t with the degrees of freedom of Satterthwaite (1946).

    The ends are NaN if a group has fewer than two values. Values that are not finite are left out.
    """
    groups = [np.asarray([value for value in group if math.isfinite(value)], dtype=float) for group in (one, other)]
    if not all(map(len, groups)):
        return math.nan, math.nan, math.nan
    apart = float(groups[0].mean() - groups[1].mean())
    if min(map(len, groups)) < 2:
        return apart, math.nan, math.nan
    errors = [float(group.var(ddof=1)) / len(group) for group in groups]
    total = sum(errors)
    if total == 0:
        return apart, apart, apart
    freedom = 1 / sum((error / total) ** 2 / (len(group) - 1) for error, group in zip(errors, groups))
    half = t_975(freedom) * math.sqrt(total)
    return apart, apart - half, apart + half


def aggregate(
    frame: "pd.DataFrame", groups: Mapping[str, str] | None = None, *, draws: int = 1000, seed: int = 0
) -> "pd.DataFrame":
    """Return mean, standard deviation (n - 1), n and 95 % confidence intervals of the mean over the runs of each group.

    groups: name of the group by run, as `alike` returns it (default: all runs are seeds of one configuration). low,
    high: Student's t; bootstrap_low, bootstrap_high: percentiles of the means of `draws` bootstrap samples. A mean is
    over values of the same step, matrix, metric and target; comparisons with the last step are averaged even if runs
    end at different steps. Only steps that all runs of a group have are used; sentences in `attrs["left_out"]` of the
    result name the others. Infinite and missing values are left out and counted (left_out). A single run has no
    deviation and no interval.
    """
    import pandas as pd

    belongs = [("all runs" if groups is None else groups.get(run, run)) for run in frame["run"]]
    rows = frame.assign(group=belongs)
    rows = rows.assign(target=_asked(rows))
    relative = rows["target"].astype("string").str.contains(r"\b(?:first|last|previous)\b").fillna(False)
    rows["against_step"] = rows["against_step"].mask(relative.to_numpy(dtype=bool))
    rows, left_out = _common(rows)
    keys = ["group", *(name for name in COLUMNS if name not in (*MEASURED, "run", "against_run"))]
    generator = np.random.default_rng(seed)
    grouped = rows.groupby(keys, dropna=False, sort=False)
    records = [_record(key, keys, group, draws, generator) for key, group in grouped]
    made = pd.DataFrame(records, columns=[*keys, *_FIGURES])
    made.attrs["left_out"] = left_out
    return made


_FIGURES = ("n", "left_out", "mean", "std", "low", "high", "bootstrap_low", "bootstrap_high")


def _record(key: Any, keys: list[str], rows: "pd.DataFrame", draws: int, generator: Any) -> dict[str, Any]:
    values = rows["value"].to_numpy(dtype=float)
    mean, low, high, n = interval(values.tolist())
    finite = values[np.isfinite(values)]
    means = finite[generator.integers(0, n, (draws, n))].mean(1) if n > 1 else np.array([math.nan])
    deviation = finite.std(ddof=1) if n > 1 else math.nan
    found = (n, len(values) - n, mean, deviation, low, high, *np.quantile(means, (0.025, 0.975)))
    return dict(zip(keys, key)) | dict(zip(_FIGURES, found))


def _asked(rows: "pd.DataFrame") -> "pd.Series":
    """Return the targets. A table of an earlier version has none: `last` where a run is only compared with its last
    step.
    """
    if not (rows["target"].fillna("") == "").any() or rows.empty:
        return rows["target"]
    last = rows.groupby("run")["step"].transform("max")
    same_run = (rows["against_run"] == rows["run"]) & (rows["against_step"] == last).fillna(False)
    throughout = same_run.groupby([rows["run"], rows["metric"], rows["options"].fillna("")]).transform("all")
    return rows["target"].mask((rows["target"].fillna("") == "") & throughout, "last")


def _common(rows: "pd.DataFrame") -> tuple["pd.DataFrame", list[str]]:
    """Return the rows of the steps that all runs of a group have, and sentences on what is left out."""
    subject = ["group", *SUBJECT]
    by_step = rows.groupby([*subject, "step"], dropna=False)["run"].transform("nunique")
    runs = rows.groupby(subject, dropna=False)["run"].transform("nunique")
    kept, left_out = by_step == runs, []
    for (group, run), own in rows[~kept].groupby(["group", "run"], sort=False):
        steps = sorted(map(int, own["step"].unique()))
        shown = ", ".join(map(str, steps[:6])) + (f", … {steps[-1]} ({len(steps)} in all)" if len(steps) > 6 else "")
        left_out.append(f"{group}: left out of the means: step {shown} of {run}, which not all of its runs have")
    return rows[kept], left_out
