"""A metric is a function with facts: how it is called, checked and found, ours and a user's own alike."""

import inspect
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from pydantic import Field
from torch import Tensor

from picolm.analyze import metrics
from picolm.analyze.matrix import Matrix, Undefined
from picolm.analyze.metrics import METRICS, Metric, as_metric
from picolm.errors import PicoError

ALL = [
    *("norm", "effective_rank", "per", "stable_rank", "participation_ratio", "condition_number", "spectral_alpha"),
    *("gini", "hoyer", "kurtosis", "near_zero_fraction", "cka", "cca", "svcca", "pwcca", "procrustes", "rsa"),
    *("cosine", "relative_change", "subspace_overlap", "neighbour_overlap"),
]


def test_every_metric_is_there_with_one_line_about_it() -> None:
    assert set(METRICS) == set(ALL)
    for name in ALL:
        metric = METRICS.get(name)
        assert metric is getattr(metrics, name)
        assert name in metrics.__all__
        assert (metric.name, metric.__name__) == (name, name)
        assert 20 < len(metric.summary) < 130
        assert metric.summary.endswith(".")
        assert metric.of == {"weights", "gradients", "activations"}
        assert metric.arity == (2 if metric.needs != "none" or name == "subspace_overlap" else 1)


def test_facts() -> None:
    assert {name for name in METRICS if METRICS.get(name).needs == "rows"} == {
        *("cka", "cca", "svcca", "pwcca", "procrustes", "rsa", "neighbour_overlap")
    }
    assert {name for name in METRICS if METRICS.get(name).needs == "shape"} == {"cosine", "relative_change"}
    kinds = {name: METRICS.get(name).kind for name in METRICS}
    assert {name for name in kinds if kinds[name] == "distance"} == {"procrustes", "relative_change"}
    similarities = {name for name in METRICS if METRICS.get(name).arity == 2} - {"procrustes", "relative_change"}
    assert {name for name in kinds if kinds[name] == "similarity"} == similarities
    not_symmetric = {name for name in METRICS if METRICS.get(name).arity == 2 and not METRICS.get(name).symmetric}
    assert not_symmetric == {"pwcca", "relative_change"}
    options = {name: {key: option.default for key, option in METRICS.get(name).options.items()} for name in METRICS}
    assert {name: defaults for name, defaults in options.items() if defaults} == {
        "norm": {"norm_type": "frobenius"},
        "spectral_alpha": {"k": inspect.Parameter.empty},
        "near_zero_fraction": {"eps": 1e-3},
        "cka": {"debiased": False},
        "svcca": {"variance": 0.99},
        "procrustes": {"form": "angle"},
        "neighbour_overlap": {"k": 10},
        "subspace_overlap": {"k": 10, "side": "left"},
    }
    assert [name for name in METRICS if METRICS.get(name).options.required] == ["spectral_alpha"]


@pytest.mark.parametrize("name", [name for name in ALL if METRICS.get(name).symmetric])
@pytest.mark.parametrize("columns", [(6, 6), (4, 7)])
def test_the_order_does_not_matter_where_a_metric_says_so(
    normal: Callable[..., Tensor], name: str, columns: tuple[int, int]
) -> None:
    metric = METRICS.get(name)
    x, y = (normal(seed, 24, columns[0 if metric.needs == "shape" else seed]) for seed in (0, 1))
    options = {"k": 3} if "k" in metric.options else {}
    assert metric(x, y, **options) == pytest.approx(metric(y, x, **options), rel=1e-12)


@pytest.mark.parametrize("name", [name for name in ALL if METRICS.get(name).symmetric])
def test_a_matrix_compared_with_itself_is_alike(normal: Callable[..., Tensor], name: str) -> None:
    x = normal(0, 40, 12)
    assert METRICS.get(name)(x, x) == pytest.approx(0.0 if name == "procrustes" else 1.0, abs=1e-7)


