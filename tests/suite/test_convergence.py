"""When a curve has settled, when it has fallen: closed forms, and what does not change them."""

import math

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from picolm.suite.convergence import (
    by_group,
    fallen_step,
    figures,
    mean_over_training,
    settled_step,
)

STEPS = [0, 1, 2, 4, 8]
curves = st.lists(st.floats(0, 1), min_size=5, max_size=5)


def test_settled_is_the_first_step_after_the_last_one_below() -> None:
    assert settled_step(STEPS, [0, 0.95, 0.5, 0.9, 1], 0.9) == 4  # an early visit above does not count
    assert settled_step(STEPS, [1] * 5, 0.9) == 0
    assert math.isnan(settled_step(STEPS, [1, 1, 1, 1, 0.5], 0.9))
    assert math.isnan(settled_step(STEPS, [1, 1, 1, 1, math.nan], 0.9))


@given(curves, st.floats(0, 1), st.floats(0, 1))
def test_a_higher_level_is_never_settled_earlier(values: list[float], one: float, other: float) -> None:
    values[-1] = 1.0
    low, high = sorted((one, other))
    assert settled_step(STEPS, values, low) <= settled_step(STEPS, values, high)


@given(st.lists(st.floats(0.1, 1), min_size=5, max_size=5), st.sampled_from([0.125, 0.5, 2, 8]))
def test_falling_is_relative_to_the_first_value(values: list[float], scale: float) -> None:
    fallen = fallen_step(STEPS, values, 0.5)
    scaled = fallen_step(STEPS, [scale * value for value in values], 0.5)
    assert fallen == scaled or (math.isnan(fallen) and math.isnan(scaled))


def test_the_mean_over_training_weighs_by_steps() -> None:
    assert mean_over_training([0, 10], [0, 1]) == 0.5
    assert mean_over_training([0, 1, 10], [0, 1, 1]) == pytest.approx(0.95)
    assert math.isnan(mean_over_training([0], [1]))


def values(run: str, layer: int, curve: list[float], metric: str = "cka") -> list[dict[str, object]]:
    against = STEPS[-1] if metric == "cka" else None
    fixed = {"run": run, "split": "val", "component": "mlp", "kind": "activations", "layer": layer, "metric": metric}
    itself = (
        {"against_run": run, "against_layer": layer}
        if metric == "cka"
        else {"against_run": None, "against_layer": None}
    )
    empty = {"head": None, "options": "", "reason": ""} | itself
    module = f"layers.{layer}.swiglu.w_2"
    return [
        fixed | empty | {"step": step, "module": module, "value": value, "against_step": against}
        for step, value in zip(STEPS, curve)
    ]


def test_groups_take_the_mean_over_layers_then_over_runs() -> None:
    early, late = [0, 1, 1, 1, 1], [0, 0, 0, 0, 1]
    frame = pd.DataFrame(
        [
            *values("a", 0, early), *values("a", 1, late), *values("b", 0, late), *values("b", 1, late),
            *values("c", 0, early), *values("c", 1, early),
        ]
    )  # fmt: skip
    grouped = by_group(figures(frame), {"a": "small", "b": "small", "c": "wide"})
    settled = grouped[grouped["figure"].str.startswith("settled")].set_index("group")
    assert settled.loc["small", "mean"] == pytest.approx(((1 / 8 + 1) / 2 + 1) / 2)
    assert (settled.loc["small", "n"], settled.loc["wide", "n"]) == (2, 1)
    assert settled.loc["wide", "mean"] == 1 / 8
    assert math.isnan(settled.loc["wide", "low"])


def test_a_rank_that_never_falls_is_not_taken_for_one_that_falls_late() -> None:
    frame = pd.DataFrame([*values("a", 0, [1] * 5, "per"), *values("a", 1, [1, 0.9, 0.8, 0.7, 0.6], "per")])
    found = figures(frame)
    fallen = found[found["figure"].str.startswith("fallen")].set_index("layer")["value"]
    assert math.isnan(fallen[0])
    assert fallen[1] == 1 / 8
    grouped = by_group(found, {"a": "all"}).set_index("figure")
    assert grouped.loc["fallen to 95% (share of training)", "n"] == 0
    assert grouped.loc["last", "mean"] == 0.8


def test_comparisons_with_other_steps_runs_and_layers_stay_out() -> None:
    rows = values("a", 0, [0, 0, 1, 1, 1])
    others = [{"against_step": 4}, {"against_run": "b"}, {"against_layer": 1}]
    zeros = [row | other | {"value": 0.0} for row in rows for other in others]
    settled = figures(pd.DataFrame([*rows, *zeros]))
    assert settled.loc[settled["figure"].str.startswith("settled"), "value"].tolist() == [2 / 8]
