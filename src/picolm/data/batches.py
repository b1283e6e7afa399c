"""The batch of a step is a function of the step number: the same rows for any number of processes and micro-batches.

Step s takes the positions [s B, (s + 1) B) of the order (`rows_in_order`). Process r of W gets those at r, r + W, …
of the batch, in `accumulation` micro-batches. So the step number alone is enough to resume, or to replay a step. Canaries
(`canaries.py`) take places of the batch by the same rule: which, and where, is a function of the step.

Shapes: B rows of a step, b rows of a micro-batch, T tokens of a row.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from picolm.data import Source
from picolm.data.canaries import Canaries, Planted
from picolm.errors import DataError
from picolm.seeds import derive

if TYPE_CHECKING:
    from torch import Tensor


class Batches:
    """The micro-batches of this process at any step. A call with a step also starts to read the next step's rows."""

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
        canaries: Canaries | None = None,
    ):
        """Check the batch shape and the source.

        `rows_per_step` (B) counts the rows of all processes and micro-batches. Rows are cut to `row_length` tokens
        (default: length + 1), of which the model predicts `length`. Steps that show `canaries` have them in place of rows
        of the source. Raises DataError if B is not a multiple of `world` * `accumulation`, or if the source is empty, has
        too short rows or (by its manifest) ids ≥ vocab_size.
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
        self.canaries = canaries
        if canaries is not None:
            self.source = Planted(source, canaries)
        self._ahead: Ahead[int, np.ndarray] = Ahead(self._read)

    def __call__(self, step: int) -> list[Tensor]:
        """Return the micro-batches of a step, each int64 [b, T].

        Raises DataError with shard, row and token id if an id is negative or ≥ vocab_size.
        """
        import torch  # here, so that the module can be imported without torch

        tokens_RT = self._ahead.take(step)
        self._ahead.start(step + 1)
        return list(torch.from_numpy(tokens_RT).chunk(self.accumulation))

    def row_numbers(self, step: int) -> np.ndarray:
        """Return the row numbers (in the source) of all B rows of a step, in batch order; those of canaries follow its own."""
        first = step * self.rows_per_step
        positions = np.arange(first, first + self.rows_per_step, dtype=np.int64)
        numbers_B = rows_in_order(positions, len(self.source), seed=self.seed, shuffle=self.shuffle)
        if self.canaries is not None and len(shown := self.canaries.at(step)):
            places = permute(np.arange(len(shown)), self.rows_per_step, self.seed, "canary places", step)
            numbers_B[places] = len(self.source) + shown
        return numbers_B

    def rank_rows(self, step: int = 0) -> list[np.ndarray]:
        """Return the places of rows in the batch of B, per micro-batch of this process (the same at each step)."""
        places = np.arange(self.rank, self.rows_per_step, self.world, dtype=np.int64)
        return np.split(places, self.accumulation)

    def pass_of(self, step: int) -> int:
        """Return the number of the pass over the data (epoch, from 0) of the first row of a step."""
        return step * self.rows_per_step // len(self.source)

    def is_permuted(self, step: int) -> bool:
        """Return whether the first row of a step is in a permuted order rather than in the order on disk."""
        return self.shuffle or self.pass_of(step) > 0

    @property
    def fingerprint(self) -> str:
        """The digest of all that determines the batch of a step: the data, their order and the shape of a batch."""
        parts = [self.source.fingerprint, self.rows_per_step, self.seed, self.shuffle, self.length]
        if self.canaries is not None:
            parts.append(self.canaries.identity)
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


Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Ahead(Generic[Key, Value]):
    """At most one value computed in advance, by at most one daemon thread."""

    def __init__(self, compute: Callable[[Key], Value]):
        self._compute = compute
        self._key: Key | None = None
        self._value: Future[Value] | None = None
        self._lock = threading.Lock()

    def start(self, key: Key) -> None:
        """Start to compute the value of `key`, unless another computation is running or this value is ready."""
        with self._lock:
            if self._value is not None and (self._key == key or not self._value.done()):
                return
            self._key, self._value = key, Future()
            threading.Thread(target=self._run, args=(key, self._value), daemon=True, name=f"ahead {key}").start()

    def take(self, key: Key) -> Value:
        """Return the value of `key`: wait for it if it was started, otherwise compute it now."""
        with self._lock:
            started, value = self._key == key, self._value
            if started:
                self._key, self._value = None, None
        return value.result() if started and value is not None else self._compute(key)

    def _run(self, key: Key, value: Future[Value]) -> None:
        try:
            value.set_result(self._compute(key))
        except BaseException as error:  # `take` raises it
            value.set_exception(error)


_ROUNDS = 8


def permute(indices: np.ndarray, size: int, seed: int, purpose: str, *position: int) -> np.ndarray:
    """Permute `indices` (below `size`) and return the images, int64.

    (seed, purpose, *position) select the permutation of 0 … size-1. It is a Feistel network over pairs (left, right) of
    numbers below a = ceil(sqrt(size)): each round adds a keyed hash of one half to the other modulo a. This can be
    inverted, so the network permutes 0 … a²-1 for any hash. Results outside 0 … size-1 go through it again until they are
    inside ("cycle walking"; Black & Rogaway 2002); a² exceeds size by less than 2 sqrt(size) + 1, so there are few.
    Nothing is stored.
    """
    side = np.uint64(math.isqrt(max(size - 1, 0)) + 1)  # ceil(sqrt(size)), at least 1
    keys = [np.uint64(derive(seed, purpose, *position, turn)) for turn in range(_ROUNDS)]
    images: np.ndarray = _network(np.asarray(indices, dtype=np.uint64), side, keys)
    while (outside := np.flatnonzero(images >= size)).size:
        images[outside] = _network(images[outside], side, keys)
    return images.astype(np.int64)


def _network(numbers: np.ndarray, side: np.uint64, keys: list[np.uint64]) -> np.ndarray:
    left: np.ndarray = numbers // side
    right: np.ndarray = numbers % side
    for key in keys:
        left, right = right, (left + _mix(right ^ key) % side) % side
    return left * side + right


def _mix(x: np.ndarray) -> np.ndarray:
    """Apply the finalizer of splitmix64 (Steele, Lea & Flood 2014): each input bit affects every bit of the result."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def rows_in_order(positions: np.ndarray, size: int, *, seed: int, shuffle: bool) -> np.ndarray:
    """Return the row (0 … size-1) at each position (0, 1, … over all passes) of the order, int64.

    Pass 0 takes the rows in their order on disk; each later pass (and pass 0 too, with shuffling) has its own permutation.
    """
    positions = np.asarray(positions, dtype=np.int64)
    passes, rows = positions // size, positions % size
    for number in np.unique(passes):
        if number > 0 or shuffle:
            here = passes == number
            rows[here] = permute(rows[here], size, seed, "order", int(number))
    return rows
