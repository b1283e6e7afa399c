"""Intervals over seeds: tabled values, and that they cover as often as they say."""

import math

import numpy as np
import pandas as pd
import pytest

from picolm.analyze.groups import alike
from picolm.analyze.intervals import aggregate, difference, interval, t_975
from picolm.analyze.table import COLUMNS


def test_intervals_are_those_of_student() -> None:
    mean, low, high, n = interval([1.0, 2.0, 3.0, math.nan])
    assert (mean, n) == (2.0, 3)
    assert high - mean == pytest.approx(4.302652729749464 / math.sqrt(3)) == mean - low
    # Of published tables; 1.96, that of the normal distribution, would be 8 % too narrow for 17 runs.
    tabled = {1: 12.706, 15: 2.131, 16: 2.12, 20: 2.086, 30: 2.042, 100: 1.984}
    assert {freedom: round(t_975(freedom), 3) for freedom in tabled} == tabled
    assert [math.isnan(part) for part in interval([1.0])] == [False, True, True, False]
    assert math.isnan(interval([])[0])


def test_an_interval_covers_the_mean_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(size=(4000, 3))
    covered = [low <= 0 <= high for _, low, high, _ in map(interval, draws)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.012)


@pytest.mark.parametrize("freedom", [1, 1.3, 2, 2.5, 4.7, 12.25, 200])
def test_the_point_of_student_is_where_its_distribution_holds_97_5_percent(freedom: float) -> None:
    """By integrating the density itself, on a grid, up to the point."""
    t = t_975(freedom)
    at = np.linspace(0, t, 400_001)
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    density = constant * (1 + at**2 / freedom) ** (-(freedom + 1) / 2)
    assert 0.5 + np.trapezoid(density, at) == pytest.approx(0.975, abs=1e-9)


def test_the_difference_of_groups_is_that_of_welch() -> None:
    """Degrees of freedom by hand: errors 1/3 and 100/3, so 2.0396 of them."""
    apart, low, high = difference([1.0, 2.0, 3.0], [10.0, 20.0, 30.0])
    freedom = (1 / 3 + 100 / 3) ** 2 / ((1 / 3) ** 2 / 2 + (100 / 3) ** 2 / 2)
    assert freedom == pytest.approx(2.0399960004)
    assert apart == -18
    assert high - apart == pytest.approx(t_975(freedom) * math.sqrt(101 / 3)) == apart - low
    assert difference([1.0, 1.0], [2.0, 2.0]) == (-1, -1, -1)
    assert [math.isnan(part) for part in difference([1.0], [2.0, 3.0])] == [False, True, True]
    assert all(map(math.isnan, difference([], [2.0, 3.0])))


@pytest.mark.slow
def test_a_difference_of_unequal_groups_is_covered_as_it_says_and_a_pooled_one_is_not() -> None:
    """The small group varies ten times as much: pooling takes it for as calm as the large one."""
    random = np.random.default_rng(2)
    welch, pooled = [], []
    for _ in range(3000):
        one, other = 10 * random.normal(size=3), random.normal(size=12)
        _, low, high = difference(one.tolist(), other.tolist())
        welch.append(low <= 0 <= high)
        variance = (2 * one.var(ddof=1) + 11 * other.var(ddof=1)) / 13
        pooled.append(abs(one.mean() - other.mean()) <= t_975(13) * math.sqrt(variance * (1 / 3 + 1 / 12)))
    assert np.mean(welch) == pytest.approx(0.95, abs=0.015)
    assert np.mean(pooled) < 0.8


def rows_of(run: str, steps: list[int], target: str = "last", value: float = 1.0) -> list[dict[str, object]]:
    against = {"last": steps[-1], "first": steps[0], "": steps[-1]}.get(target, 4)
    fixed = dict.fromkeys(COLUMNS, "") | {"run": run, "metric": "cka", "against_run": run, "target": target}
    return [fixed | {"step": step, "against_step": against, "value": value + step} for step in steps]


@pytest.mark.parametrize("target", ["last", ""])  # a table of an earlier version has no target
def test_seeds_that_end_at_different_steps_are_pooled_at_those_that_all_have(target: str) -> None:
    frame = pd.DataFrame([*rows_of("a", [0, 2, 4], target), *rows_of("b", [0, 2, 4, 6], target, 3.0)])
    found = aggregate(frame)
    assert found[["step", "n", "mean"]].to_numpy().tolist() == [[0, 2, 2.0], [2, 2, 4.0], [4, 2, 6.0]]
    assert found.attrs["left_out"] == ["all runs: left out of the means: step 6 of b, which not all of its runs have"]


def test_a_fixed_step_is_another_target_than_the_last() -> None:
    frame = pd.DataFrame(
        [*rows_of("a", [0, 2, 4], "4"), *rows_of("a", [0, 2, 4], "last"), *rows_of("b", [0, 2, 4], "last")]
    )
    found = aggregate(frame)
    assert found.groupby("target")["n"].max().to_dict() == {"4": 1, "last": 2}


def test_groups_are_pooled_apart() -> None:
    frame = pd.DataFrame([*rows_of("a", [0]), *rows_of("b", [0], value=3.0), *rows_of("wide", [0], value=9.0)])
    found = aggregate(frame, {"a": "small", "b": "small", "wide": "wide"}).set_index("group")
    assert found["n"].to_dict() == {"small": 2, "wide": 1}
    assert found["mean"].to_dict() == {"small": 2.0, "wide": 9.0}


BASE = {
    "model": {"d_model": 24},
    "training": {"max_steps": 6, "seeds": {"init": 1}},
    "data": {"dataset": {"name": "x"}},
}


def test_runs_are_alike_that_differ_in_seeds_and_names_alone() -> None:
    seed = {**BASE, "training": {"max_steps": 6, "seeds": {"init": 2, "data": 9}}, "checkpointing": {"run_name": "b"}}
    wide = {**BASE, "model": {"d_model": 48}}
    groups, told = alike({"a": BASE, "b": seed, "c": wide, "d": {}})
    assert groups == {"a": "a and 1 like it", "b": "a and 1 like it", "c": "c", "d": "d"}
    assert told[:2] == [
        "a, b are taken together as seeds of one configuration",
        "c is by itself: differs from a in model.d_model",
    ]
    assert len(told) == 3  # of d nothing is known
    assert alike({"a": BASE, "b": seed})[1] == []
    assert alike({"d": {}, "e": {}})[0] == {"d": "d", "e": "e"}


def table_of(runs: np.ndarray) -> pd.DataFrame:
    """One matrix at many steps, one value per run: [steps, runs]."""
    rows = [
        dict.fromkeys(COLUMNS, "") | {"run": f"seed {run}", "step": step, "value": value}
        for step, values in enumerate(runs)
        for run, value in enumerate(values.tolist())
    ]
    return pd.DataFrame(rows)


@pytest.mark.slow
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
    assert found.loc[0, "high"] == pytest.approx(2 + 12.706204736)
