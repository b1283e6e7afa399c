"""Random matrices that the tests of the metrics share."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def normal() -> Callable[..., Tensor]:
    """A function from a seed and a shape to a float64 tensor of standard normal numbers."""

    def draw(seed: int, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    return draw


@pytest.fixture(scope="session")
def orthogonal(normal: Callable[..., Tensor]) -> Callable[[int, int], Tensor]:
    """A function from a seed and n to a random n x n orthogonal matrix."""

    def draw(seed: int, size: int) -> Tensor:
        return torch.linalg.qr(normal(seed, size, size)).Q

    return draw
