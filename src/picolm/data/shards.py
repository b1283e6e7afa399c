"""Write rows from token files in a permuted order to parquet shards, in the layout of the published data.

The tokens of one split and source are a *stream*, in document order; row k of a stream is its k-th `row_length` tokens.
The rows of a split are numbered stream by stream; place i of the result holds row `permute(i, rows, seed, "rows …")`.
So each shard can be written independently, and has the same content for any number of processes.

Shapes: R rows, T tokens in a row (the inputs and the shifted targets).
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np

from picolm.data.batches import permute
from picolm.data.manifest import Shard

if TYPE_CHECKING:
    import pyarrow as pa

SPLITS = ("train", "val")
ROWS_PER_SHARD = 20_480  # as published
_ROWS_PER_GROUP = 128  # reading one row decodes its whole row group
TOKEN = np.dtype("<i4")

Row = tuple[int, np.ndarray]
"""(source number, tokens int32 [T])"""


class Segment(NamedTuple):
    """Consecutive tokens in a file: `tokens` of them, from token `start`, of the stream of `source` in a split."""

    file: Path
    split: str
    source: int
    start: int
    tokens: int


class StreamRows:
    """The rows of a split, found by arithmetic in token files. rows_by_source: number of rows per source number."""

    def __init__(self, segments: Sequence[Segment], split: str, row_length: int):
        self._split, self._length = split, row_length
        self._streams: dict[int, list[Segment]] = {}
        for segment in segments:
            if segment.split == split:
                self._streams.setdefault(segment.source, []).append(segment)
        self._sources = sorted(self._streams)
        self._ends = {source: np.cumsum([part.tokens for part in self._streams[source]]) for source in self._sources}
        self.rows_by_source = {source: int(self._ends[source][-1]) // row_length for source in self._sources}
        self.dropped_tokens = sum(int(ends[-1]) % row_length for ends in self._ends.values())
        self._starts = np.cumsum([0, *self.rows_by_source.values()])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def permuted(self, start: int, end: int, seed: int) -> Iterator[Row]:
        """Yield the rows for the places start … end - 1 of the result."""
        for number in permute(np.arange(start, end), len(self), seed, f"rows {self._split}").tolist():
            yield self._row(number)

    def _row(self, number: int) -> Row:
        stream = int(np.searchsorted(self._starts, number, side="right")) - 1
        source = self._sources[stream]
        place, wanted, parts = (number - int(self._starts[stream])) * self._length, self._length, list[np.ndarray]()
        segment = int(np.searchsorted(self._ends[source], place, side="right"))
        while wanted:
            part, end = self._streams[source][segment], int(self._ends[source][segment])
            taken = min(wanted, end - place)
            first = part.start + part.tokens - (end - place)
            parts.append(np.fromfile(part.file, TOKEN, taken, offset=TOKEN.itemsize * first))
            place, wanted, segment = place + taken, wanted - taken, segment + 1
        return source, np.concatenate(parts)


def shard_name(split: str, number: int, shards: int) -> str:
    """Return the file name of a shard: `train-00000-of-00002.parquet`."""
    return f"{split}-{number:05d}-of-{shards:05d}.parquet"


def write_shard(rows: Iterator[Row], path: Path, sources: Sequence[str] | None) -> Shard:
    """Write rows as a shard, atomically. Returns its manifest entry.

    sources: names by source number; None writes no column `source`.
    """
    import pyarrow.parquet as pq

    content, count, largest, writer = hashlib.sha256(), 0, 0, None
    with written(path) as file:
        while group := list(islice(rows, _ROWS_PER_GROUP)):
            numbers_R, tokens_RT = [source for source, _ in group], np.stack([tokens_T for _, tokens_T in group])
            table = _table(tokens_RT, numbers_R, sources)
            if writer is None:
                writer = pq.ParquetWriter(file, table.schema, compression="zstd", write_page_checksum=True)
            writer.write_table(table)
            content.update(tokens_RT.astype(TOKEN).tobytes())
            content.update("\n".join(sources[number] for number in numbers_R).encode() if sources else b"")
            count, largest = count + len(group), max(largest, int(tokens_RT.max()))
        assert writer is not None
        writer.close()
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return Shard(path.name, count, path.stat().st_size, sha256, content.hexdigest(), largest)


@contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file to write, renamed to `path` after it is complete and flushed to disk (atomic)."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _table(tokens_RT: np.ndarray, numbers_R: list[int], sources: Sequence[str] | None) -> pa.Table:
    import pyarrow as pa

    columns = {"input_ids": pa.FixedSizeListArray.from_arrays(pa.array(tokens_RT.reshape(-1)), tokens_RT.shape[1])}
    if sources is not None:
        names = pa.array(sources, type=pa.string())
        columns["source"] = pa.DictionaryArray.from_arrays(pa.array(numbers_R, type=pa.int32()), names)
    return pa.table(columns)
