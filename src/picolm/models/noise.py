"""Random numbers for a model's objective: masks, noise levels, dropout of its own.

Each row of a batch has a generator of its own, seeded by the step and the row's place in the batch of all processes. So a
row gets the same numbers however the batch is cut into micro-batches and shared out over processes, and on any device: they
are drawn on the CPU.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Noise:
    """The noise of the B rows of one micro-batch; consecutive calls go on where the last one ended."""

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu"):
        self.device = device
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def uniform(self, *shape: int) -> Tensor:
        """float32 in [0, 1), [B, *shape]."""
        return self._each(lambda generator: torch.rand(shape, generator=generator))

    def normal(self, *shape: int) -> Tensor:
        """float32 of mean 0 and variance 1, [B, *shape]."""
        return self._each(lambda generator: torch.randn(shape, generator=generator))

    def integers(self, high: int, *shape: int) -> Tensor:
        """int64 in [0, high), [B, *shape]."""
        return self._each(lambda generator: torch.randint(high, shape, generator=generator))

    def _each(self, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        return torch.stack([draw(generator) for generator in self._generators]).to(self.device)
