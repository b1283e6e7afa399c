"""Shuffled rows -> parquet shards, in the layout of the published data, with what the manifest says of each.

A shard holds the rows whose keys have the ranks of its own; where these begin is told by a histogram of all keys, so that any
shard can be written without the others.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from picolm.data.job import Job, Progress, Report, written
from picolm.data.manifest import Shard
from picolm.data.rows import SPLITS, row_of
from picolm.data.runs import bounds, read_between, read_keys

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_PER_SHARD = 20_480  # as published
_ROWS_PER_GROUP = 128  # a row group is what one access decodes
_BINS = 1 << 16


def rank(job: Job, unit: int, progress: Progress) -> Report:
    """Count the rows by ranges of keys, and say how many shards they make."""
    found: Report = {"splits": {}}
    for split in SPLITS:
        counts_B = np.zeros(_BINS, dtype=np.int64)
        for run in _runs(job, split):
            counts_B += np.bincount((read_keys(run) >> np.uint64(63 - 16)).astype(np.int64), minlength=_BINS)
        ends_B = np.concatenate([[0], np.cumsum(counts_B)])
        np.save(job.path(f"{split}.npy"), ends_B)
        if ends_B[-1]:
            found["splits"][split] = [int(ends_B[-1]), -(-int(ends_B[-1]) // job.rows_per_shard)]
    for done in ("tokens", "carry"):
        shutil.rmtree(job.path(done), ignore_errors=True)
    job.path("result").mkdir(exist_ok=True)
    return found


def write(job: Job, unit: int, progress: Progress) -> Report:
    """Write one shard of the result: `SPLIT-00000-of-00002.parquet`, …"""
    split, number, rows, shards = shards_of_job(job)[unit]
    start, end = number * job.rows_per_shard, min((number + 1) * job.rows_per_shard, rows)
    name = f"{split}-{number:05d}-of-{shards:05d}.parquet"
    ranked = (row_of(record) for record in _ranked(job, split, start, end))
    shard = _write_shard(ranked, job.path("result", name), job.sources())
    progress(f"writing {split}", end, rows)
    return asdict(shard)


def written_shards(job: Job) -> dict[str, list[Shard]]:
    """The finished shards of each split."""
    splits: dict[str, list[Shard]] = {split: [] for split in job.report("rank")["splits"]}
    for (split, *_), shard in zip(shards_of_job(job), job.reports("write", range(count_shards(job)))):
        splits[split].append(Shard(**shard))
    return splits


def count_shards(job: Job) -> int:
    """Shards of all splits."""
    return len(shards_of_job(job))


def shards_of_job(job: Job) -> list[tuple[str, int, int, int]]:
    """(split, number of the shard in it, rows of the split, shards of the split) of all shards."""
    splits = job.report("rank")["splits"].items()
    return [(split, number, rows, shards) for split, (rows, shards) in splits for number in range(shards)]


def _ranked(job: Job, split: str, start: int, end: int) -> Iterator[bytes]:
    """The rows of these ranks by key."""
    ends_B, runs = np.load(job.path(f"{split}.npy")), _runs(job, split)
    first, last = int(np.searchsorted(ends_B, start, side="right")) - 1, int(np.searchsorted(ends_B, end))
    skip, wanted = start - int(ends_B[first]), end - start
    at_once = max(1, job.run_bytes // (4 * job.row_length))
    while wanted and first < last:
        upto = max(first + 1, int(np.searchsorted(ends_B, ends_B[first] + at_once)))
        low, high = bounds(first, _BINS)[0], bounds(min(upto, last) - 1, _BINS)[1]
        for record in islice(read_between(runs, low, high), skip, skip + wanted):
            yield record
            wanted -= 1
        first, skip = upto, 0


def _runs(job: Job, split: str) -> list[Path]:
    return sorted(path for path in job.path("rows", split).glob("[0-9]*"))


def _write_shard(rows: Iterator[tuple[int, np.ndarray]], path: Path, sources: list[str] | None) -> Shard:
    import pyarrow.parquet as pq

    content, count, largest, writer = hashlib.sha256(), 0, 0, None
    with written(path) as file:
        while group := list(islice(rows, _ROWS_PER_GROUP)):
            numbers_R, tokens_RT = [source for source, _ in group], np.stack([tokens_T for _, tokens_T in group])
            table = _table(tokens_RT, numbers_R, sources)
            if writer is None:
                writer = pq.ParquetWriter(file, table.schema, compression="zstd", write_page_checksum=True)
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
