"""Documents whose text was there before, byte for byte: found by digest, in bounded memory; the first one stays.

The digests of each piece of the corpus are written in their order; a unit then compares all digests within one range.
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from picolm.data.job import Progress, Report, written
from picolm.data.runs import bounds, read_between, write_run

if TYPE_CHECKING:
    from picolm.data.corpus import Preparation

_DIGEST_BYTES = 16
_NUMBER = struct.Struct("<I")
_MEMORY_BYTES = 100  # of one digest while it is compared


class Digests:
    """The digests of the documents of one piece."""

    def __init__(self) -> None:
        self._digests: list[bytes] = []

    def add(self, text: bytes) -> None:
        """The next document of the piece."""
        self._digests.append(hashlib.blake2b(text, digest_size=_DIGEST_BYTES).digest())

    def write(self, path: Path) -> None:
        """Write them in their order, each with the number of its document within the piece."""
        keys = [int.from_bytes(digest[:8], "big") >> 1 for digest in self._digests]
        write_run(path, keys, [digest + _NUMBER.pack(number) for number, digest in enumerate(self._digests)])


def parts_for(documents: int, memory_bytes: int) -> int:
    """In how many parts the digests are compared."""
    return -(-documents * _MEMORY_BYTES // memory_bytes)


def find_duplicates(job: Preparation, part: int, progress: Progress) -> Report:
    """Name the documents (piece, number) whose digest, within a range of digests, an earlier document has."""
    report = job.report("index")
    low, high = bounds(part, report["duplicate_parts"])
    first, again = set[bytes](), list[tuple[int, int]]()
    for piece, (group, inside) in enumerate(report["pieces"]):
        for record in read_between([job.path("digests", group, inside)], low, high):
            digest, number = record[:_DIGEST_BYTES], _NUMBER.unpack_from(record, _DIGEST_BYTES)[0]
            if digest in first:
                again.append((piece, number))
            first.add(digest)
    with written(job.path("duplicates", f"{part:06d}.npy")) as file:
        np.save(file, np.array(again, dtype=np.uint32).reshape(-1, 2))
    return {"found": len(again)}


def dropped_from(job: Preparation, piece: int, parts: int) -> set[int]:
    """The numbers of the documents of a piece that were there before."""
    dropped = set[int]()
    for part in range(parts):
        found_D2 = np.load(job.path("duplicates", f"{part:06d}.npy"), mmap_mode="r")
        start, stop = np.searchsorted(found_D2[:, 0], [piece, piece + 1])
        dropped.update(found_D2[start:stop, 1].tolist())
    return dropped
