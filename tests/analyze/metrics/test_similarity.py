"""Theorems of the comparison of two representations.

h_1 … h_7 are the columns of a Hadamard matrix but for the constant one: centred, orthogonal and of length sqrt 8.
"""

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from picolm.analyze.matrix import Undefined
from picolm.analyze.metrics import (
    METRICS,
    Metric,
    cca,
    cka,
    neighbour_overlap,
    procrustes,
    pwcca,
    rsa,
    subspace_overlap,
    svcca,
)

few = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 10**6)
widths = st.integers(2, 9)
two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
H = torch.kron(torch.kron(two, two), two)
ANGLE = 0.7
TURNED = math.cos(ANGLE) * H[:, 2] + math.sin(ANGLE) * H[:, 3]  # ANGLE from h_2, across h_1
CANONICAL = (cca, svcca, pwcca)
ROWS = [METRICS.get(name) for name in METRICS if METRICS.get(name).needs == "rows"]


def columns(*which: Tensor) -> Tensor:
    return torch.stack(which, dim=1)


def centred(x: Tensor) -> np.ndarray:
    return (x - x.mean(0)).numpy()


def test_cka_closed_forms() -> None:
    x = columns(H[:, 1], H[:, 2])
    assert cka(x, columns(H[:, 1], H[:, 3])) == pytest.approx(1 / 2)  # 1 of 2 directions: 1 / (sqrt 2 sqrt 2)
    assert cka(x, columns(H[:, 3], H[:, 4])) == pytest.approx(0)
    assert cka(x, columns(H[:, 1], TURNED)) == pytest.approx((1 + math.cos(ANGLE) ** 2) / 2)
    assert cka(columns(H[:, 1]), columns(H[:, 1], H[:, 2], H[:, 3])) == pytest.approx(1 / math.sqrt(3))
    assert cka(x, 5 * x + 3) == pytest.approx(1)


def test_canonical_correlations_closed_forms() -> None:
    x = columns(H[:, 1], H[:, 2])
    assert cca(x, columns(H[:, 1], H[:, 3])) == pytest.approx(1 / 2)
    assert cca(x, columns(H[:, 1] + TURNED, TURNED)) == pytest.approx((1 + math.cos(ANGLE)) / 2)
    assert cca(columns(H[:, 2]), columns(H[:, 1], TURNED)) == pytest.approx(math.cos(ANGLE))
    faint = columns(10 * H[:, 1], 0.1 * H[:, 2])  # 0.01 % of the variance
    assert svcca(faint, columns(H[:, 1], H[:, 3])) == pytest.approx(1)
    assert svcca(faint, columns(H[:, 1], H[:, 3]), variance=1.0) == pytest.approx(1 / 2)
    assert svcca(faint, columns(H[:, 1], H[:, 3]), variance=0.9998) == pytest.approx(1)
    assert svcca(faint, columns(H[:, 1], H[:, 3]), variance=0.99991) == pytest.approx(1 / 2)


def test_pwcca_weighs_by_the_side_with_fewer_dimensions_on_either_side() -> None:
    """Columns 3 h_1 and 2 h_2 against a space with h_1 and a direction at ANGLE from h_2: weights 3 and 2."""
    small = columns(3 * H[:, 1], 2 * H[:, 2])
    large = columns(H[:, 1] + H[:, 5], TURNED - H[:, 4], H[:, 5], H[:, 4])
    wanted = (3 + 2 * math.cos(ANGLE)) / 5
    assert pwcca(small, large) == pytest.approx(wanted)
    assert pwcca(large, small) == pytest.approx(wanted)


def test_pwcca_counts_dimensions_of_the_space_not_columns() -> None:
    small = columns(3 * H[:, 1], 2 * H[:, 2])
    padded = columns(3 * H[:, 1], 2 * H[:, 2], *[torch.zeros(8)] * 3)
    large = columns(H[:, 1], TURNED, H[:, 4], H[:, 5])
    assert pwcca(padded, large) == pytest.approx(pwcca(small, large))
    assert pwcca(large, padded) == pytest.approx(pwcca(small, large))


def test_pwcca_of_equal_widths_weighs_by_the_first() -> None:
    x, y = columns(3 * H[:, 1], 2 * H[:, 2]), columns(H[:, 1], TURNED)
    assert pwcca(x, y) == pytest.approx((3 + 2 * math.cos(ANGLE)) / 5)
    assert pwcca(y, x) == pytest.approx((1 + math.cos(ANGLE)) / 2)


