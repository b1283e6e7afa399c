"""Records sorted by a random 64-bit key, in bounded memory: how documents and rows are shuffled when they do not fit.

An external radix sort: records go to one of 64 files by the first bits of their key; a file that still is larger than the
memory allowed is split again by the next bits. The order is that of the keys, whatever the number of files or the memory.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_BITS = 6
_KEY_BITS = 63
_HEADER = struct.Struct("<QI")
_WRITE_BYTES = 1 << 17


class Spill:
    """Put (key, payload) records in any order, then iterate over them in the order of their keys (as often as needed).

    Records with equal keys keep the order in which they were put. The folder is the caller's to delete.
    """

    def __init__(self, folder: Path, *, memory_bytes: int = 1 << 26, depth: int = 0):
        self._folder, self._memory_bytes, self._depth = folder, memory_bytes, depth
        self._shift = _KEY_BITS - _BITS * (depth + 1)
        self._files: dict[int, BinaryIO] = {}
        self.records = 0
        folder.mkdir(parents=True)

    def put(self, key: int, payload: bytes) -> None:
        """Add a record; 0 <= key < 2^63."""
        bucket = (key >> self._shift) & (2**_BITS - 1)
        file = self._files.get(bucket)
        if file is None:
            file = self._files[bucket] = self._path(bucket).open("wb", buffering=_WRITE_BYTES)
        file.write(_HEADER.pack(key, len(payload)))
        file.write(payload)
        self.records += 1

    def close(self) -> None:
        """Write what is still in memory, and close the files."""
        for file in self._files.values():
            file.close()

    def __iter__(self) -> Iterator[bytes]:
        self.close()
        for bucket in sorted(self._files):
            path = self._path(bucket)
            if path.stat().st_size <= self._memory_bytes or self._shift < _BITS:
                records = sorted(_records(path), key=lambda record: record[0])
                yield from (payload for _, payload in records)
            else:
                yield from self._split(path)

    def _split(self, path: Path) -> Iterator[bytes]:
        finer = Spill(path.with_suffix(".split"), memory_bytes=self._memory_bytes, depth=self._depth + 1)
        for key, payload in _records(path):
            finer.put(key, payload)
        yield from finer
        shutil.rmtree(finer._folder)

    def _path(self, bucket: int) -> Path:
        return self._folder / f"{bucket:02d}"


def _records(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb", buffering=_WRITE_BYTES) as file:
        while header := file.read(_HEADER.size):
            key, length = _HEADER.unpack(header)
            yield key, file.read(length)
