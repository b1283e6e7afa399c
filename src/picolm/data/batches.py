"""The batch of a step is a function of its number: the same rows for any number of processes and any accumulation.

Step s takes the positions [s B, (s + 1) B) of the order (see `order.py`); process r of W has those at r, r + W, r + 2 W, … of
the batch, in `accumulation` micro-batches. So resuming, or replaying any step, takes a number and nothing else.

Shapes: B rows of a step, b rows of a micro-batch, T tokens of a row.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import numpy as np

from picolm.data import Source
from picolm.data.ahead import Ahead
from picolm.data.order import rows_in_order
from picolm.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


class Batches:
    """The micro-batches of this process at any step; the next step's rows are read in the background."""

    def __init__(
        self,
        source: Source,
        *,
        rows_per_step: int,
        accumulation: int = 1,
        rank: int = 0,
        world: int = 1,
        seed: int,
        shuffle: bool = False,
        length: int,
        row_length: int | None = None,
        vocab_size: int,
    ):
        """Cut rows to `row_length` tokens (default: length + 1), in which a model predicts `length` of them.

        `rows_per_step` (B) counts the rows of all processes and micro-batches.
        """
        if rows_per_step % (world * accumulation):
            raise DataError(
                f"{rows_per_step} rows a step cannot be shared out over {world} processes x {accumulation} micro-batches; "
                f"choose a batch size that is a multiple of {world * accumulation}"
            )
        self.source, self.rows_per_step, self.accumulation = source, rows_per_step, accumulation
        self.rank, self.world, self.seed, self.shuffle = rank, world, seed, shuffle
        self.length, self.vocab_size = length, vocab_size
        self.row_length = length + 1 if row_length is None else row_length
        self._check_source()
        self._ahead: Ahead[int, np.ndarray] = Ahead(self._read)

    def __call__(self, step: int) -> list[Tensor]:
        """The micro-batches of a step, each int64 [b, T]. Raises DataError naming shard, row and id of a token ≥ vocab_size."""
        import torch  # here, so that reading about data needs no torch

        tokens_RT = self._ahead.take(step)
        self._ahead.start(step + 1)
        return list(torch.from_numpy(tokens_RT).chunk(self.accumulation))

    def row_numbers(self, step: int) -> np.ndarray:
        """The numbers in the source of all B rows of a step, in their order."""
        first = step * self.rows_per_step
        positions = np.arange(first, first + self.rows_per_step, dtype=np.int64)
        return rows_in_order(positions, len(self.source), seed=self.seed, shuffle=self.shuffle)

    def rank_rows(self, step: int = 0) -> list[np.ndarray]:
        """For each micro-batch of this process, where its rows stand in the batch of all B (the same at every step)."""
        places = np.arange(self.rank, self.rows_per_step, self.world, dtype=np.int64)
        return np.split(places, self.accumulation)

    def pass_of(self, step: int) -> int:
        """The number of the pass over the data in which the first row of a step lies."""
        return step * self.rows_per_step // len(self.source)

    def is_permuted(self, step: int) -> bool:
        """Whether the first row of a step is taken in a permuted order rather than in the order on disk."""
        return self.shuffle or self.pass_of(step) > 0

    @property
    def fingerprint(self) -> str:
        """Digest of what decides the batch of a step: the data, their order and the shape of a batch."""
        parts = [self.source.fingerprint, self.rows_per_step, self.seed, self.shuffle, self.length]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _check_source(self) -> None:
        if len(self.source) == 0:
            raise DataError("the data set has no rows")
        if self.source.row_length < self.row_length:
            raise DataError(
                f"{self.source.locate(0)}: {self.source.row_length} tokens, and a row of training takes {self.row_length}; "
                f"lower model.max_seq_len by {self.row_length - self.source.row_length} or prepare longer rows"
            )
        largest = self.source.max_token
        if largest is not None and largest >= self.vocab_size:
            where = self.source.max_token_file or "the data"
            raise DataError(f"{where}: {_too_large(largest, self.vocab_size)}")

    def _read(self, step: int) -> np.ndarray:
        numbers_B = self.row_numbers(step)[np.concatenate(self.rank_rows(step))]
        tokens_RT = self.source.rows(numbers_B)[:, : self.row_length].astype(np.int64)
        outside = (tokens_RT < 0) | (tokens_RT >= self.vocab_size)
        if outside.any():
            row, column = np.argwhere(outside)[0]
            where = self.source.locate(int(numbers_B[row]))
            raise DataError(f"{where}, token {column}: {_too_large(int(tokens_RT[row, column]), self.vocab_size)}")
        return tokens_RT


def _too_large(token: int, vocab_size: int) -> str:
    return (
        f"token id {token} is outside of the vocabulary of {vocab_size} (0 to {vocab_size - 1}); "
        "were the data made with another tokenizer, or is vocab_size too small?"
    )