def test_procrustes_closed_forms() -> None:
    x = columns(H[:, 1], H[:, 2])
    assert procrustes(x, columns(H[:, 1], H[:, 3])) == pytest.approx(math.pi / 3)
    assert procrustes(x, columns(H[:, 1], H[:, 3]), form="distance") == pytest.approx(1)
    assert procrustes(x, columns(H[:, 3], H[:, 4])) == pytest.approx(math.pi / 2)
    assert procrustes(columns(H[:, 1]), x) == pytest.approx(math.pi / 4)  # the narrow one is filled up with zeros


def test_rank_correlation_closed_forms() -> None:
    # Distances of (0, 1, 3): 1, 3, 2; of (0, 4, 5): 4, 5, 1. Ranks 1, 3, 2 and 2, 3, 1: 1 - 6 (1 + 0 + 1) / (3 * 8).
    assert rsa([[0.0], [1.0], [3.0]], [[0.0], [4.0], [5.0]]) == pytest.approx(1 / 2)
    # Distances of (0, 1, 2): 1, 2, 1, ranks 1.5, 3, 1.5, against 1, 3, 2.
    assert rsa([[0.0], [1.0], [2.0]], [[0.0], [1.0], [3.0]]) == pytest.approx(math.sqrt(3) / 2)


def test_neighbours_closed_form() -> None:
    """Rows at the corners of a flat rectangle: the nearest is across the short side, then comes the one across the long side."""
    x = [[1.0, 0.1], [1.0, -0.1], [-1.0, 0.1], [-1.0, -0.1]]
    assert neighbour_overlap(x, [x[0], x[2], x[1], x[3]], k=1) == 0
    y = [x[0], x[1], x[3], x[2]]
    assert neighbour_overlap(x, y, k=1) == 1
    assert neighbour_overlap(x, y, k=2) == pytest.approx(1 / 3)  # one of two neighbours in common, three in all


def test_subspaces_closed_form() -> None:
    x = torch.diag(torch.tensor([5.0, 4.0, 1.0, 0.5]))
    turned = torch.eye(4)
    turned[1:3, 1:3] = torch.tensor([[math.cos(ANGLE), -math.sin(ANGLE)], [math.sin(ANGLE), math.cos(ANGLE)]])
    for side, y in (("left", turned @ x), ("right", x @ turned.T)):
        assert subspace_overlap(x, y, k=2, side=side) == pytest.approx((1 + math.cos(ANGLE) ** 2) / 2)
        assert subspace_overlap(x, y, k=1, side=side) == subspace_overlap(x, y, k=4, side=side) == pytest.approx(1)
    assert subspace_overlap(x, turned @ x, k=2, side="right") == pytest.approx(1)


@pytest.mark.parametrize("metric", ROWS, ids=lambda metric: metric.name)
@few
@given(seed=seeds, rows=st.integers(6, 24), p=widths, q=widths, scale=st.floats(1e-12, 1e12))
def test_what_changes_nothing(
    normal: Any, orthogonal: Any, metric: Metric, seed: int, rows: int, p: int, q: int, scale: float
) -> None:
    """Shift, scale and order of rows on both sides; rotation on both, but of the side that pwcca weighs by."""
    if metric in CANONICAL:
        assume(max(p, q) < rows - 1)
    x, y = normal(seed, rows, p), normal(seed + 1, rows, q)
    options = {"k": 2} if metric is neighbour_overlap else {}
    wanted = pytest.approx(metric(x, y, **options), rel=1e-7, abs=1e-7)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    assert metric(x + normal(seed + 2, p), scale * y, **options) == wanted
    assert metric(x[order], y[order], **options) == wanted
    assert metric(x, -y, **options) == wanted
    turned_x, turned_y = x @ orthogonal(seed + 3, p), y @ orthogonal(seed + 4, q)
    if metric is not pwcca:
        assert metric(turned_x, turned_y, **options) == wanted
    elif min(p, rows - 1) != min(q, rows - 1):
        assert metric(*((x, turned_y) if p < q else (turned_x, y))) == wanted


@few
@given(seed=seeds, rows=st.integers(6, 24), p=widths, q=widths)
def test_an_invertible_map_changes_no_canonical_correlation(normal: Any, seed: int, rows: int, p: int, q: int) -> None:
    assume(max(p, q) < rows - 1)
    x, y = normal(seed, rows, p), normal(seed + 1, rows, q)
    mapped = x @ (torch.eye(p) * 3 + normal(seed + 2, p, p).tanh())
    assert cca(mapped, y) == pytest.approx(cca(x, y), abs=1e-6)
    if p > q:
        assert pwcca(mapped, y) == pytest.approx(pwcca(x, y), abs=1e-6)
    assert svcca(x, y, variance=1) == pytest.approx(cca(x, y), abs=1e-12)


