"""Records in the order of random 63-bit keys, in bounded memory: how documents and rows are shuffled when they do not fit.

An external merge sort, laid out for many tasks: a *run* is a file of records that were sorted in memory; the records of any range
of keys are one slice of each run, found by bisection. The order is that of the keys, however the records were put into runs;
records with equal keys keep the order of the runs, and within a run that in which they came.

On disk, little-endian: number of records N, N keys, N + 1 offsets into what follows, the records.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from picolm.data.job import written
from picolm.errors import FileError

KEYS = 1 << 63
_WORD = np.dtype("<u8")


class _Slice(NamedTuple):
    keys_N: np.ndarray
    offsets: np.ndarray
    content: bytes


def write_run(path: Path, keys: Sequence[int], records: Sequence[bytes]) -> None:
    """Write records as a run; 0 <= key < 2^63."""
    keys_N = np.array(keys, dtype=_WORD)
    order_N = np.argsort(keys_N, kind="stable")
    sizes_N = np.array([len(record) for record in records], dtype=_WORD)[order_N]
    with written(path) as file:
        file.write(np.array([len(keys_N)], dtype=_WORD).tobytes())
        file.write(keys_N[order_N].tobytes())
        file.write(np.concatenate([[0], np.cumsum(sizes_N)]).astype(_WORD).tobytes())
        for number in order_N:
            file.write(records[number])


def read_keys(path: Path) -> np.ndarray:
    """Return the keys of a run, uint64 [N], rising."""
    with path.open("rb") as file:
        count = _count(file, path)
    return np.fromfile(path, dtype=_WORD, count=count, offset=_WORD.itemsize)


def read_between(runs: Iterable[Path], low: int, high: int) -> Iterator[bytes]:
    """The records with low <= key < high, in the order of their keys. All of them are held in memory."""
    slices = [part for run in runs if len((part := _slice(run, low, high)).keys_N)]
    if not slices:
        return
    owners_N = np.repeat(np.arange(len(slices)), [len(part.keys_N) for part in slices])
    places_N = np.concatenate([np.arange(len(part.keys_N)) for part in slices])
    for number in np.argsort(np.concatenate([part.keys_N for part in slices]), kind="stable"):
        part, place = slices[owners_N[number]], places_N[number]
        yield part.content[part.offsets[place] : part.offsets[place + 1]]


def bounds(part: int, parts: int) -> tuple[int, int]:
    """The range of keys of one of equal parts; as keys are random, about as many records lie in each."""
    return part * KEYS // parts, (part + 1) * KEYS // parts


def _count(file: BinaryIO, path: Path) -> int:
    """Return the number of records of a run. Raises FileError if the file does not have the size that its table tells."""
    size = os.fstat(file.fileno()).st_size
    count = int.from_bytes(file.read(8), "little")
    header = 8 * (2 + 2 * count)
    if header <= size:
        file.seek(header - 8)
        if header + int.from_bytes(file.read(8), "little") == size:
            return count
    raise FileError(f"{path}: is damaged; delete the work folder that it is in and start again")


def _slice(run: Path, low: int, high: int) -> _Slice:
    with run.open("rb") as file:
        count = _count(file, run)
        if count == 0:
            return _Slice(np.empty(0, _WORD), np.zeros(1, _WORD), b"")
        keys_N = np.memmap(file, dtype=_WORD, mode="r", offset=8, shape=(count,))
        start, stop = (int(np.searchsorted(keys_N, np.uint64(limit))) for limit in (low, high))
        mine_N = np.array(keys_N[start:stop])
        del keys_N
        file.seek(8 * (1 + count + start))
        offsets = np.frombuffer(file.read(8 * (stop - start + 1)), dtype=_WORD).astype(np.int64)
        file.seek(8 * (2 + 2 * count) + int(offsets[0]))
        return _Slice(mine_N, offsets - offsets[0], file.read(int(offsets[-1] - offsets[0])))
