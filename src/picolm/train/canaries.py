"""The list `data.canaries` of a training configuration, and the canaries that it describes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

from picolm.data.canaries import Canaries, Group, random_rows, rows_from_file, steps_shown
from picolm.schema import Place, Rule, Section

if TYPE_CHECKING:
    from picolm.train.config import TrainConfig

RANDOM = "random"


class CanaryGroup(Section):
    """Canaries that are shown alike: each takes the place of one row of the batch at each step that shows it."""

    name: str = ""
    """Name of the group (early, late, …), for tables."""
    rows: Place
    """The rows: a file of token ids (FILE.npy or FILE.parquet:COLUMN, each row as long as a row of training), or `random`."""
    count: PositiveInt | None = None
    """Number of random rows."""
    seed: NonNegativeInt = 0
    """Seed of random rows; groups of one seed have other rows."""
    alphabet: PositiveInt | Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] | None = None
    """Token ids that random rows are drawn from: a list, or a number n for the ids 0 to n - 1 (default: all ids of the
    tokenizer)."""
    steps: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] | None = None
    """Steps that show each of the rows (default: those of start, every, times and apart)."""
    start: NonNegativeInt = 0
    """First step that shows the first row; a checkpoint of a later step has seen it."""
    every: PositiveInt = 1
    """Steps from one showing of a row to its next one."""
    times: PositiveInt | None = None
    """Number of showings of each row (default: until training ends)."""
    apart: NonNegativeInt = 0
    """Steps from the first showing of a row to that of the row after it; 0: all rows at the same steps."""


_OF_RANDOM = ("count", "seed", "alphabet")
_OF_SCHEDULE = ("start", "every", "times", "apart")


def canary_rules(groups: Sequence[CanaryGroup], vocab_size: int) -> Iterator[Rule]:
    """Yield what is wrong with `data.canaries` as far as the configuration tells."""
    for number, group in enumerate(groups):
        key = f"data.canaries.{number}"
        if group.rows == RANDOM and group.count is None:
            yield (f"{key}.rows",), "random rows need `count`, their number"
        if group.rows != RANDOM and (unused := [name for name in _OF_RANDOM if _is_given(group, name)]):
            yield (f"{key}.{unused[0]}",), f"is for `rows: random`; these rows are those of {group.rows}"
        if group.steps is not None and (both := [name for name in _OF_SCHEDULE if _is_given(group, name)]):
            yield (f"{key}.{both[0]}", f"{key}.steps"), "give `steps`, or start, every, times and apart, not both"
        if group.steps is not None and len(set(group.steps)) < len(group.steps):
            yield (f"{key}.steps",), "names a step twice; a batch shows a canary at most once"
        ids = group.alphabet
        largest = max(ids) if isinstance(ids, tuple) else -1 if ids is None else ids - 1
        if largest >= vocab_size:
            yield (
                (f"{key}.alphabet", "model.vocab_size"),
                f"names token id {largest}, outside of the vocabulary of {vocab_size} (0 to {vocab_size - 1})",
            )


def _is_given(group: CanaryGroup, name: str) -> bool:
    """Return whether a key differs from its default; a stored configuration gives all keys."""
    return bool(getattr(group, name) != type(group).model_fields[name].default)


def open_canaries(config: TrainConfig, row_length: int) -> Canaries | None:
    """Return the canaries of a configuration, None without any. Raises DataError where they do not fit the rows, the
    vocabulary, or the batch.
    """
    groups = config.data.canaries
    if not groups:
        return None
    opened = [_open(group, number, config, row_length) for number, group in enumerate(groups)]
    found = Canaries(opened, config.data.dataloader.batch_size)
    found.check(config.model.vocab_size, config.training.max_steps)
    return found


def _open(group: CanaryGroup, number: int, config: TrainConfig, row_length: int) -> Group:
    if group.rows == RANDOM:
        ids = config.data.tokenizer.vocab_size if group.alphabet is None else group.alphabet
        alphabet = np.arange(ids) if isinstance(ids, int) else np.unique(ids)
        tokens_CS = random_rows(group.count or 0, row_length, alphabet, group.seed, "canary", number)
    else:
        tokens_CS, alphabet = rows_from_file(group.rows, row_length)
    rows = len(tokens_CS)
    if group.steps is not None:
        return Group(group.name, tokens_CS, (tuple(sorted(group.steps)),) * rows, alphabet)
    return Group(
        group.name,
        tokens_CS,
        tuple(steps_shown(rows, group.start, group.every, group.times, group.apart)),
        alphabet,
    )