@few
@given(seed=seeds, rows=st.integers(4, 24), p=widths, q=widths)
def test_cka_by_its_kernels(normal: Any, seed: int, rows: int, p: int, q: int) -> None:
    """HSIC = tr(K H L H); debiased as in the definition, from Gram matrices of rows that are not centred."""
    x, y = normal(seed, rows, p) + 0.5, normal(seed + 1, rows, q) - 0.2
    k, l = (x @ x.T).numpy(), (y @ y.T).numpy()  # noqa: E741
    h = np.eye(rows) - 1 / rows

    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.trace(a @ h @ b @ h))

    def debiased(a: np.ndarray, b: np.ndarray) -> float:
        a, b = a - np.diag(a.diagonal()), b - np.diag(b.diagonal())
        ones, n = np.ones(rows), rows
        whole = (ones @ a @ ones) * (ones @ b @ ones) / ((n - 1) * (n - 2))
        return float((np.trace(a @ b) + whole - 2 / (n - 2) * ones @ a @ b @ ones) / (n * (n - 3)))

    assert cka(x, y) == pytest.approx(hsic(k, l) / math.sqrt(hsic(k, k) * hsic(l, l)), abs=1e-10)
    wanted = debiased(k, l) / math.sqrt(debiased(k, k) * debiased(l, l))
    assert cka(x, y, debiased=True) == pytest.approx(wanted, abs=1e-7)


@pytest.mark.parametrize(("rows", "p", "q"), [(10, 30, 4), (10, 9, 9), (30, 5, 12), (12, 12, 13)])
def test_both_routes_to_cka_agree(normal: Any, rows: int, p: int, q: int) -> None:
    x, y = centred(normal(0, rows, p)), centred(normal(1, rows, q))
    norm = np.linalg.norm
    by_features = norm(y.T @ x) ** 2 / (norm(x.T @ x) * norm(y.T @ y))
    by_rows = ((x @ x.T) * (y @ y.T)).sum() / (norm(x @ x.T) * norm(y @ y.T))
    assert by_features == pytest.approx(by_rows, rel=1e-12)
    assert cka(x, y) == pytest.approx(by_rows, rel=1e-12)


def test_debiased_cka_of_independent_data_is_near_zero(normal: Any) -> None:
    pairs = [(normal(2 * seed, 60, 60), normal(2 * seed + 1, 60, 60)) for seed in range(40)]
    assert min(cka(x, y) for x, y in pairs) > 0.4
    values = [cka(x, y, debiased=True) for x, y in pairs]
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(40)
    assert np.std(values) < 0.03
    x = pairs[0][0]
    assert cka(x, x[:, :40], debiased=True) > 0.5


@few
@given(seed=seeds, p=widths, q=widths)
def test_canonical_correlations_by_eigenvalues(normal: Any, seed: int, p: int, q: int) -> None:
    """Squared correlations are eigenvalues of Cxx^-1/2 Cxy Cyy^-1 Cyx Cxx^-1/2, and h_i = X Cxx^-1/2 u_i."""
    x, y = centred(normal(seed, 30, p)), centred(normal(seed + 1, 30, q))
    if p > q:
        x, y = y, x
    values, vectors = np.linalg.eigh(x.T @ x)
    whiten = vectors @ np.diag(values**-0.5) @ vectors.T
    correlated = whiten @ x.T @ y @ np.linalg.solve(y.T @ y, y.T @ x) @ whiten
    squares, directions = np.linalg.eigh(correlated)
    correlations = np.sqrt(np.clip(squares, 0, 1))
    weights = np.abs((x @ whiten @ directions).T @ x).sum(1)
    assert cca(x, y) == pytest.approx(correlations.mean(), abs=1e-6)
    assert pwcca(x, y) == pytest.approx(weights @ correlations / weights.sum(), abs=1e-6)


@few
@given(seed=seeds, rows=st.integers(4, 24), p=widths, q=widths)
def test_procrustes_by_the_rotation_itself(normal: Any, seed: int, rows: int, p: int, q: int) -> None:
    x, y = centred(normal(seed, rows, p)), centred(normal(seed + 1, rows, q))
    width = max(p, q)
    x, y = (np.pad(side / np.linalg.norm(side), ((0, 0), (0, width - side.shape[1]))) for side in (x, y))
    left, _, right = np.linalg.svd(y.T @ x)
    distance = np.linalg.norm(x - y @ left @ right)
    assert procrustes(x, y, form="distance") == pytest.approx(distance, abs=1e-7)
    assert procrustes(x, y) == pytest.approx(2 * math.asin(distance / 2), abs=1e-7)


