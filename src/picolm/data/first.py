"""The first rows of another source: the same text with less of it, so that a training reads it several times.

first:2527,embedded:state_of_the_union     the first 2527 training rows of that source, and all of its held-out rows
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from picolm.data import SOURCES, Source, is_hidden_code, open_source
from picolm.data.manifest import digest_of
from picolm.errors import DataError


@SOURCES.add("first")
def open_first(place: str, *, split: str = "train", **options: Any) -> Source:
    """Open `ROWS,NAME`. Raises DataError if the text is invalid, or if there are not so many training rows."""
    number, comma, name = place.partition(",")
    if not comma or not number.isdecimal() or int(number) == 0:
        raise DataError(f"first:{place}: takes a number of rows and a source, such as first:2000,rows/books")
    if is_hidden_code(name):
        raise DataError(f"first:{place}: {name} is code, which can give fewer rows by itself")
    source = open_source(name, split=split, **options)
    if split != "train":
        return source
    if int(number) > len(source):
        raise DataError(f"first:{place}: {name} has {len(source)} training rows")
    return First(source, int(number))


class First:
    """A `Source` with the first rows of another one."""

    def __init__(self, source: Source, count: int):
        self._source, self._count = source, count
        self.fingerprint = digest_of([source.fingerprint, "first", count])
        self.row_length, self.eos = source.row_length, source.eos
        self.max_token, self.max_token_file = source.max_token, source.max_token_file
        self.tokenizer_file: Path | None = source.tokenizer_file
        self.tokenizer_sha256: str | None = source.tokenizer_sha256

    def __len__(self) -> int:
        return self._count

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Return the rows with these numbers, int32 [R, row_length]."""
        return self._source.rows(self._within(indices))

    def labels(self, indices: np.ndarray) -> list[str] | None:
        """Return the label of each row in the other source."""
        return self._source.labels(self._within(indices))

    def locate(self, index: int) -> str:
        """Return the location of a row, for messages."""
        return self._source.locate(index)

    def _within(self, indices: np.ndarray) -> np.ndarray:
        if len(indices) and int(np.max(indices)) >= self._count:
            raise IndexError(f"row {int(np.max(indices))} of {self._count}")
        return indices
