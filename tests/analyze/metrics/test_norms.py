"""Theorems of norms and of the distance of two tensors."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from picolm.analyze.matrix import Matrix, Undefined
from picolm.analyze.metrics import cosine, norm, relative_change

few = settings(max_examples=25, deadline=None)
sizes = st.integers(1, 9)
seeds = st.integers(0, 10**6)
NORMS = ("frobenius", "nuclear", "spectral", "inf", "l1")


def test_closed_forms() -> None:
    x = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
    assert [norm(x, norm_type=kind) for kind in NORMS] == pytest.approx([5, 7, 4, 4, 7])
    ones = torch.ones(2, 8)
    assert [norm(ones, norm_type=kind) for kind in NORMS] == pytest.approx([4, 4, 4, 1, 16])
    assert [norm(torch.tensor([3.0, -4.0]), norm_type=kind) for kind in NORMS] == pytest.approx([5, 5, 5, 4, 7])
    assert [norm(torch.zeros(2, 3), norm_type=kind) for kind in NORMS] == [0] * 5
    assert norm(x) == 5  # frobenius is the default


@pytest.mark.parametrize("kind", NORMS)
@few
@given(seed=seeds, m=sizes, n=sizes, scale=st.sampled_from([-1e30, -1.5, 0.0, 1e-30, 7e3]))
def test_they_are_norms(normal: Callable[..., Tensor], kind: str, seed: int, m: int, n: int, scale: float) -> None:
    x, y = normal(seed, m, n), normal(seed + 1, m, n)
    assert norm(scale * x, norm_type=kind) == pytest.approx(abs(scale) * norm(x, norm_type=kind), rel=1e-9, abs=1e-40)
    assert norm(x + y, norm_type=kind) <= norm(x, norm_type=kind) + norm(y, norm_type=kind) + 1e-12


@few
@given(seed=seeds, m=sizes, n=sizes)
def test_other_routes(normal: Callable[..., Tensor], seed: int, m: int, n: int) -> None:
    x = normal(seed, m, n).numpy()
    assert norm(x) == pytest.approx(math.sqrt(np.trace(x.T @ x)))
    roots = np.sqrt(np.clip(np.linalg.eigvalsh(x @ x.T if m <= n else x.T @ x), 0, None))
    assert norm(x, norm_type="nuclear") == pytest.approx(roots.sum(), rel=1e-6)
    assert norm(x, norm_type="spectral") == pytest.approx(roots[-1])
    assert norm(x, norm_type="inf") == max(abs(value) for value in x.flat)
    assert norm(x, norm_type="l1") == pytest.approx(math.fsum(abs(value) for value in x.flat))
    # Norms that depend on the singular values: spectral <= frobenius <= nuclear <= sqrt R frobenius.
    assert norm(x, norm_type="spectral") <= norm(x) + 1e-12 <= norm(x, norm_type="nuclear") + 2e-12
    assert norm(x, norm_type="nuclear") <= math.sqrt(min(m, n)) * norm(x) + 1e-12


def test_cosine_closed_forms() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert cosine(x, 3 * x) == pytest.approx(1)
    assert cosine(x, -x) == pytest.approx(-1)
    assert cosine(x, torch.tensor([[0.0, 2.0], [5.0, 0.0]])) == 0
    assert cosine([3.0, 4.0], [4.0, 3.0]) == pytest.approx(24 / 25)


@few
@given(seed=seeds, m=sizes, n=sizes)
def test_cosine_follows_from_three_norms(normal: Callable[..., Tensor], seed: int, m: int, n: int) -> None:
    x, y = normal(seed, m, n), normal(seed + 1, m, n)
    polarized = (norm(x + y) ** 2 - norm(x - y) ** 2) / (4 * norm(x) * norm(y))
    assert cosine(x, y) == pytest.approx(polarized, abs=1e-12)
    assert cosine(2.5 * x, 1e-3 * y) == pytest.approx(cosine(x, y), abs=1e-12)
    assert -1 <= cosine(x, x) <= 1


@few
@given(seed=seeds, m=sizes, n=sizes, factor=st.integers(-50, 50))
def test_relative_change(normal: Callable[..., Tensor], seed: int, m: int, n: int, factor: int) -> None:
    x, y = normal(seed, m, n), normal(seed + 1, m, n)
    assert relative_change(factor / 8 * y, y) == pytest.approx(abs(factor / 8 - 1), abs=1e-12)
    assert relative_change(x, y) == pytest.approx(relative_change(1e6 * x, 1e6 * y))
    by_cosine = norm(x) ** 2 + norm(y) ** 2 - 2 * norm(x) * norm(y) * cosine(x, y)
    assert relative_change(x, y) == pytest.approx(math.sqrt(by_cosine) / norm(y), rel=1e-6)


def test_relative_change_of_products_that_hardly_differ(normal: Callable[..., Tensor]) -> None:
    left, right = normal(0, 30, 4), normal(1, 4, 20)
    near = Matrix.product(left * (1 + 1e-9), right)
    assert relative_change(near, Matrix.product(left, right)) == pytest.approx(1e-9, rel=1e-5)
    assert relative_change(near, left @ right) == pytest.approx(1e-9, rel=1e-5)


def test_zero_has_no_direction_and_nothing_to_be_relative_to() -> None:
    x, zero = torch.ones(2, 3), torch.zeros(2, 3)
    with pytest.raises(Undefined, match=r"^the second is zero: it has no direction$"):
        cosine(x, zero)
    with pytest.raises(Undefined, match=r"^the first is zero: it has no direction$"):
        cosine(zero, x)
    with pytest.raises(Undefined, match=r"^the second is zero: a change has nothing to be relative to$"):
        relative_change(x, zero)
    assert relative_change(zero, x) == 1
    assert relative_change(x, x) == 0


def test_any_shape_but_the_same(normal: Callable[..., Tensor]) -> None:
    x = normal(0, 2, 3, 4)
    assert cosine(x, x) == pytest.approx(1)
    assert relative_change(x[0, 0], x[0, 0]) == 0
    with pytest.raises(Undefined, match=r"\(2, 3, 4\) against \(6, 4\): relative_change compares tensors of one shape"):
        relative_change(x, x.flatten(0, 1))
