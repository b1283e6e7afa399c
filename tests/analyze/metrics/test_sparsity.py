"""Theorems of the entries: closed forms, what changes nothing, other routes to the same number, and the edges."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from picolm.analyze.matrix import Undefined
from picolm.analyze.metrics import Metric, gini, hoyer, kurtosis, near_zero_fraction

few = settings(max_examples=40, deadline=None)
vectors = st.lists(st.floats(-1e6, 1e6).map(lambda value: round(value, 3)), min_size=2, max_size=40).filter(
    lambda values: len({abs(value) for value in values}) > 1 and len(set(values)) > 1
)
ENTRIES = [gini, hoyer, kurtosis, near_zero_fraction]


def test_closed_forms() -> None:
    assert gini([1.0, 2.0, 3.0]) == pytest.approx(2 / 9)
    assert gini([0.0, 0.0, -7.0, 0.0]) == pytest.approx(1 - 1 / 4)
    assert hoyer([3.0, 4.0]) == pytest.approx((math.sqrt(2) - 7 / 5) / (math.sqrt(2) - 1))
    assert hoyer([0.0, 0.0, -7.0, 0.0]) == 1
    assert kurtosis([-1.0, 1.0, 1.0, -1.0]) == 1
    assert kurtosis(torch.arange(10)) == pytest.approx(3 - 6 * (10**2 + 1) / (5 * (10**2 - 1)))
    assert near_zero_fraction([1e-4, -1e-4, 1e-3, 0.0, 0.5, -1.0]) == 3 / 6  # below, strictly
    assert near_zero_fraction([0.1, 0.4, 1.0, 2.0], eps=0.25) == 2 / 4


@pytest.mark.parametrize("metric", ENTRIES, ids=lambda metric: metric.name)
@few
@given(values=vectors, scale=st.sampled_from([2.0, -0.5, 1024.0, 2.0**-40]), seed=st.integers(0, 1000))
def test_scale_order_and_shape_change_nothing(metric: Metric, values: list[float], scale: float, seed: int) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    wanted = metric(x)
    shuffled = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))]
    for alike in (scale * x, shuffled, x[:, None], x[None, None, :]):
        assert metric(alike) == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    repeated = {gini: wanted, kurtosis: wanted, near_zero_fraction: wanted}.get(metric)
    if repeated is not None:  # they are of the distribution of entries; hoyer grows with their number
        assert metric(torch.cat([x, x, x])) == pytest.approx(repeated, rel=1e-9, abs=1e-12)


@few
@given(values=vectors)
def test_signs_change_no_sparsity(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    for metric in (gini, hoyer, near_zero_fraction):
        assert metric(x.abs()) == metric(x)


@few
@given(values=vectors)
def test_other_routes(values: list[float]) -> None:
    x = np.array(values)
    magnitudes, n = np.abs(x), len(x)
    differences = np.abs(magnitudes[:, None] - magnitudes[None, :])
    assert gini(x) == pytest.approx(differences.mean() / (2 * magnitudes.mean()), abs=1e-12)
    fullness = magnitudes.mean() / math.sqrt((x**2).mean())  # l1 / l2 = sqrt n times this
    assert hoyer(x) == pytest.approx((1 - fullness) * math.sqrt(n) / (math.sqrt(n) - 1), abs=1e-9)
    y = x / np.abs(x).max()
    m1, m2, m3, m4 = ((y**power).mean() for power in range(1, 5))
    if m2 - m1**2 > 1e-3:  # elsewhere the raw moments cancel
        raw = (m4 - 4 * m3 * m1 + 6 * m2 * m1**2 - 3 * m1**4) / (m2 - m1**2) ** 2
        assert kurtosis(x) == pytest.approx(raw, rel=1e-6)
    assert near_zero_fraction(x, eps=0.5) == sum(2 * abs(v) < max(map(abs, values)) for v in values) / n


@few
@given(values=vectors)
def test_bounds(values: list[float]) -> None:
    n = len(values)
    assert 0 <= gini(values) <= 1 - 1 / n + 1e-12
    assert 0 <= hoyer(values) <= 1
    assert 1 - 1e-12 <= kurtosis(values) <= n
    assert 0 <= near_zero_fraction(values) <= 1 - 1 / n


def test_kurtosis_is_not_moved_by_a_shift(normal: Callable[..., Tensor]) -> None:
    x = normal(0, 100, 1000)
    assert kurtosis(x + 50) == pytest.approx(kurtosis(x), rel=1e-9)
    assert kurtosis(x) == pytest.approx(3, abs=0.05)  # normal entries: 3, not 0


def test_gini_of_normal_entries_is_that_of_their_distribution(normal: Callable[..., Tensor]) -> None:
    assert gini(normal(0, 300, 1000)) == pytest.approx(math.sqrt(2) - 1, abs=1e-3)  # of the half-normal distribution


@pytest.mark.parametrize("shape", [(1,), (1, 5), (4, 3)])
def test_zero_and_constant(shape: tuple[int, ...]) -> None:
    zero, constant = torch.zeros(shape), torch.full(shape, -0.1)
    assert gini(zero) == 0
    assert gini(constant) == pytest.approx(0, abs=1e-15)
    assert near_zero_fraction(zero) == 1
    assert near_zero_fraction(constant) == 0
    for flat in (zero, constant):
        with pytest.raises(Undefined, match=r"^all entries are equal: they have no spread$"):
            kurtosis(flat)
    single = "has a single entry: it is neither sparse nor dense"
    with pytest.raises(Undefined, match=single if shape == (1,) else r"^is zero: the ratio of its norms is 0 / 0$"):
        hoyer(zero)
    if shape != (1,):
        assert hoyer(constant) == pytest.approx(0, abs=1e-12)


def test_a_product_is_formed_for_its_entries(normal: Callable[..., Tensor]) -> None:
    column, row = normal(0, 6, 1), normal(1, 1, 9)
    assert gini(column @ row) > max(gini(column), gini(row))
