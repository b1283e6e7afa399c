"""Means over runs that differ in their seed, and how far they may be from the mean over all seeds.

Student's t takes the runs for draws from a normal distribution, and covers as often as it says from two runs on. The percentile
bootstrap takes no distribution, but lies between the least and the greatest run: of three runs it covers three times in four.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from picolm.analyze.table import COLUMNS, MEASURED

if TYPE_CHECKING:
    import pandas as pd

# 97.5 % points of Student's t for 1, 2, … degrees of freedom, and of the normal distribution.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
Z_975 = 1.959964


def t_975(freedom: int) -> float:
    """The 97.5 % point of Student's t; beyond the table by its expansion in 1 / freedom (Abramowitz and Stegun 26.7.5)."""
    if freedom <= len(T_975):
        return T_975[freedom - 1]
    z = Z_975
    terms = (z, (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return sum(term / freedom**power for power, term in enumerate(terms))


def interval(values: Sequence[float]) -> tuple[float, float, float, int]:
    """Mean, lower and upper end of its 95 % interval (Student's t), and how many values; NaN ends for fewer than two."""
    given = np.asarray([value for value in values if math.isfinite(value)], dtype=float)
    n = len(given)
    if n < 2:
        return (float(given[0]) if n else math.nan), math.nan, math.nan, n
    half = t_975(n - 1) * float(given.std(ddof=1)) / math.sqrt(n)
    return float(given.mean()), float(given.mean()) - half, float(given.mean()) + half, n


def aggregate(frame: "pd.DataFrame", *, draws: int = 1000, seed: int = 0) -> "pd.DataFrame":
    """Mean, standard deviation (n - 1), n and 95 % intervals of the mean over runs that differ in their seed.

    low, high: by Student's t; bootstrap_low, bootstrap_high: percentiles of the means of `draws` samples. Values that stand for
    the same step, matrix, metric and partner are taken together; infinite and missing ones are left out and counted (left_out).
    With one run there is no deviation and no interval.
    """
    import pandas as pd

    keys = [name for name in COLUMNS if name not in (*MEASURED, "run", "against_run")]
    generator = np.random.default_rng(seed)
    records = []
    for key, group in frame.groupby(keys, dropna=False, sort=False):
        values = group["value"].to_numpy(dtype=float)
        mean, low, high, n = interval(values.tolist())
        finite = values[np.isfinite(values)]
        means = finite[generator.integers(0, n, (draws, n))].mean(1) if n > 1 else np.array([math.nan])
        record = dict(zip(keys, key)) | {"n": n, "left_out": len(values) - n, "mean": mean}
        record |= {"std": finite.std(ddof=1) if n > 1 else math.nan, "low": low, "high": high}
        records.append(record | dict(zip(("bootstrap_low", "bootstrap_high"), np.quantile(means, (0.025, 0.975)))))
    return pd.DataFrame(records)
