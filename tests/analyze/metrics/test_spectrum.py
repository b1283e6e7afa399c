"""Theorems of the singular values: closed forms, what changes nothing, other routes to the same number, and the edges."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from picolm.analyze.matrix import Matrix, Undefined
from picolm.analyze.metrics import (
    Metric,
    condition_number,
    effective_rank,
    participation_ratio,
    per,
    spectral_alpha,
    stable_rank,
)

few = settings(max_examples=25, deadline=None)
sizes = st.integers(1, 12)
seeds = st.integers(0, 10**6)
SPECTRUM = [effective_rank, per, stable_rank, participation_ratio, condition_number]
OF_DIAGONAL = {  # of diag(2, 1, 1), by hand
    effective_rank: 2 * math.sqrt(2),  # p = 1/2, 1/4, 1/4: entropy 3/2 ln 2
    per: 2 * math.sqrt(2) / 3,
    stable_rank: 6 / 4,
    participation_ratio: 36 / 18,
    condition_number: 2.0,
}


@pytest.mark.parametrize("metric", SPECTRUM, ids=lambda metric: metric.name)
def test_closed_forms(metric: Metric) -> None:
    assert metric(torch.diag(torch.tensor([1.0, 2.0, 1.0]))) == pytest.approx(OF_DIAGONAL[metric])
    flat = 1.0 if metric in (per, condition_number) else 7.0
    assert metric(torch.eye(7)) == pytest.approx(flat)


@pytest.mark.parametrize("metric", SPECTRUM, ids=lambda metric: metric.name)
@few
@given(seed=seeds, m=sizes, n=sizes, scale=st.floats(1e-30, 1e30))
def test_rotation_scale_and_transposition_change_nothing(
    normal: Callable[..., Tensor],
    orthogonal: Callable[..., Tensor],
    metric: Metric,
    seed: int,
    m: int,
    n: int,
    scale: float,
) -> None:
    x = normal(seed, m, n)
    turned = orthogonal(seed + 1, m) @ x @ orthogonal(seed + 2, n)
    for alike in (turned, -x * scale, x.T, x.flip(0)):
        assert metric(alike) == pytest.approx(metric(x), rel=1e-8)


@few
@given(seed=seeds, m=sizes, n=sizes)
def test_bounds(normal: Callable[..., Tensor], seed: int, m: int, n: int) -> None:
    x, rank = normal(seed, m, n), min(m, n)
    rounding = 1e-12
    assert 1 - rounding <= stable_rank(x) <= participation_ratio(x) + rounding
    assert participation_ratio(x) <= effective_rank(x) + rounding  # Rényi entropies fall with their order
    assert effective_rank(x) <= rank
    assert 1 / rank - rounding <= per(x) <= 1
    assert condition_number(x) >= 1


@few
@given(seed=seeds, m=sizes, n=sizes)
def test_other_routes(normal: Callable[..., Tensor], seed: int, m: int, n: int) -> None:
    x = normal(seed, m, n).numpy()
    gram = x @ x.T if m <= n else x.T @ x
    values = np.sqrt(np.clip(np.linalg.eigvalsh(gram), 0, None))
    shares = values / values.sum()
    entropy = -sum(p * math.log(p) for p in shares if p > 0)
    assert effective_rank(x) == pytest.approx(math.exp(entropy), rel=1e-6)
    assert per(x) == pytest.approx(math.exp(entropy) / min(m, n), rel=1e-6)
    assert stable_rank(x) == pytest.approx(np.trace(gram) / np.linalg.eigvalsh(gram)[-1])
    assert participation_ratio(x) == pytest.approx(np.trace(gram) ** 2 / np.trace(gram @ gram))
    assert condition_number(x) == pytest.approx(np.linalg.norm(x, 2) * np.linalg.norm(np.linalg.pinv(x), 2), rel=1e-6)


@pytest.mark.parametrize("shape", [(5, 5), (3, 8), (8, 3)])
def test_a_matrix_of_rank_one_has_rank_one(normal: Callable[..., Tensor], shape: tuple[int, int]) -> None:
    x = torch.outer(normal(0, shape[0]), normal(1, shape[1]))
    assert effective_rank(x) == pytest.approx(1)
    assert per(x) == pytest.approx(1 / min(shape))
    assert stable_rank(x) == pytest.approx(1)
    assert participation_ratio(x) == pytest.approx(1)
    assert condition_number(x) == math.inf


@pytest.mark.parametrize("x", [[[3.0, 4.0]], [[3.0], [4.0]], [3.0, 4.0], [[5.0]]])
def test_a_vector_has_one_singular_value(x: Any) -> None:
    assert [metric(x) for metric in SPECTRUM] == [1.0] * 5
    assert Matrix(x).singular_values.tolist() == pytest.approx([5.0])


def test_zero_and_constant() -> None:
    for metric in set(SPECTRUM) - {condition_number}:
        with pytest.raises(Undefined, match=r"^is zero: all singular values are 0$"):
            metric(torch.zeros(3, 4))
        assert metric(torch.full((3, 4), 0.1)) == pytest.approx(1 / 3 if metric is per else 1)
    assert condition_number(torch.zeros(3, 4)) == condition_number(torch.full((3, 4), 0.1)) == math.inf


def test_an_exact_zero_among_the_singular_values_is_no_nan() -> None:
    x = torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert effective_rank(x) == pytest.approx(2)
    assert per(x) == pytest.approx(0.5)
    assert condition_number(x) == math.inf


def test_a_small_condition_is_told_from_a_singular_matrix() -> None:
    assert condition_number(torch.diag(torch.tensor([1.0, 1e-13], dtype=torch.float64))) == pytest.approx(1e13)
    assert condition_number(torch.diag(torch.tensor([1.0, 1e-16], dtype=torch.float64))) == math.inf


@pytest.mark.parametrize(("k", "tail_index"), [(50, 0.7), (120, 2.5)])
def test_hill_of_an_exact_power_law(orthogonal: Callable[..., Tensor], k: int, tail_index: float) -> None:
    """With lambda_i = i^(-1/a): sum_{i<=k} ln(lambda_i / lambda_{k+1}) = (k ln(k+1) - ln k!) / a."""
    eigenvalues = torch.arange(1, 161, dtype=torch.float64) ** (-1 / tail_index)
    x = orthogonal(0, 160) @ eigenvalues.sqrt().diag() @ orthogonal(1, 160)
    wanted = 1 + k * tail_index / (k * math.log(k + 1) - math.lgamma(k + 1))
    assert spectral_alpha(x, k=k) == pytest.approx(wanted, rel=1e-9)
    assert spectral_alpha(1e-9 * x.T, k=k) == pytest.approx(wanted, rel=1e-9)
    assert wanted == pytest.approx(1 + tail_index, rel=0.1)  # the exponent of the density, as the sample grows


def test_hill_is_the_most_likely_exponent(normal: Callable[..., Tensor]) -> None:
    """The density (a - 1)/b (t/b)^-a above the border b has its greatest likelihood at a = spectral_alpha."""
    x, k = normal(0, 90, 120), 60
    eigenvalues = np.linalg.eigvalsh((x @ x.T).numpy())[::-1]
    logs = np.log(eigenvalues[:k] / eigenvalues[k])

    def likelihood(alpha: float) -> float:
        return float(k * math.log(alpha - 1) - alpha * logs.sum())

    alpha = spectral_alpha(x, k=k)
    assert likelihood(alpha) > max(likelihood(alpha - 1e-4), likelihood(alpha + 1e-4))


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.ones(50, 60), "has 50 singular values; a fit on the 50 largest takes 51"),
        (torch.zeros(60, 60), "is zero: all singular values are 0"),
        (torch.ones(60, 60), "singular value 51 is 0 or rounding of the stored type: the 50 largest have no border"),
        (torch.eye(60), "the 51 largest singular values are equal: there is no tail to fit"),
    ],
)
def test_where_hill_has_nothing_to_fit(x: Tensor, reason: str) -> None:
    with pytest.raises(Undefined) as error:
        spectral_alpha(x, k=50)
    assert str(error.value) == reason
