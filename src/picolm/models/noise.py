"""Random numbers for a model's objective: masks, noise levels, its own dropout.

Each row of a batch has its own generator, seeded by the step and the row's place in the global batch. So a row gets the
same numbers for any number of micro-batches and processes. Numbers are drawn on the CPU, so they are the same on any
device.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Noise:
    """The random numbers for the B rows of one micro-batch; each call continues the streams of the call before."""

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu"):
        self.device = device
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def uniform(self, *shape: int) -> Tensor:
        """Return uniform float32 numbers in [0, 1), [B, *shape]."""
        return self._each(lambda generator: torch.rand(shape, generator=generator))

    def normal(self, *shape: int) -> Tensor:
        """Return normal float32 numbers of mean 0 and variance 1, [B, *shape]."""
        return self._each(lambda generator: torch.randn(shape, generator=generator))

    def integers(self, high: int, *shape: int) -> Tensor:
        """Return uniform int64 numbers in [0, high), [B, *shape]."""
        return self._each(lambda generator: torch.randint(high, shape, generator=generator))

    def _each(self, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        return torch.stack([draw(generator) for generator in self._generators]).to(self.device)
