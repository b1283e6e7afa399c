"""The rows that a run was trained on, and at which step each was seen.

A checkpoint of step S has seen the batches 0 to S - 1: the step number says which rows those are. Of other trainers' checkpoints
that is not known; a file of their training rows can be given, whose order then means nothing.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from picolm.errors import PicoError
from picolm.observe.rows import Rows, digest_of, given_rows
from picolm.readers.series import Series
from picolm.store import Run


class TrainingRows(Protocol):
    """Rows of training data by number; identity: digest of them and of their order."""

    @property
    def identity(self) -> str: ...

    def __len__(self) -> int: ...

    def tokens(self, numbers: Sequence[int] | np.ndarray) -> Tensor:
        """Return rows by their numbers, int64 [R, S]."""
        ...


class SeenRows:
    """The training rows of a run of Pico, with the steps that read them. B rows a step.

    eos: the id of the token that ends a document, None where it is not known.
    """

    def __init__(self, run: Run):
        """Open the data of a run. Raises PicoError for a series of checkpoints, and for data that are not there."""
        if isinstance(run, Series) or "recorded" in run.config:
            raise PicoError(
                f"{run.path}: which rows it was trained on, and when, is not known: it was trained by other code than Pico's"
            )
        from picolm.train.build import open_batches
        from picolm.train.sample import config_of

        self._batches = open_batches(config_of(run))
        self.rows_per_step = self._batches.rows_per_step
        self.identity: str = self._batches.fingerprint
        self.eos: int | None = self._batches.source.eos

    def __len__(self) -> int:
        """Return the number of rows of the data, seen or not."""
        return len(self._batches.source)

    def tokens(self, numbers: Sequence[int] | np.ndarray) -> Tensor:
        """Return rows by their numbers in the data, int64 [R, S], cut to the length that the model is trained on."""
        found = self._batches.source.rows(np.asarray(numbers, dtype=np.int64))[:, : self._batches.row_length]
        return torch.as_tensor(found.astype(np.int64))

    def of_step(self, step: int) -> np.ndarray:
        """Return the numbers of the rows of batch `step`, [B]: those that the update from `step` to `step` + 1 is made of."""
        return self._batches.row_numbers(step)

    def before(self, step: int) -> np.ndarray:
        """Return the numbers of all rows that a checkpoint of `step` has seen, in the order of batches, repeated ones too."""
        return np.concatenate([self.of_step(each) for each in range(step)] or [np.empty(0, dtype=np.int64)])

    def seen_at(self, numbers: Sequence[int] | np.ndarray, end: int) -> list[list[int]]:
        """Return for each row the batches below `end` that hold it, in order."""
        found: dict[int, list[int]] = {int(number): [] for number in numbers}
        for step in range(end):
            for number in self.of_step(step)[np.isin(self.of_step(step), list(found))]:
                found[int(number)].append(step)
        return [found[int(number)] for number in numbers]


class StatedRows:
    """Training rows from a file of token ids."""

    def __init__(self, place: str):
        """Read the file: .npy, or FILE.parquet:COLUMN. Raises PicoError unless it holds rows of ids of one length."""
        rows = given_rows(place)
        if not rows or len({len(row) for row in rows}) != 1:
            raise PicoError(f"{place}: expected rows of token ids of one length")
        self._rows = torch.stack(rows)

    @property
    def identity(self) -> str:
        return digest_of(self._rows.tolist())

    def __len__(self) -> int:
        return len(self._rows)

    def tokens(self, numbers: Sequence[int] | np.ndarray) -> Tensor:
        return self._rows[torch.as_tensor(np.asarray(numbers, dtype=np.int64))]


def training_rows(run: Run, place: str | None) -> TrainingRows:
    """Return the training rows of a run, or those of a file. Raises PicoError where neither is known."""
    if place is not None:
        return StatedRows(place)
    try:
        return SeenRows(run)
    except PicoError as error:
        raise PicoError(f"{error}; state a file of its training rows (training_rows: FILE.npy)") from error


def rows_of_tokens(tokens_RS: Tensor, split: str = "made", has_targets: bool = True) -> Rows:
    """Return rows of one length as the rows of a question; their positions are the last one, as by default.

    has_targets: whether the last token of each row is only predicted, else the model reads it too.
    """
    identity = digest_of(tokens_RS.tolist(), has_targets)
    return Rows(
        list(tokens_RS), [[tokens_RS.shape[1] - 1 - has_targets]] * len(tokens_RS), split, has_targets, identity
    )
