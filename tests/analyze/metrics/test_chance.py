"""Forced correlations and the chance level: what a similarity says of data that have nothing in common."""

import statistics
from typing import Any

import pytest
import torch

from picolm.analyze.matrix import Matrix, Undefined
from picolm.analyze.metrics import METRICS, Metric, cca, cka, cosine, gini, pwcca, subspace_overlap, svcca
from picolm.analyze.permuted import permute
from picolm.seeds import derive

PAIRS = [METRICS.get(name) for name in METRICS if METRICS.get(name).arity == 2]
OPTIONS: dict[str, dict[str, Any]] = {"neighbour_overlap": {"k": 5}, "subspace_overlap": {"k": 3}}
of_pairs = pytest.mark.parametrize("metric", PAIRS, ids=lambda metric: metric.name)


@of_pairs
def test_a_permuted_matrix_is_the_matrix_with_its_rows_permuted(normal: Any, metric: Metric) -> None:
    x, left, right = normal(0, 40, 12), normal(1, 40, 6), normal(2, 6, 12)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    options = OPTIONS.get(metric.name, {})
    for y in (Matrix(normal(4, 40, 12)), Matrix.product(left, right)):
        wanted = metric(x, y.dense()[order], **options)
        assert metric(x, permute(y, order), **options) == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    by_column = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    if metric is subspace_overlap:
        options = {"k": 3, "side": "right"}
    wanted = metric(x, y.dense()[:, by_column], **options)
    assert metric(x, permute(y, by_column, "columns"), **options) == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_chance_is_what_permutations_of_the_second_give(normal: Any) -> None:
    x, y = normal(0, 30, 4), normal(1, 30, 6)
    values = [
        cka(x, y[torch.randperm(30, generator=torch.Generator().manual_seed(derive(0, "chance", draw)))])
        for draw in range(25)
    ]
    mean, std = cka.chance(x, y, draws=25)
    assert mean == pytest.approx(statistics.fmean(values))
    assert std == pytest.approx(statistics.stdev(values))
    assert cka.chance(x, y, draws=25) == (mean, std)
    assert cka.chance(x, y, draws=25, debiased=True).mean < mean


@of_pairs
def test_independent_data_are_at_chance_and_equal_ones_are_not(normal: Any, metric: Metric) -> None:
    x, options = normal(0, 60, 12), OPTIONS.get(metric.name, {})
    for other, far in ((normal(1, 60, 12), False), (x + 0.1 * normal(2, 60, 12), True)):
        mean, std = metric.chance(x, other, draws=40, **options)
        z = (metric(x, other, **options) - mean) / std
        assert (abs(z) > 8) is far
        assert (abs(z) < 4) is not far


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "p", "q"), [(64, 48, 48), (64, 20, 50), (98, 48, 48), (400, 300, 200)])
def test_the_level_of_independent_data_says_little_and_chance_says_so(normal: Any, rows: int, p: int, q: int) -> None:
    x, y = normal(0, rows, p), normal(1, rows, q)
    forced = max(0, p + q - (rows - 1))
    for metric, options in ((cca, {}), (svcca, {"variance": 1.0}), (pwcca, {})):
        value, (mean, std) = metric(x, y, **options), metric.chance(x, y, **options)
        assert metric.forced(x, y, **options) == forced
        correlations = torch.linalg.svdvals(Matrix(x).directions.basis_Nd.mT @ Matrix(y).directions.basis_Nd)
        assert (correlations > 1 - 1e-9).sum() == forced
        assert 0.6 < value < 0.95
        assert abs(value - mean) < 5 * std
    assert cka.forced(x, y) is None


def test_svcca_counts_among_the_directions_that_it_keeps(normal: Any) -> None:
    x = normal(0, 40, 30) * torch.logspace(0, -3, 30, dtype=torch.float64)
    y = normal(1, 40, 30)
    kept = [n for n in range(1, 31) if svcca.forced(x[:, :n], y, variance=1.0) == svcca.forced(x, y)]
    assert svcca.forced(x, y) < svcca.forced(x, y, variance=1.0) == cca.forced(x, y) == 21
    assert kept


def test_of_a_right_side_columns_belong_together(normal: Any) -> None:
    x = normal(0, 20, 30)
    near = x + 0.05 * normal(1, 20, 30)
    for options in ({"k": 2, "side": "left"}, {"k": 2, "side": "right"}):
        mean, std = subspace_overlap.chance(x, near, draws=60, **options)
        assert std > 0.01
        assert mean == pytest.approx(2 / (20 if options["side"] == "left" else 30), abs=0.05)
    gains = normal(2, 50)
    assert abs(cosine.chance(gains, gains).mean) < 0.3  # the entries of a vector are permuted


def test_a_chance_level_that_cannot_be(normal: Any) -> None:
    x = normal(0, 20, 3)
    with pytest.raises(ValueError, match=r"1 permutation\(s\) have no standard deviation"):
        cka.chance(x, x, draws=1)
    with pytest.raises(TypeError, match="gini is a metric of 1 tensor, given 2"):
        gini.chance(x, x)
    with pytest.raises(Undefined, match="the second holds NaN"):
        cka.chance(x, x * float("nan"))
