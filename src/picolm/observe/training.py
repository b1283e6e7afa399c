"""The rows that a run was trained on, and at which step each was seen.

A checkpoint of step S has seen the batches 0 to S - 1: the step number says which rows those are. Of other trainers' checkpoints
that is not known; a file of their training rows can be given, whose order then means nothing.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from picolm.errors import PicoError
from picolm.observe.rows import Rows, digest_of, given_rows
from picolm.readers.series import Series
from picolm.store import Run

if TYPE_CHECKING:
    from picolm.data.batches import Batches


class TrainingRows(Protocol):
    """Rows of training data by number; identity: digest of them and of their order."""

    @property
    def identity(self) -> str: ...

    def __len__(self) -> int: ...

    def tokens(self, numbers: Sequence[int] | np.ndarray) -> Tensor:
        """Return rows by their numbers, int64 [R, S]."""
        ...


class Canary(NamedTuple):
    """A planted row. tokens: int64 [S]. steps: the steps of the whole run that show it, ascending; a checkpoint of step S has
    seen those below S. group: the name of its group. alphabet: the ids that its tokens are drawn from. alike: the canaries
    of its group, [C, S].
    """

    tokens: Tensor
    steps: list[int]
    group: str
    alphabet: np.ndarray
    alike: np.ndarray


class SeenRows:
    """The training rows of a run of Pico, with the steps that read them. B rows a step, canaries among them.

    end: the number of batches of the whole run. eos: the id of the token that ends a document, None where it is not known.
    """

    def __init__(self, run: Run):
        """Open the data of a run. Raises PicoError for a series of checkpoints, and for data that are not there or are others.

        A fork has seen the batches of its parent before its first step; where they differ, the parent has to be there.
        """
        if isinstance(run, Series) or "recorded" in run.config:
            raise PicoError(
                f"{run.path}: which rows it was trained on, and when, is not known: it was trained by other code than Pico's"
            )
        from picolm.train.build import open_batches
        from picolm.train.history import check_same_data
        from picolm.train.sample import config_of

        config = config_of(run)
        self._batches = open_batches(config)
        check_same_data(run, self._batches.fingerprint, config)
        self.rows_per_step, self.end = self._batches.rows_per_step, config.training.max_steps
        self._first, self._parent = _parent(run, self._batches)
        self.identity: str = self._batches.fingerprint
        self.eos: int | None = self._batches.source.eos

    def __len__(self) -> int:
        """Return the number of rows of the data, seen or not, without canaries."""
        return len(self._batches.source)

    def tokens(self, numbers: Sequence[int] | np.ndarray) -> Tensor:
        """Return rows by their numbers in the data, int64 [R, S], cut to the length that the model is trained on."""
        found = self._batches.source.rows(np.asarray(numbers, dtype=np.int64))[:, : self._batches.row_length]
        return torch.as_tensor(found.astype(np.int64))

    def of_step(self, step: int) -> np.ndarray:
        """Return the numbers of the rows of batch `step`: those that the update from `step` to `step` + 1 is made of.

        They are [B]; fewer where canaries were shown in place of rows, which that update has not seen.
        """
        if self._parent is not None and step < self._first:
            return self._parent.of_step(step)
        numbers_B = self._batches.row_numbers(step)
        return numbers_B[numbers_B < len(self)]

    def before(self, step: int) -> np.ndarray:
        """Return the numbers of all rows that a checkpoint of `step` has seen, in the order of batches, repeated ones too."""
        return np.concatenate([self.of_step(each) for each in range(step)] or [np.empty(0, dtype=np.int64)])

    def seen_at(self, numbers: Sequence[int] | np.ndarray, end: int) -> list[list[int]]:
        """Return for each row the batches below `end` that hold it, in order."""
        found: dict[int, list[int]] = {int(number): [] for number in numbers}
        wanted = np.array(list(found))
        for step in range(end):
            of_step = self.of_step(step)
            for number in of_step[np.isin(of_step, wanted)]:
                found[int(number)].append(step)
        return [found[int(number)] for number in numbers]

    def find(self, rows: Sequence[Tensor], at_once: int = 4096) -> list[list[int]]:
        """Return for each row of tokens the numbers of the rows of the data that are the same. Reads all of the data."""
        length, found = self._batches.row_length, {tuple(row.tolist()): list[int]() for row in rows}
        starts = np.array([row[0] for row in found if len(row) == length])
        for first in range(0, len(self), at_once) if len(starts) else ():
            tokens_RS = self.tokens(np.arange(first, min(first + at_once, len(self)))).numpy()
            for place in np.flatnonzero(np.isin(tokens_RS[:, 0], starts)):
                found.get(tuple(tokens_RS[place].tolist()), []).append(first + int(place))
        return [found[tuple(row.tolist())] for row in rows]

    @cached_property
    def canaries(self) -> list[Canary]:
        """The planted rows by number, with the steps of the run that show their tokens."""
        found = list[Canary]()
        steps: dict[bytes, set[int]] = {}
        for canary in self._parent.canaries if self._parent is not None else ():
            steps[canary.tokens.numpy().tobytes()] = {step for step in canary.steps if step < self._first}
        for group in self._batches.canaries.groups if self._batches.canaries is not None else ():
            for row, tokens in enumerate(group.tokens_CS):
                shown = {step for step in group.steps(row, self.end) if step >= self._first}
                steps.setdefault(tokens.tobytes(), set()).update(shown)
                found.append(Canary(torch.from_numpy(tokens), [], group.name, group.alphabet, group.tokens_CS))
        return [canary._replace(steps=sorted(steps[canary.tokens.numpy().tobytes()])) for canary in found]


def _parent(run: Run, batches: "Batches") -> "tuple[int, SeenRows | None]":
    """Return the first step that a run trained itself, and the rows of its parent if those before are of other batches.

    Raises PicoError if they are, and the parent is not there or was trained on other data.
    """
    from picolm.train.state import FORKED

    about = run.environment.get(FORKED)
    if about is None:
        return 0, None
    first, path = int(about["step"]), Path(str(about["path"]))
    if not (path / "run.json").exists():
        if changed := [key for key in about["changed"] if key.startswith(("data.", "training.seeds.data"))]:
            raise PicoError(
                f"{run.path}: is a fork of {path} with other {', '.join(changed)}, and that run is not there, so it is not "
                f"known which rows it saw before step {first}"
            )
        return 0, None
    parent = SeenRows(Run.open(path))
    if parent.identity == batches.fingerprint and parent._parent is None:
        return 0, None
    if parent._batches.source.fingerprint != batches.source.fingerprint:
        raise PicoError(
            f"{run.path}: is a fork of {path} with other data: the rows before step {first} are not among its own"
        )
    return first, parent


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
