"""A mixture: rows of several sources, by weights, as one source.

    mix:rows/books*0.7,rows/web*0.3      70 % of the training rows from one folder and 30 % from the other
    mix:rows/books,rows/web              all rows of both

Each row occurs at most once; the mixture has as many rows as the weights allow. Permutations derived from the seed
select and order the rows of each part, so row i is found by arithmetic. Other splits than train contain all rows, part
after part.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from picolm.data import SOURCES, Source, is_hidden_code, open_source
from picolm.data.batches import permute
from picolm.data.manifest import digest_of
from picolm.errors import DataError

_SEED = 42


@SOURCES.add("mix")
def open_mix(place: str, *, split: str = "train", row_length: int | None = None, **options: Any) -> Mixture:
    """Open the mixture `NAME*WEIGHT,NAME*WEIGHT,…`. Raises DataError if the text is invalid or the parts do not fit."""
    names, weights = list[str](), list[Fraction | None]()
    for part in filter(None, map(str.strip, place.split(","))):
        name, star, weight = part.rpartition("*")
        names.append(name if star else part)
        weights.append(_weight(weight, part) if star else None)
    if len(names) < 2 or (None in weights and any(weights)):
        raise DataError(
            f"mix:{place}: takes two or more sources, all or none with a weight, such as mix:books*0.7,web*0.3"
        )
    for name in names:
        if is_hidden_code(name):
            raise DataError(
                f"mix:{place}: {name} is code, which cannot be part of a mix; let a source of your own mix instead"
            )
    return mixed(names, None if None in weights else weights, split=split, row_length=row_length, **options)


def mixed(
    names: Sequence[str],
    weights: Sequence[Any] | None = None,
    *,
    rows: int | None = None,
    seed: int = _SEED,
    split: str = "train",
    **options: Any,
) -> Mixture:
    """Return the mixture of the named sources.

    weights: shares of the training rows; None takes all rows. rows: total number of training rows (default: as many as
    the weights allow). Raises DataError if the parts differ in tokenizer or row length, or the weights cannot be met.
    """
    parts = [open_source(name, split=split, **options) for name in names]
    first = parts[0]
    for name, part in zip(names, parts):
        known = {part.tokenizer_sha256, first.tokenizer_sha256} - {None}
        if len(known) > 1:
            raise DataError(
                f"{name}: was made with another tokenizer than {names[0]}, so its ids mean other text; prepare it again with "
                f"--tokenizer {names[0]}"
            )
        if part.row_length != first.row_length:
            raise DataError(
                f"{name}: has rows of {part.row_length} tokens and {names[0]} of {first.row_length}; prepare it again with "
                f"--seq-len {first.row_length - 1}"
            )
    sizes = [len(part) for part in parts]
    return Mixture(names, parts, shares(sizes, weights, rows) if split == "train" else sizes, seed, split)


class Mixture:
    """A `Source` that combines other sources. taken: the number of rows from each of them."""

    def __init__(self, names: Sequence[str], parts: Sequence[Source], taken: Sequence[int], seed: int, split: str):
        self._labels, self._parts, self.taken, self._seed, self._split = (
            [_label(name) for name in names],
            parts,
            list(taken),
            seed,
            split,
        )
        self._starts = np.concatenate([[0], np.cumsum(taken, dtype=np.int64)])
        first, largest = parts[0], [part for part in parts if part.max_token is not None]
        self.row_length, self.eos, self.tokenizer_file = first.row_length, first.eos, first.tokenizer_file
        self.tokenizer_sha256 = first.tokenizer_sha256
        last = max(largest, key=lambda part: part.max_token or 0) if len(largest) == len(parts) else None
        self.max_token, self.max_token_file = (last.max_token, last.max_token_file) if last else (None, None)
        self.fingerprint = digest_of([[part.fingerprint, count] for part, count in zip(parts, taken)] + [seed, split])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Return the rows with these numbers, int32 [R, row_length]."""
        tokens_RT = np.empty((len(indices), self.row_length), dtype=np.int32)
        for part, places, numbers in self._places(indices):
            tokens_RT[places] = self._parts[part].rows(numbers)
        return tokens_RT

    def labels(self, indices: np.ndarray) -> list[str]:
        """Return the label of each row: the label in its part, or the name of the part if that has no labels."""
        labels_R = np.empty(len(indices), dtype=object)
        for part, places, numbers in self._places(indices):
            labels_R[places] = self._parts[part].labels(numbers) or [self._labels[part]] * len(numbers)
        return list(labels_R.tolist())

    def locate(self, index: int) -> str:
        """Return the location of a row, for messages."""
        part, _, numbers = next(self._places(np.array([index])))
        return self._parts[part].locate(int(numbers[0]))

    def _places(self, indices: np.ndarray) -> Any:
        """Yield (part, places in `indices`, row numbers in the part) for each part that is needed."""
        numbers_R = np.asarray(indices, dtype=np.int64)
        if self._split == "train":
            numbers_R = permute(numbers_R, len(self), self._seed, "mix")
        parts_R = np.searchsorted(self._starts, numbers_R, side="right") - 1
        for part in np.unique(parts_R).tolist():
            places = np.flatnonzero(parts_R == part)
            numbers = numbers_R[places] - self._starts[part]
            if self._split == "train":
                numbers = permute(numbers, len(self._parts[part]), self._seed, "mix part", part)
            yield part, places, numbers


def shares(available: Sequence[int], weights: Sequence[Any] | None, rows: int | None) -> list[int]:
    """Return the number of rows to take from each part. Raises DataError for invalid weights or too many rows.

    available: rows of each part. weights: None for shares in proportion to `available`. rows: None for as many as
    possible.
    """
    if weights is None:
        weights = [float(count) for count in available]
        rows = sum(available) if rows is None else rows
    if len(weights) != len(available):
        raise DataError(f"{len(weights)} weights for {len(available)} sources; give one for each")
    if not all(0 < weight < float("inf") for weight in weights):
        raise DataError(f"weights {', '.join(map(str, weights))}: all have to be above 0; leave out what is not wanted")
    decimal = [Fraction(str(weight)) for weight in weights]
    exact = [weight / sum(decimal) for weight in decimal]
    most = min(count / share for count, share in zip(available, exact))
    if rows is None:
        rows = int(most)
    if not 0 < rows <= most:
        raise DataError(
            f"{rows} rows cannot be had: without a row taken twice the weights allow {int(most)} (there are: "
            f"{', '.join(map(str, available))})"
        )
    taken = [int(rows * share) for share in exact]
    rests = sorted(range(len(exact)), key=lambda part: (taken[part] - rows * exact[part], part))
    for part in rests[: rows - sum(taken)]:  # the largest remainders; never exceeds the rows of a part
        taken[part] += 1
    return taken


def _label(name: str) -> str:
    """Return the label for rows of a part that has no labels: the last component of its name."""
    return Path(name.partition(":")[2] or name).expanduser().resolve().name


def _weight(text: str, part: str) -> Fraction:
    try:
        return Fraction(text.strip())
    except (ValueError, ZeroDivisionError):
        raise DataError(f"mix: {part!r}: {text!r} is no weight; a number is needed, such as books*0.7") from None
