"""The documents of a corpus on disk, in shuffled order, each on one side of the split: training or held out."""

from __future__ import annotations

import heapq
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from picolm.data.documents import Document
from picolm.data.spill import Spill
from picolm.errors import DataError
from picolm.seeds import derive

_MOST_SOURCES = 1000
_EXACT_HELD_OUT = 1024
_HEADER = struct.Struct("<QI")  # the lot drawn for the document, the number of its source


class Placed(NamedTuple):
    """A document with its side (`train` or `val`) and the number of its source."""

    split: str
    source: int
    text: str


class Corpus:
    """Put documents in, then iterate in an order that is a permutation named by the seed, as often as needed."""

    def __init__(self, folder: Path, *, seed: int, val_fraction: float):
        self._spill = Spill(folder)
        self._seed, self._val_fraction = seed, val_fraction
        self._numbers: dict[str | None, int] = {}
        self._draws: list[_Draw] = []

    def __len__(self) -> int:
        return self._spill.records

    def add(self, document: Document) -> None:
        """Store a document. Raises DataError when the corpus has too many sources to be told apart."""
        number = self._numbers.setdefault(document.source, len(self._numbers))
        if number == len(self._draws):
            self._draws.append(_Draw())
        if len(self._draws) > _MOST_SOURCES:
            raise DataError(
                f"the documents have more than {_MOST_SOURCES} different values of `source`, such as {document.source!r}; "
                "it is meant for kinds of text: rename the field, or put the kind into it"
            )
        lot = derive(self._seed, "held out", len(self))
        self._draws[number].add(lot)
        key = derive(self._seed, "document", len(self))
        self._spill.put(key, _HEADER.pack(lot, number) + document.text.encode())

    def close(self) -> None:
        """Close the files; it can still be read."""
        self._spill.close()

    def __iter__(self) -> Iterator[Placed]:
        limits = [draw.limit(self._val_fraction) for draw in self._draws]
        for record in self._spill:
            lot, source = _HEADER.unpack_from(record)
            yield Placed("val" if lot < limits[source] else "train", source, record[_HEADER.size :].decode())

    @property
    def sources(self) -> list[str] | None:
        """The names of the sources by number; None when no document names one."""
        if set(self._numbers) <= {None}:
            return None
        return ["unlabelled" if name is None else name for name in self._numbers]

    def documents_by_source(self) -> list[int]:
        """How many documents each source has."""
        return [draw.documents for draw in self._draws]


class _Draw:
    """Chooses the held-out documents of a source: those that drew the smallest lots (63-bit numbers).

    The exact share is kept as long as it is at most 1024 documents; beyond that each document is held out with the
    probability `fraction`, which differs from the share by 3 % at most (one standard deviation), and takes no memory.
    """

    def __init__(self) -> None:
        self.documents = 0
        self._smallest: list[int] = []  # a heap of the negated smallest lots

    def add(self, lot: int) -> None:
        self.documents += 1
        keep = heapq.heappush if len(self._smallest) <= _EXACT_HELD_OUT else heapq.heappushpop
        keep(self._smallest, -lot)

    def limit(self, fraction: float) -> int:
        """Lots below it are held out: the share of all documents, at least one and not all of them."""
        wanted = min(max(1, round(fraction * self.documents)), self.documents - 1)
        if fraction == 0 or wanted == 0:
            return 0
        if wanted > _EXACT_HELD_OUT:
            return int(fraction * 2**63)
        return sorted(-lot for lot in self._smallest)[wanted]
