"""Writing rows into parquet shards, in the layout of the published data, with what the manifest says of each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from picolm.data.manifest import Shard

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_PER_SHARD = 20_480  # as published
_ROWS_PER_GROUP = 128  # a row group is what one access decodes


def write_shards(
    rows: Iterator[tuple[int, np.ndarray]],
    count: int,
    folder: Path,
    split: str,
    sources: list[str] | None,
    report: Callable[[str, int, int | None], None],
    rows_per_shard: int = ROWS_PER_SHARD,
) -> list[Shard]:
    """Write `count` rows (source number, tokens int32 [T]) as `SPLIT-00000-of-00002.parquet`, …"""
    shards = -(-count // rows_per_shard)
    written = []
    for shard in range(shards):
        path = folder / f"{split}-{shard:05d}-of-{shards:05d}.parquet"
        written.append(_write_shard(islice(rows, rows_per_shard), path, sources))
        report(f"writing {split}", min(count, (shard + 1) * rows_per_shard), count)
    return written


def _write_shard(rows: Iterator[tuple[int, np.ndarray]], path: Path, sources: list[str] | None) -> Shard:
    import pyarrow.parquet as pq

    content, count, largest, writer = hashlib.sha256(), 0, 0, None
    while group := list(islice(rows, _ROWS_PER_GROUP)):
        numbers_R, tokens_RT = [source for source, _ in group], np.stack([tokens_T for _, tokens_T in group])
        table = _table(tokens_RT, numbers_R, sources)
        if writer is None:
            writer = pq.ParquetWriter(path, table.schema, compression="zstd", write_page_checksum=True)
        writer.write_table(table)
        content.update(tokens_RT.astype("<i4").tobytes())
        content.update("\n".join(sources[number] for number in numbers_R).encode() if sources else b"")
        count, largest = count + len(group), max(largest, int(tokens_RT.max()))
    assert writer is not None
    writer.close()
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return Shard(path.name, count, path.stat().st_size, sha256, content.hexdigest(), largest)


def _table(tokens_RT: np.ndarray, numbers_R: list[int], sources: list[str] | None) -> pa.Table:
    import pyarrow as pa

    columns = {"input_ids": pa.FixedSizeListArray.from_arrays(pa.array(tokens_RT.reshape(-1)), tokens_RT.shape[1])}
    if sources is not None:
        names = pa.array(sources, type=pa.string())
        columns["source"] = pa.DictionaryArray.from_arrays(pa.array(numbers_R, type=pa.int32()), names)
    return pa.table(columns)
