"""Canaries: rows planted into the training data by configuration. Which of them a step shows is a function of its number.

At a step that shows k canaries, these take k places of the batch, and the rows of those places are not read at that step. The
places follow from (seed, step). Canary c has the row number N + c in data of N rows, so that whatever takes rows by number
takes it too.

Legend: C canaries, S tokens of a row of training.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path

import numpy as np

from picolm.data import Source
from picolm.data.token_rows import read_token_rows
from picolm.errors import DataError
from picolm.seeds import derive

ENDLESS = sys.maxsize


@dataclass(frozen=True)
class Group:
    """Canaries of one entry of the configuration.

    tokens_CS: int64. shown: the steps of each canary, ascending: a tuple, or a range, which may be endless.
    alphabet: the ids that its tokens are drawn from, or those that occur in a file.
    """

    name: str
    tokens_CS: np.ndarray
    shown: tuple[Sequence[int], ...]
    alphabet: np.ndarray

    def steps(self, row: int, end: int) -> list[int]:
        """Return the steps below `end` that show a canary."""
        return list(takewhile(lambda step: step < end, self.shown[row]))


class Canaries:
    """The canaries of a run, numbered through all groups."""

    def __init__(self, groups: Sequence[Group], rows_per_step: int):
        """rows_per_step: the rows of a batch."""
        self.groups, self.rows_per_step = tuple(groups), rows_per_step
        self.tokens_CS = np.concatenate([group.tokens_CS for group in groups])
        self.shown = [shown for group in groups for shown in group.shown]

    def __len__(self) -> int:
        return len(self.shown)

    def at(self, step: int) -> np.ndarray:
        """Return the numbers of the canaries that a step shows, ascending. Raises DataError if they are more than its rows."""
        step = int(step)  # whether a range holds a number of numpy would be searched for
        found = np.array([number for number, shown in enumerate(self.shown) if step in shown], dtype=np.int64)
        if len(found) > self.rows_per_step:
            raise DataError(
                f"data.canaries: step {step} shows {len(found)} canaries, and its batch has {self.rows_per_step} rows; "
                "show them at other steps (start, apart), or raise data.dataloader.batch_size"
            )
        return found

    def check(self, vocab_size: int, last: int) -> None:
        """Raise DataError for ids outside of the vocabulary, and for a step up to `last` with more canaries than rows."""
        outside = (self.tokens_CS < 0) | (self.tokens_CS >= vocab_size)
        if outside.any():
            row, column = np.argwhere(outside)[0]
            raise DataError(
                f"data.canaries: canary {row}, token {column}: id {self.tokens_CS[row, column]} is outside of the vocabulary "
                f"of {vocab_size} (0 to {vocab_size - 1})"
            )
        count = np.zeros(last + 1, dtype=np.int64)
        for shown in self.shown:
            if isinstance(shown, range):
                count[shown.start : min(shown.stop, last + 1) : shown.step] += 1
            else:
                count[[step for step in shown if step <= last]] += 1
        if (count > self.rows_per_step).any():
            self.at(int(np.argmax(count > self.rows_per_step)))

    @cached_property
    def identity(self) -> str:
        """Digest of the canaries and of the steps that show them."""
        digest = hashlib.sha256(np.ascontiguousarray(self.tokens_CS, dtype="<i8").tobytes())
        digest.update(repr([self.tokens_CS.shape, *map(_as_text, self.shown)]).encode())
        return digest.hexdigest()


def _as_text(shown: Sequence[int]) -> str:
    """Describe steps, those of a range as its list where it ends, since both are the same steps."""
    return repr(shown) if isinstance(shown, range) and shown.stop == ENDLESS else repr(list(shown))


class Planted:
    """A source with canaries behind its own rows. Its length, which decides the order, is that of the source."""

    def __init__(self, source: Source, canaries: Canaries):
        self.own, self._canaries = source, canaries
        self.fingerprint, self.row_length = source.fingerprint, canaries.tokens_CS.shape[1]
        self.max_token, self.max_token_file, self.eos = source.max_token, source.max_token_file, source.eos
        self.tokenizer_file = source.tokenizer_file
        self.tokenizer_sha256: str | None = getattr(source, "tokenizer_sha256", None)

    def __len__(self) -> int:
        return len(self.own)

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Return the rows with these numbers, int32 [R, S], cut to the length of the canaries."""
        indices = np.asarray(indices)
        planted = indices >= len(self)
        found = np.empty((len(indices), self.row_length), dtype=np.int32)
        found[planted] = self._canaries.tokens_CS[indices[planted] - len(self)]
        if not planted.all():
            found[~planted] = self.own.rows(indices[~planted])[:, : self.row_length]
        return found

    def labels(self, indices: np.ndarray) -> list[str] | None:
        """Return the label of each row, that of canaries is `canary`; None if the data have no labels."""
        indices = np.asarray(indices)
        planted = indices >= len(self)
        of_source = self.own.labels(indices[~planted])
        if of_source is None:
            return None
        others = iter(of_source)
        return ["canary" if is_planted else next(others) for is_planted in planted]

    def locate(self, index: int) -> str:
        """Return the location of a row, for messages."""
        return f"canary {index - len(self)}" if index >= len(self) else self.own.locate(index)


def rows_from_file(place: str, row_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return canaries of a file, int64 [C, S], and the ids that occur in them. Raises DataError for rows of another length."""
    rows = read_token_rows(str(Path(place).expanduser()))
    if not rows:
        raise DataError(
            f"data.canaries: {place} holds no rows of token ids; expected FILE.npy, FILE.parquet:COLUMN, or `random`"
        )
    for number, row in enumerate(rows):
        if len(row) != row_length:
            raise DataError(
                f"data.canaries: row {number} of {place} has {len(row)} tokens, and a row of training has {row_length} "
                "(the model's context and the last target): make the canary as long as that"
            )
    tokens_CS = np.stack(rows)
    return tokens_CS, np.unique(tokens_CS)


def random_rows(
    count: int, row_length: int, alphabet: np.ndarray, seed: int, purpose: str, *position: int
) -> np.ndarray:
    """Return rows of tokens drawn alike from an alphabet, int64 [count, row_length].

    Row i is a function of (seed, purpose, *position, i): it does not depend on `count`, nor on the version of numpy, which
    keeps the raw stream of a bit generator. The remainder of 64 random bits is uniform to 1 part in 2^40 and less.
    """
    streams = [np.random.PCG64(derive(seed, purpose, *position, row)) for row in range(count)]
    places = np.stack([stream.random_raw(row_length) for stream in streams]) % np.uint64(len(alphabet))
    found: np.ndarray = np.asarray(alphabet, dtype=np.int64)[places.astype(np.int64)]
    return found


def steps_shown(rows: int, start: int, every: int, times: int | None, apart: int) -> Iterator[range]:
    """Yield the steps of each row: the first is `start` + row * `apart`, then each `every` steps, `times` times or for ever."""
    for row in range(rows):
        first = start + row * apart
        yield range(first, ENDLESS if times is None else first + times * every, every)
