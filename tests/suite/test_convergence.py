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


def shaped(kind: str, curve: list[float | None], steps: list[int] = STEPS, **other: object) -> list[dict[str, object]]:
    """Rows of a metric of one's own, of a kind, compared with the last step unless it is a quantity."""
    rows = values("a", 0, [0.0] * 5, "cka" if kind != "quantity" else "per")
    own = {"metric": f"my_lab:{kind}", "metric_kind": kind} | other
    return [row | own | {"step": step, "value": value} for row, step, value in zip(rows, steps, curve)]


def settled_of(rows: list[dict[str, object]]) -> dict[str, float]:
    return figures(pd.DataFrame(rows)).set_index("figure")["value"].to_dict()


def test_a_distance_has_settled_when_it_stays_low() -> None:
    found = settled_of(shaped("distance", [2.0, 0.1, 1.0, 0.2, 0.0]))
    assert found["settled at 10% of the first (share of training)"] == 4 / 8
    assert set(found) == {"settled at 10% of the first (share of training)", "mean over training"}
    scaled = settled_of(shaped("distance", [200.0, 10.0, 100.0, 20.0, 0.0]))
    assert scaled["settled at 10% of the first (share of training)"] == 4 / 8


@pytest.mark.parametrize("metric", ["condition_number", "norm", "stable_rank", "my_lab:gone"])
def test_of_a_quantity_nothing_settles(metric: str) -> None:
    rows = [row | {"metric": metric} for row in values("a", 0, [5.0, 4.0, 3.0, 2.0, 1.0], "per")]
    found = settled_of(rows)
    assert not [name for name in found if name.startswith("settled")]
    assert (found["first"], found["last"]) == (5.0, 1.0)


@pytest.mark.parametrize("kind", ["similarity", "distance", "quantity"])
@pytest.mark.parametrize("missing", [[None, None], "absent"])
def test_a_curve_whose_late_values_are_missing_does_not_end_early(kind: str, missing: object) -> None:
    curve = [0.1, 0.95, 1.0, 1.0, 1.0] if kind == "similarity" else [1.0, 0.05, 0.0, 0.0, 0.0]
    whole = shaped(kind, curve, metric="my_lab:whole")
    rows = shaped(kind, [*curve[:3], None, None])
    found = figures(pd.DataFrame([*whole, *(rows[:3] if missing == "absent" else rows)]))
    cut = found[found["metric"] != "my_lab:whole"].set_index("figure")["value"]
    wanted = [name for name in cut.index if name.startswith(("settled", "last", "mean"))]
    assert len(wanted) == 2
    assert cut[wanted].isna().all()
    assert found[found["metric"] == "my_lab:whole"]["value"].notna().all()


def test_a_head_without_a_value_is_not_averaged_away() -> None:
    heads = [row | {"head": head} for head in (0, 1) for row in shaped("similarity", [1.0] * 5)]
    heads[-1]["value"] = None
    assert math.isnan(settled_of(heads)["settled at 0.9 (share of training)"])


def test_what_is_compared_with_the_step_before_has_not_settled() -> None:
    rows = shaped("similarity", [1.0] * 4, target="previous")
    before = [row | {"step": step, "against_step": other} for row, step, other in zip(rows, STEPS[1:], STEPS)]
    whole = shaped("similarity", [0.0, 0.0, 0.0, 0.0, 1.0], target="last")
    found = figures(pd.DataFrame([*before, *whole]))
    assert set(found["target"]) == {"last"}
