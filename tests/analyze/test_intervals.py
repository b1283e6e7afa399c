"""Intervals over seeds: tabled values, and that they cover as often as they say."""

import math

import numpy as np
import pandas as pd
import pytest

from picolm.analyze.intervals import T_975, aggregate, interval, t_975
from picolm.analyze.table import COLUMNS


def test_intervals_are_those_of_student() -> None:
    mean, low, high, n = interval([1.0, 2.0, 3.0, math.nan])
    assert (mean, n) == (2.0, 3)
    assert high - mean == pytest.approx(4.303 / math.sqrt(3)) == mean - low
    # Of published tables; 1.96, that of the normal distribution, would be 8 % too narrow for 17 runs.
    tabled = {1: 12.706, 15: 2.131, 16: 2.12, 20: 2.086, 30: 2.042, 100: 1.984}
    assert {freedom: round(t_975(freedom), 3) for freedom in tabled} == tabled
    assert [math.isnan(part) for part in interval([1.0])] == [False, True, True, False]
    assert math.isnan(interval([])[0])


def test_an_interval_covers_the_mean_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(size=(4000, 3))
    covered = [low <= 0 <= high for _, low, high, _ in map(interval, draws)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.012)
    assert list(T_975) == sorted(T_975, reverse=True)


def table_of(runs: np.ndarray) -> pd.DataFrame:
    """One matrix at many steps, one value per run: [steps, runs]."""
    rows = [
        dict.fromkeys(COLUMNS, "") | {"run": f"seed {run}", "step": step, "value": value}
        for step, values in enumerate(runs)
        for run, value in enumerate(values.tolist())
    ]
    return pd.DataFrame(rows)


def test_of_three_seeds_student_covers_as_it_says_and_the_bootstrap_does_not() -> None:
    found = aggregate(table_of(np.random.default_rng(1).normal(size=(1500, 3))))
    covered = {name: ((found[f"{name}low"] <= 0) & (found[f"{name}high"] >= 0)).mean() for name in ("", "bootstrap_")}
    assert covered[""] == pytest.approx(0.95, abs=0.02)
    assert covered["bootstrap_"] == pytest.approx(0.75, abs=0.04)


def test_what_is_not_finite_is_counted_and_one_run_has_no_interval() -> None:
    found = aggregate(table_of(np.array([[1.0, 3.0, math.inf], [2.0, math.nan, math.nan]])))
    assert found[["n", "left_out", "mean"]].to_numpy().tolist() == [[2, 1, 2.0], [1, 2, 2.0]]
    assert found["std"].tolist()[0] == pytest.approx(math.sqrt(2))
    assert found.loc[1, ["std", "low", "high", "bootstrap_low", "bootstrap_high"]].isna().all()
    assert found.loc[0, "high"] == pytest.approx(2 + 12.706)