def test_tensors_arrays_lists_and_matrices_are_the_same(normal: Callable[..., Tensor]) -> None:
    x, y = normal(0, 9, 4), normal(1, 9, 3)
    wanted = metrics.cka(x, y)
    assert isinstance(wanted, float)
    assert (
        metrics.cka(x.numpy(), y.numpy()) == metrics.cka(Matrix(x), y) == metrics.cka(x.tolist(), y.numpy()) == wanted
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: metrics.cka(x), "cka is a metric of 2 tensors, given 1"),
        (lambda x: metrics.gini(x, x), "gini is a metric of 1 tensor, given 2"),
        (
            lambda x: metrics.cka(x, x, debias=True),
            "cka: debias: unknown option; did you mean 'debiased'? (there are: debiased)",
        ),
        (lambda x: metrics.gini(x, k=3), "gini: k: unknown option (there are: none)"),
        (lambda x: metrics.cka(x, x, debiased=1), "cka: debiased: should be a valid boolean, not 1"),
        (
            lambda x: metrics.norm(x, norm_type="fro"),
            "norm: norm_type: should be 'frobenius', 'nuclear', 'spectral', 'inf' or 'l1', not 'fro'",
        ),
        (
            lambda x: metrics.neighbour_overlap(x, x, k=0),
            "neighbour_overlap: k: should be greater than or equal to 1, not 0",
        ),
        (lambda x: metrics.svcca(x, x, variance=1.5), "svcca: variance: should be less than or equal to 1, not 1.5"),
        (lambda x: metrics.spectral_alpha(x), "spectral_alpha: k: must be given"),
        (lambda x: metrics.spectral_alpha(x, k=49), "spectral_alpha: k: should be greater than or equal to 50, not 49"),
    ],
)
def test_calls_that_cannot_be_right(
    normal: Callable[..., Tensor], call: Callable[[Tensor], float], message: str
) -> None:
    with pytest.raises(TypeError) as error:
        call(normal(0, 12, 12))
    assert str(error.value) == message


def test_options_are_checked_as_a_configuration_gives_them() -> None:
    assert metrics.subspace_overlap.options.problems({"k": 3, "side": "right"}) == {}
    assert metrics.subspace_overlap.options.problem("k", 3) is None
    assert metrics.spectral_alpha.options.problems({"kk": 60}) == {
        "kk": "unknown option; did you mean 'k'? (there are: k)",
        "k": "must be given",
    }
    assert metrics.svcca.options.problem("variance", 1) is None
    assert metrics.svcca.options.problem("variance", "0.9") == "should be a valid number, not '0.9'"


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda x: metrics.per(x * math.nan), "holds NaN at 12 of 12 entries"),
        (lambda x: metrics.cka(x, x / 0), "the second holds infinity at 12 of 12 entries"),
        (lambda x: metrics.cka(x[:0], x), "the first holds no entries"),
        (
            lambda x: metrics.pwcca(x, x[1:]),
            "4 rows against 3: pwcca compares activations of the same inputs, or matrices with matching rows",
        ),
        (lambda x: metrics.cosine(x, x.T), "(4, 3) against (3, 4): cosine compares tensors of one shape"),
    ],
)
def test_a_missing_value_has_a_reason(
    normal: Callable[..., Tensor], call: Callable[[Tensor], float], reason: str
) -> None:
    with pytest.raises(Undefined) as error:
        call(normal(0, 4, 3))
    assert str(error.value) == reason


def test_a_plain_function_is_a_metric() -> None:
    def trace(x: Tensor, *, power: int = 1) -> float:
        """Sum of the diagonal."""
        assert x.dtype == torch.float64
        return x.trace() ** power  # type: ignore[return-value]  # a tensor with one number will do

    metric = as_metric(trace)
    assert (metric.name, metric.arity, metric.summary, list(metric.options)) == (
        "trace",
        1,
        "Sum of the diagonal.",
        ["power"],
    )
    assert (metric.needs, metric.symmetric) == ("none", False)
    assert metric(torch.eye(3), power=2) == 9.0
    assert metric.options.problem("power", "two") == "should be a valid integer, not 'two'"
    assert as_metric(metric) is metric
    assert str(inspect.signature(metric)) == str(inspect.signature(trace))


def test_annotations_say_what_a_function_is_given() -> None:
    def kinds(x: np.ndarray, y: "Matrix") -> float:
        return float(isinstance(x, np.ndarray) and isinstance(y, Matrix))

    def bare(x, y, *, anything=None):  # type: ignore[no-untyped-def]
        return float(isinstance(x, Tensor) and isinstance(y, Tensor))

    assert as_metric(kinds)([[1.0]], [[1.0]]) == as_metric(bare)([[1.0]], [[1.0]], anything=[3]) == 1.0


def test_a_metric_that_is_no_number_is_undefined() -> None:
    def broken(x: Tensor) -> float:
        return math.nan

    def unbounded(x: Tensor) -> float:
        return math.inf

    with pytest.raises(Undefined, match="broken is not a number here"):
        as_metric(broken)([1.0])
    assert as_metric(unbounded)([1.0]) == math.inf


