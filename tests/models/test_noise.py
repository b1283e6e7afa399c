"""The noise of a row is the row's own: neither the cut into micro-batches nor the processes have a say."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from picolm.models import Noise

SEEDS = [11, 7, 2**62, 0, 3, 5]


@given(cut=st.integers(1, 5), order=st.permutations(range(6)))
@pytest.mark.parametrize(("draw", "arguments"), [("uniform", (4,)), ("normal", (2, 3)), ("integers", (10, 4))])
def test_rows_get_the_same_numbers_in_any_company(draw: str, arguments: Any, cut: int, order: list[int]) -> None:
    whole = getattr(Noise(SEEDS), draw)(*arguments)
    parts = [Noise([SEEDS[i] for i in order[part]]) for part in (slice(cut), slice(cut, None))]
    assert torch.equal(torch.cat([getattr(part, draw)(*arguments) for part in parts]), whole[list(order)])


def test_draws_go_on_and_have_the_distribution_they_say() -> None:
    noise = Noise(range(100))
    first, second = noise.uniform(100), noise.uniform(100)
    assert not torch.equal(first, second)
    assert 0 <= first.min() < first.max() < 1
    assert abs(first.mean() - 0.5) < 0.02  # standard deviation 0.003
    assert abs(noise.normal(100).std() - 1) < 0.05
    numbers = noise.integers(7, 100)
    assert numbers.dtype == torch.int64
    assert set(numbers.flatten().tolist()) == set(range(7))


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    Noise([1, 2]).normal(5)
    assert torch.equal(torch.get_rng_state(), before)
