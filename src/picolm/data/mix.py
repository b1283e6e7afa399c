"""A mixture: rows of several sources by weights, as one source.

    mix:rows/books*0.7,rows/web*0.3      of the training rows, 70 % from one folder and 30 % from the other
    mix:rows/books,rows/web              all rows of both

No row is in it twice: it has as many rows as the weights allow. Which rows of a part are in it, and their order, are permutations
named by the seed, so that row i is found by arithmetic. Of the other splits all rows are in it, part after part.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from picolm.data import SOURCES, Source, is_own_source, open_source
from picolm.data.manifest import digest_of
from picolm.data.order import permute
from picolm.errors import DataError

_SEED = 42


@SOURCES.add("mix")
def open_mix(place: str, *, split: str = "train", row_length: int | None = None, **options: Any) -> Mixture:
    """Return the rows of `NAME*WEIGHT,NAME*WEIGHT,…`. Raises DataError where parts do not fit each other."""
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
        if is_own_source(name) and not os.path.exists(name):  # no code is named where nobody looks for it
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
    """Return a mixture of the sources of these names. weights: shares of the training rows, None takes all rows; rows: in all."""
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
    """A `Source` over others. taken: how many rows of each are in it."""

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
        """Return the rows of these numbers, int32 [R, row_length]."""
        tokens_RT = np.empty((len(indices), self.row_length), dtype=np.int32)
        for part, places, numbers in self._places(indices):
            tokens_RT[places] = self._parts[part].rows(numbers)
        return tokens_RT

    def labels(self, indices: np.ndarray) -> list[str]:
        """Return what each row is from: its source in its part, or the name of the part where that tells none."""
        labels_R = np.empty(len(indices), dtype=object)
        for part, places, numbers in self._places(indices):
            labels_R[places] = self._parts[part].labels(numbers) or [self._labels[part]] * len(numbers)
        return list(labels_R.tolist())

    def locate(self, index: int) -> str:
        """Return where a row lies."""
        part, _, numbers = next(self._places(np.array([index])))
        return self._parts[part].locate(int(numbers[0]))

    def _places(self, indices: np.ndarray) -> Any:
        """Yield (part, places in `indices`, numbers of the rows in the part) of each part that is needed."""
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
    """Return how many rows of each part are taken. Raises DataError for weights that cannot be had."""
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
    for part in rests[: rows - sum(taken)]:  # the largest remainders; what a part has is never exceeded
        taken[part] += 1
    return taken


def _label(name: str) -> str:
    """Return what rows of a source are called that names none itself: the last part of its name."""
    return Path(name.partition(":")[2] or name).expanduser().resolve().name


def _weight(text: str, part: str) -> Fraction:
    try:
        return Fraction(text.strip())
    except (ValueError, ZeroDivisionError):
        raise DataError(f"mix: {part!r}: {text!r} is no weight; a number is needed, such as books*0.7") from None