def test_a_decomposition_that_fails_is_undefined() -> None:
    def singular(x: Tensor) -> float:
        return float(torch.linalg.inv(x).sum())

    with pytest.raises(Undefined, match="the decomposition did not converge"):
        as_metric(singular)(torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (3, "3 is no metric: a metric is a function of one or two tensors that returns a number"),
        (lambda: 0.0, "metric <lambda> takes 0 tensors; a metric takes one, or two to compare"),
        (lambda x, y, z: 0.0, "metric <lambda> takes 3 tensors; a metric takes one, or two to compare"),
        (lambda x, k=3: 0.0, "metric <lambda>: k has a default; an option stands behind a `*`: (x, *, k=3)"),
        (lambda *x: 0.0, "metric <lambda>: *x tells neither how many tensors it takes nor which options it has"),
    ],
)
def test_what_cannot_be_a_metric_says_why(part: Any, message: str) -> None:
    with pytest.raises(PicoError) as error:
        as_metric(part)
    assert str(error.value) == message


def test_a_file_of_the_user_needs_no_change_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_lab_curvature.py").write_text('''
from __future__ import annotations
from typing import Annotated
from pydantic import Field
from torch import Tensor
from picolm.analyze.matrix import Matrix
from picolm.analyze.metrics import metric

def curvature(x: Tensor, *, order: Annotated[int, Field(ge=2)] = 2) -> float:
    """Mean second difference."""
    return float(x.diff(n=order).mean())

@metric("gap", of={"activations"}, needs="rows", symmetric=True)
def gap(x: Matrix, y: Matrix) -> float:
    """Difference of ranks."""
    return abs(x.rank - y.rank)
''')
    monkeypatch.syspath_prepend(tmp_path)
    curvature = as_metric(METRICS.get("my_lab_curvature:curvature"))
    assert curvature([[0.0, 1.0, 4.0, 9.0]]) == 2.0
    assert curvature.options.problem("order", 1) == "should be greater than or equal to 2, not 1"
    gap = as_metric(METRICS.get("my_lab_curvature:gap"))
    try:
        assert gap is METRICS.get("gap")
        assert (gap.of, gap.needs, gap.symmetric) == ({"activations"}, "rows", True)
        assert gap(torch.ones(3, 1), torch.ones(3, 2)) == 1.0
    finally:
        del METRICS._parts["gap"]
    with pytest.raises(PicoError, match="unknown metric 'hoyr'; did you mean 'hoyer'"):
        METRICS.get("hoyr")


def test_a_metric_of_the_users_own_says_its_kind_or_is_a_quantity() -> None:
    def alike(x: Tensor, y: Tensor) -> float:
        return 1.0

    assert as_metric(alike).kind == "quantity"
    alike.kind = "similarity"  # type: ignore[attr-defined]
    assert as_metric(alike).kind == "similarity"
    assert Metric(alike, "alike", kind="distance").kind == "distance"
    alike.kind = "similar"  # type: ignore[attr-defined]
    with pytest.raises(
        PicoError, match="metric alike: kind is 'similar'; expected 'similarity', 'distance', 'quantity'"
    ):
        as_metric(alike)
    with pytest.raises(PicoError, match="a similarity compares two tensors; this one takes one and is a 'quantity'"):
        Metric(lambda x: 1.0, "alone", kind="similarity")


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ValueError, match="metric 'cka' is registered twice"):
        metrics.metric("cka")(lambda x: 0.0)


def a_function_of_a_module(x: Tensor) -> float:
    return 1.0


def test_metrics_travel_to_other_processes() -> None:
    assert pickle.loads(pickle.dumps(metrics.pwcca)) is metrics.pwcca
    reduced: Any = as_metric(a_function_of_a_module).__reduce__()
    assert isinstance(reduced[0](*reduced[1]), Metric)


def test_types_of_options_may_be_any_that_can_be_checked() -> None:
    def both(x: Tensor, *, mode: Literal["a", "b"], scale: Annotated[float, Field(gt=0)] = 1.0) -> float:
        return scale

    assert as_metric(both).options.required == ("mode",)
    assert as_metric(both).options.problems({"scale": -1.0}) == {
        "scale": "should be greater than 0, not -1.0",
        "mode": "must be given",
    }