@few
@given(seed=seeds, rows=st.integers(4, 12), p=widths, q=widths)
def test_rsa_by_counting(normal: Any, seed: int, rows: int, p: int, q: int) -> None:
    x, y = normal(seed, rows, p).round(), normal(seed + 1, rows, q).round()  # whole numbers: there are ties

    def ranks(points: Tensor) -> list[float]:
        squares = [round(float((points[i] - points[j]).square().sum())) for i, j in combinations(range(rows), 2)]
        return [sum(a < b for a in squares) + (sum(a == b for a in squares) - 1) / 2 for b in squares]

    first, second = ranks(x), ranks(y)
    if min(len(set(first)), len(set(second))) > 1:
        assert rsa(x, y) == pytest.approx(np.corrcoef(first, second)[0, 1], abs=1e-9)


@few
@given(seed=seeds, rows=st.integers(4, 20), p=widths, q=widths, k=st.integers(1, 3))
def test_neighbours_by_sets(normal: Any, seed: int, rows: int, p: int, q: int, k: int) -> None:
    x, y = normal(seed, rows, p), normal(seed + 1, rows, q)

    def nearest(points: np.ndarray, i: int) -> set[int]:
        cosine = lambda j: points[i] @ points[j] / np.linalg.norm(points[i]) / np.linalg.norm(points[j])  # noqa: E731
        return set(sorted(set(range(rows)) - {i}, key=cosine)[-k:])

    shares = []
    for i in range(rows):
        first, second = nearest(centred(x), i), nearest(centred(y), i)
        shares.append(len(first & second) / len(first | second))
    assert neighbour_overlap(x, y, k=k) == pytest.approx(np.mean(shares))


