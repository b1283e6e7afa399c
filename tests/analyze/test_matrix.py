"""A matrix shares what is computed of it, and a product of factors is what it would be if it were formed."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from picolm.analyze import metrics
from picolm.analyze.matrix import Matrix, Product, Undefined


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


few = settings(max_examples=25, deadline=None)
sizes = st.integers(1, 12)
seeds = st.integers(0, 10**6)


@few
@given(seed=seeds, m=sizes, r=sizes, n=sizes)
def test_a_product_has_the_singular_values_of_the_matrix_that_is_never_formed(
    seed: int, m: int, r: int, n: int
) -> None:
    left, right = normal(seed, m, r), normal(seed + 1, r, n)
    product, dense = Matrix.product(left, right), torch.linalg.svdvals(left @ right)
    assert product.shape == (m, n)
    assert product.rank == len(product.singular_values) == min(m, r, n)
    assert torch.allclose(product.singular_values, dense[: product.rank], rtol=1e-10, atol=1e-12)
    assert product.frobenius == pytest.approx(float((left @ right).norm()))


@few
@given(seed=seeds, m=sizes, r=sizes, n=sizes)
def test_a_sum_of_products_is_the_first_order_change(seed: int, m: int, r: int, n: int) -> None:
    o, o_gradient, v, v_gradient = (
        normal(seed, m, r),
        normal(seed + 1, m, r),
        normal(seed + 2, r, n),
        normal(seed + 3, r, n),
    )
    change = Matrix.sum_of_products([(o_gradient, v), (o, v_gradient)])
    dense = o_gradient @ v + o @ v_gradient
    assert change.rank == min(m, n, 2 * r)
    assert torch.allclose(change.dense(), dense)
    assert torch.allclose(change.singular_values, torch.linalg.svdvals(dense)[: change.rank], atol=1e-10)


def test_the_stated_rank_bounds_the_attainable_one() -> None:
    left, right = normal(0, 9, 4), normal(1, 4, 7)
    assert Matrix.product(left, right, rank=3).rank == len(Matrix.product(left, right, rank=3).singular_values) == 3
    assert Matrix.product(left, right, rank=100).rank == 4
    assert Matrix(normal(0, 9, 4)).rank == 4


@pytest.mark.parametrize("shapes", [((9, 4), (4, 7)), ((9, 4), (4, 3)), ((7, 8), (8, 5)), ((12, 2), (2, 40))])
def test_every_metric_of_a_product_is_that_of_the_formed_matrix(shapes: Any) -> None:
    (left, right), (other_left, other_right) = (
        [normal(s + i, *shape) for i, shape in enumerate(shapes)] for s in (0, 2)
    )
    first, second = Matrix.product(left, right), Matrix.product(other_left, other_right)
    options = {"neighbour_overlap": {"k": 1}, "subspace_overlap": {"k": 2}}
    for name in metrics.METRICS:
        metric = metrics.METRICS.get(name)
        if name in ("per", "condition_number", "spectral_alpha"):
            continue  # those know the attainable rank of a product
        factored = metric(*(first, second)[: metric.arity], **options.get(name, {}))
        formed = metric(*(first.dense(), second.dense())[: metric.arity], **options.get(name, {}))
        assert factored == pytest.approx(formed, rel=1e-9, abs=1e-9), name


def test_per_and_condition_number_of_a_product_count_its_own_singular_values() -> None:
    left, right = normal(0, 9, 3), normal(1, 3, 7)
    values = np.linalg.svd((left @ right).numpy(), compute_uv=False)
    assert metrics.condition_number(Matrix.product(left, right)) == pytest.approx(values[0] / values[2])
    assert metrics.condition_number(left @ right) == math.inf
    assert metrics.per(Matrix.product(left, right)) == pytest.approx(metrics.effective_rank(left @ right) / 3)


def test_only_metrics_of_entries_form_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (Matrix.product(normal(s, 12, 3), normal(s + 1, 3, 9)) for s in (0, 2))

    class FormedError(Exception):
        pass

    def formed(self: Product) -> None:
        raise FormedError

    monkeypatch.setattr(Product, "entries", property(formed))
    needs_entries = {"gini", "hoyer", "kurtosis", "near_zero_fraction"}
    for name in set(metrics.METRICS) - needs_entries - {"spectral_alpha"}:
        metric = metrics.METRICS.get(name)
        metric(*(first, second)[: metric.arity], **({"k": 2} if "k" in metric.options else {}))
    for name in needs_entries:
        with pytest.raises(FormedError):
            metrics.METRICS.get(name)(first)
    for norm_type in ("nuclear", "spectral"):
        metrics.norm(first, norm_type=norm_type)


def test_metrics_of_the_spectrum_share_one_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch, "svdvals", "svd")
    x = Matrix(normal(0, 60, 80))
    for metric in (metrics.per, metrics.effective_rank, metrics.condition_number, metrics.stable_rank, metrics.norm):
        metric(x)
    metrics.norm(x, norm_type="nuclear")
    metrics.spectral_alpha(x, k=50)
    assert calls == {"svdvals": 1, "svd": 0}


def test_many_steps_against_one_target_decompose_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    target, steps = Matrix(normal(0, 30, 5)), [Matrix(normal(s, 30, 4)) for s in range(1, 5)]
    calls = count_calls(monkeypatch, "svd")
    for step in steps:
        metrics.pwcca(step, target), metrics.svcca(step, target), metrics.cca(step, target), metrics.cka(step, target)
    assert calls == {"svd": 1 + 4 * 2}  # the target, and of each step itself and its correlations


def count_calls(monkeypatch: pytest.MonkeyPatch, *names: str) -> dict[str, int]:
    calls = dict.fromkeys(names, 0)

    def counted(name: str, real: Any) -> Any:
        def count(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return real(*args, **kwargs)

        return count

    for name in names:
        monkeypatch.setattr(torch.linalg, name, counted(name, getattr(torch.linalg, name)))
    return calls


def test_release_forgets_and_gives_the_same_numbers_again() -> None:
    for x in (Matrix(normal(0, 20, 6).float()), Matrix.product(normal(0, 20, 3), normal(1, 3, 6))):
        y = normal(2, 20, 5)
        given = set(vars(x))
        before = [
            metrics.gini(x),
            metrics.per(x),
            metrics.pwcca(x, y),
            metrics.rsa(x, y),
            metrics.neighbour_overlap(x, y),
        ]
        assert set(vars(x)) > given
        assert x.release() is x
        assert set(vars(x)) == given
        after = [
            metrics.gini(x),
            metrics.per(x),
            metrics.pwcca(x, y),
            metrics.rsa(x, y),
            metrics.neighbour_overlap(x, y),
        ]
        assert after == before


def test_what_is_measured_is_not_changed() -> None:
    x, y = normal(0, 20, 6), normal(1, 20, 6)
    copies = x.clone(), y.clone()
    for name in set(metrics.METRICS) - {"spectral_alpha"}:
        metric = metrics.METRICS.get(name)
        metric(*(x, y)[: metric.arity], **({"k": 2} if "k" in metric.options else {}))
    assert torch.equal(x, copies[0])
    assert torch.equal(y, copies[1])


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.uint8]
)
def test_any_element_type_is_computed_in_float64(dtype: torch.dtype) -> None:
    x = torch.tensor([[1, 2], [3, 4], [5, 7]]).to(dtype)
    assert Matrix(x).entries.dtype == Matrix(x).singular_values.dtype == torch.float64
    assert metrics.norm(x, norm_type="nuclear") == metrics.norm(x.double(), norm_type="nuclear")


def test_what_can_be_measured() -> None:
    x = normal(0, 4, 3)
    wanted = metrics.per(x)
    read_only = x.numpy().copy()
    read_only.setflags(write=False)
    alike = [
        x.clone().requires_grad_(),
        torch.nn.Parameter(x),
        x.numpy(),
        read_only,
        x.numpy()[::-1, ::-1],
        x.T,
        x.tolist(),
    ]
    for value in alike:
        assert metrics.per(value) == pytest.approx(wanted, rel=1e-12)
    assert metrics.norm(torch.tensor([True, False, True])) == pytest.approx(math.sqrt(2))
    with pytest.raises(TypeError, match=r"complex128 has no metrics here; give its real and imaginary parts"):
        Matrix(x + 1j)
    with pytest.raises(ValueError, match=r"\(4, 3\) times \(4, 3\) is not a product of matrices"):
        Matrix.product(x, x)


def test_a_vector_is_one_row_and_more_dimensions_have_no_spectrum() -> None:
    gains = Matrix(torch.tensor([3.0, 4.0]))
    assert (gains.dimensions, gains.shape, gains.rank, gains.singular_values.tolist()) == ((2,), (1, 2), 1, [5.0])
    assert Matrix(torch.tensor(2.0)).shape == (1, 1)
    solid = Matrix(torch.ones(2, 3, 4))
    assert metrics.norm(solid) == pytest.approx(math.sqrt(24))
    with pytest.raises(Undefined, match=r"^has 3 dimensions \(2, 3, 4\); a matrix has two$"):
        metrics.per(solid)
    assert repr(gains) == "Matrix(2)"
    assert repr(Matrix.product(torch.ones(2, 1), torch.ones(1, 3))) == "Product(2 x 3)"


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([[]], "holds no entries"),
        ([[1.0, math.nan], [math.nan, math.inf]], "holds NaN at 2 of 4 entries"),
        ([[1.0, -math.inf]], "holds infinity at 1 of 2 entries"),
        ([[1e71, 1.0]], "has 1e+71 for its largest entry: beyond what can be squared in float64; rescale it"),
        ([[1e-71, 0.0]], "has 1e-71 for its largest entry: beyond what can be squared in float64; rescale it"),
    ],
)
def test_faults_are_told(entries: list[list[float]], reason: str) -> None:
    x = torch.tensor(entries, dtype=torch.float64)
    assert Matrix(x).fault == reason
    assert Matrix.product(x, torch.ones(x.shape[1], 1)).fault is not None
    assert Matrix(torch.zeros(2, 2)).fault is None
    assert Matrix(torch.full((2, 2), torch.finfo(torch.float32).max)).fault is None
    assert Matrix(torch.full((2, 2), 1e-45)).fault is None


def test_the_points_of_a_product_keep_inner_products_of_rows() -> None:
    product = Matrix.product(normal(0, 10, 3), normal(1, 3, 40))
    assert product.points.shape == (10, 3)
    assert torch.allclose(product.points @ product.points.T, product.dense() @ product.dense().T)
    assert torch.allclose(product.directions.basis_Nd @ product.directions.loadings_dp, Matrix(product.dense()).centred)


@pytest.mark.parametrize(("rows", "columns"), [(20, 6), (6, 20)])
def test_decompositions_give_back_the_matrix(rows: int, columns: int) -> None:
    x = Matrix(normal(0, rows, columns))
    left, right = x.singular_spaces
    assert torch.allclose(left @ x.singular_values.diag() @ right.T, x.dense())
    basis, scales, loadings, _ = x.directions
    assert len(scales) == min(rows - 1, columns)  # centring takes one dimension
    assert torch.allclose(basis @ loadings, x.centred)
    assert torch.allclose(basis.T @ basis, torch.eye(len(scales), dtype=torch.float64), atol=1e-12)
    assert x.gram_norm == pytest.approx(float(x.gram.norm()))
    assert torch.allclose(x.squared_lengths, x.gram.diagonal())


def test_ranks_share_the_mean_of_equal_values() -> None:
    from picolm.analyze.matrix import _ranks

    assert _ranks(torch.tensor([3.0, 1.0, 3.0, 3.0, 2.0])).tolist() == [3.0, 0.0, 3.0, 3.0, 1.0]
    assert _ranks(torch.tensor([0.1 + 0.2, 0.3, 1e-20, 0.0], dtype=torch.float64)).tolist() == [2.5, 2.5, 0.5, 0.5]
    assert _ranks(torch.tensor([7.0])).tolist() == [0.0]