def test_neighbours_as_near_as_the_last_all_count() -> None:
    """Rows 1, 2 and 3 are the same: whichever order they stand in, they are neighbours of each other."""
    x = torch.tensor([[5.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [-4.0, 1.0]])
    y = torch.tensor([[1.0, 0.0], [1.0, 2.0], [2.0, 1.0], [0.0, 3.0], [-4.0, 1.0]])
    values = {neighbour_overlap(x[order], y[order], k=1) for order in map(list, ([0, 1, 2, 3, 4], [3, 4, 1, 2, 0]))}
    assert len(values) == 1
    assert neighbour_overlap(x, x, k=1) == 1


@few
@given(seed=seeds, m=st.integers(4, 9), n=st.integers(4, 9), k=st.integers(1, 4))
def test_subspaces_by_projectors(normal: Any, orthogonal: Any, seed: int, m: int, n: int, k: int) -> None:
    """Mean squared cosine = tr(P Q) / k, with P and Q from the eigenvectors of W W'."""
    x, y = normal(seed, m, n), normal(seed + 1, m, n + 2)

    def projector(w: Tensor) -> np.ndarray:
        top = np.linalg.eigh((w @ w.T).numpy())[1][:, -k:]
        return top @ top.T

    overlap = subspace_overlap(x, y, k=k)
    assert overlap == pytest.approx(np.trace(projector(x) @ projector(y)) / k, abs=1e-6)
    assert subspace_overlap(x.T, y.T, k=k, side="right") == pytest.approx(overlap, abs=1e-9)
    turn = orthogonal(seed + 2, m)
    assert subspace_overlap(3 * turn @ x, turn @ y, k=k) == pytest.approx(overlap, abs=1e-6)


@pytest.mark.parametrize(("rows", "p", "q"), [(10, 12, 12), (10, 9, 9), (10, 30, 4), (10, 9, 2), (6, 5, 40)])
def test_with_as_many_columns_as_rows_every_correlation_is_one_and_says_nothing(
    normal: Any, rows: int, p: int, q: int
) -> None:
    x, y = normal(0, rows, p), normal(1, rows, q)
    for first, second in ((x, y), (y, x)):
        for metric in CANONICAL:
            options = {"variance": 1.0} if metric is svcca else {}
            with pytest.raises(
                Undefined, match=rf"^the (first|second) has rank {rows - 1}, which is all that {rows} centred"
            ):
                metric(first, second, **options)
            assert metric.forced(first, second, **options) == min(p, rows - 1) + min(q, rows - 1) - (rows - 1)
        assert cka(first, second) < 0.95  # cka is not blind there, nor is procrustes
        assert procrustes(first, second) > 0.3


@pytest.mark.parametrize(("rows", "p", "q"), [(16, 9, 12), (16, 12, 9), (64, 48, 48)])
def test_tied_variates_have_the_weight_of_all_their_bases(
    normal: Any, orthogonal: Any, rows: int, p: int, q: int
) -> None:
    """With p + q > N - 1 some correlations are 1 by construction; a routine may return any basis of their span."""
    x, y = normal(0, rows, p), normal(1, rows, q)
    value = pwcca(x, y)
    turned = pwcca(x, y @ orthogonal(2, q)) if p <= q else pwcca(x @ orthogonal(2, p), y)
    assert turned == pytest.approx(value, rel=1e-10)

    small, large = (centred(side) for side in ((x, y) if p <= q else (y, x)))
    bases = np.linalg.qr(small)[0], np.linalg.qr(large)[0]
    variates, correlations, _ = np.linalg.svd(bases[0].T @ bases[1])
    tied = p + q - (rows - 1)
    assert (correlations > 1 - 1e-9).sum() == tied
    projections = variates.T @ bases[0].T @ small
    totals = [np.abs(orthogonal(seed, tied).numpy().T @ projections[:tied]).sum() for seed in range(400)]
    rest = np.abs(projections[tied:]).sum(1)
    wanted = (np.mean(totals) + rest @ correlations[tied:]) / (np.mean(totals) + rest.sum())
    assert value == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("metric", ROWS, ids=lambda metric: metric.name)
def test_edges(normal: Any, metric: Metric) -> None:
    x = normal(0, 12, 3)
    for flat in (torch.zeros(12, 4), torch.full((12, 4), 0.1), torch.arange(4.0).repeat(12, 1) / 7):
        with pytest.raises(Undefined, match=r"^all rows are equal: nothing is left after centring$"):
            metric(x, flat)
    with pytest.raises(Undefined, match=r"^has 1 row; activations are rows"):
        metric(x[:1], x[:1])
    with pytest.raises(Undefined, match=r"^12 rows against 4: "):
        metric(x, normal(1, 4, 12))
    wide = normal(2, 12, 50)
    if metric not in CANONICAL:
        assert math.isfinite(metric(x, wide))
    rank_one = torch.outer(normal(3, 12), normal(4, 5))
    assert 0 <= abs(metric(rank_one, x)) <= math.pi / 2
    perfect = 0.0 if metric is procrustes else 1.0
    if metric is not neighbour_overlap:  # on a line all rows of one side are neighbours
        assert metric(rank_one, rank_one[:, :1]) == pytest.approx(perfect, abs=1e-7)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda x: cka(x[:3], x[:3], debiased=True), "has 3 rows; debiased cka takes 4 at least"),
        (
            lambda x: cka(torch.eye(12), x, debiased=True),
            "rows are equally far apart: nothing is left of their similarities after debiasing",
        ),
        (lambda x: rsa(torch.eye(12), x), "all pairs of rows are equally far apart: their distances have no order"),
        (lambda x: rsa(x[:2], x[:2]), "all pairs of rows are equally far apart: their distances have no order"),
        (lambda x: neighbour_overlap(x[:10], x[:10]), "has 10 rows; 10 neighbours of a row take 11 at least"),
        (
            lambda x: neighbour_overlap(x, [*[[1.0, 1.0], [-1.0, -1.0]] * 5, [0.0, 0.0], [0.0, 0.0]], k=1),
            "row 10 is the mean of all rows: it has no direction",
        ),
        (lambda x: subspace_overlap(x, x), "has rank 3: there are no 10 top singular vectors"),
        (lambda x: subspace_overlap(x, x[:5], k=1), "12 rows against 5: left singular vectors take equal numbers"),
        (
            lambda x: subspace_overlap(x, x[:, :2], k=1, side="right"),
            "3 columns against 2: right singular vectors take equal numbers",
        ),
        (
            lambda x: subspace_overlap(torch.eye(4), torch.eye(4), k=2),
            "singular values 2 and 3 are equal: no 2 singular vectors are the top ones",
        ),
        (lambda x: subspace_overlap(torch.zeros(4, 4), x[:4], k=1), "has rank 0: there are no 1 top singular vectors"),
    ],
)
def test_no_value_has_a_reason(normal: Any, call: Callable[[Tensor], float], reason: str) -> None:
    with pytest.raises(Undefined) as error:
        call(normal(0, 12, 3))
    assert str(error.value) == reason
