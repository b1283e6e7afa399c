"""Read rows from parquet shards: a column `input_ids` of rows of equal length, and optionally a column `source`.

Row i is in shard `searchsorted(starts, i)`. Only its row group is decoded, and kept in a cache of limited bytes.
`ShardedRows` gets the local path of shard k from `fetch`, which may download it (see `hub.py`). Row counts come from
the manifest if there is one, else from the footers, which are read once.

The fingerprint is computed from the manifest's digests of the rows; the sizes of the files are checked. Without a
manifest it is the sha-256 over each shard's size, row count, and first and last 64 KiB. The last bytes contain the
footer, with offset and compressed size of every row group, so changed content is detected without reading terabytes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from picolm.data import SOURCES
from picolm.data.decode import Footer, read_footer, read_labels, read_tokens
from picolm.data.manifest import (
    Manifest,
    NoSplit,
    canonical,
    damaged_files,
    digest_of,
    matching,
    no_shards,
    read_manifest,
    shards_in,
    shards_of,
)
from picolm.errors import DataError

_CACHE_BYTES = 1 << 30

log = logging.getLogger("picolm")


class ShardedRows:
    """A `Source` over parquet shards; thread-safe."""

    def __init__(
        self,
        names: Sequence[str],
        rows_per_shard: Sequence[int],
        fetch: Callable[[int], Path],
        *,
        fingerprint: str,
        row_length: int | None = None,
        manifest: Manifest | None = None,
        split: str = "train",
        tokenizer_file: Path | None = None,
        tokenizer_sha256: str | None = None,
        cache_bytes: int = _CACHE_BYTES,
    ):
        """Set up the rows; `fetch` returns the local path of a shard by number.

        row_length: tokens needed in a row; longer rows are cut. None: as in the first row (reads one row group).
        """
        self._names, self._fetch, self._rows_per_shard = list(names), fetch, list(rows_per_shard)
        self._starts = np.concatenate([[0], np.cumsum(rows_per_shard, dtype=np.int64)])
        self._cache = ByteBoundedCache(cache_bytes)
        self._footers: dict[int, tuple[Path, Footer]] = {}
        self.fingerprint, self.tokenizer_file, self.tokenizer_sha256 = fingerprint, tokenizer_file, tokenizer_sha256
        self.max_token, self.max_token_file, self.eos = None, None, None
        if manifest is not None:
            largest = max(manifest.splits[split], key=lambda shard: shard.max_token)
            self.max_token, self.max_token_file = largest.max_token, largest.file
            self.eos = manifest.tokenizer["eos_id"]
            self.tokenizer_sha256 = manifest.tokenizer["sha256"]
        self._needed = row_length
        self.row_length = row_length if row_length is not None else self._first_length()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Return the rows with these numbers, int32 [R, row_length]. Raises DataError if they cannot be read."""
        found = [(places, self._tokens(shard, group)[rows]) for places, shard, group, rows in self._groups_of(indices)]
        tokens_RT = np.empty((len(indices), self.row_length), dtype=np.int32)
        for places, read_RT in found:
            tokens_RT[places] = read_RT
        return tokens_RT

    def labels(self, indices: np.ndarray) -> list[str] | None:
        """Return the `source` of each row; None if a shard has no such column."""
        labels_R = np.empty(len(indices), dtype=object)
        for places, shard, group, rows in self._groups_of(indices):
            if not self._footer(shard)[1].has_labels:
                return None
            labels_R[places] = self._labels(shard, group)[rows]
        return labels_R.tolist()

    def locate(self, index: int) -> str:
        """Return the location of a row: `FILE row J`."""
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return f"{self._names[shard]} row {index - int(self._starts[shard])}"

    def _groups_of(self, indices: np.ndarray) -> Iterator[tuple[np.ndarray, int, int, np.ndarray]]:
        """Yield (places in `indices`, shard, row group, rows in it) for each needed row group, in disk order."""
        indices = np.asarray(indices, dtype=np.int64)
        outside = indices[(indices < 0) | (indices >= len(self))]
        if outside.size:
            raise DataError(f"row {outside[0]} of a data set of {len(self)} rows")
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        for shard in np.unique(shards).tolist():
            ends_G = self._footer(shard)[1].ends_G
            places = np.flatnonzero(shards == shard)
            within = indices[places] - self._starts[shard]
            groups = np.searchsorted(ends_G, within, side="right")
            for group in np.unique(groups).tolist():
                here = groups == group
                yield places[here], shard, group, within[here] - (ends_G[group - 1] if group else 0)

    def _footer(self, shard: int) -> tuple[Path, Footer]:
        if shard not in self._footers:
            path, name = self._fetch(shard), self._names[shard]
            footer = read_footer(path, name)
            if footer.rows != self._rows_per_shard[shard]:
                raise DataError(
                    f"{name}: holds {footer.rows} rows where {self._rows_per_shard[shard]} were expected; "
                    "was the file exchanged? fetch or prepare the data set again"
                )
            self._footers[shard] = path, footer
        return self._footers[shard]

    def _first_length(self) -> int:
        _, shard, group, _ = next(self._groups_of(np.zeros(1, dtype=np.int64)))
        self._needed = self._tokens(shard, group).shape[1]
        return self._needed

    def _tokens(self, shard: int, group: int) -> np.ndarray:
        def decode() -> tuple[np.ndarray, int]:
            path, name = self._footer(shard)[0], self._names[shard]
            tokens_RT = read_tokens(path, name, group)
            needed = tokens_RT.shape[1] if self._needed is None else self._needed
            check_length(tokens_RT.shape[1], needed, name)
            tokens_RT = np.ascontiguousarray(tokens_RT[:, :needed])
            return tokens_RT, tokens_RT.nbytes

        return self._cache.get((shard, group, "tokens"), decode)

    def _labels(self, shard: int, group: int) -> np.ndarray:
        def decode() -> tuple[np.ndarray, int]:
            labels = read_labels(self._footer(shard)[0], self._names[shard], group)
            return np.array(labels, dtype=object), 8 * len(labels) + sum(64 + len(label) for label in labels)

        return self._cache.get((shard, group, "labels"), decode)


class ByteBoundedCache:
    """A thread-safe LRU cache of at most `limit_bytes` in total (but at least one value)."""

    def __init__(self, limit_bytes: int):
        self._limit_bytes, self.held_bytes = limit_bytes, 0
        self._values: OrderedDict[Any, tuple[np.ndarray, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any, compute: Callable[[], tuple[np.ndarray, int]]) -> np.ndarray:
        """Return the value of `key`, computing it if it is not cached.

        compute: returns the value and its size in bytes; two threads that ask at the same time may both run it.
        """
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key][0]
        value, size = compute()
        with self._lock:
            if key not in self._values:
                self._values[key] = value, size
                self.held_bytes += size
            while self.held_bytes > self._limit_bytes and len(self._values) > 1:
                self.held_bytes -= self._values.popitem(last=False)[1][1]
        return value


def check_length(found: float, needed: int, name: str) -> None:
    """Raise DataError if the rows of a shard are shorter than the model needs."""
    if found < needed:
        raise DataError(
            f"{name}: rows of {found:g} tokens, and a row of training takes {needed}; lower model.max_seq_len by "
            f"{needed - int(found)}, or prepare the data with --seq-len {needed - 1}"
        )


@SOURCES.add("parquet")
def open_parquet(place: str, *, split: str = "train", row_length: int | None = None, **_: Any) -> ShardedRows:
    """Open the shards of a split in a folder (or its `data/`), by a glob, or in a single file.

    Raises NoSplit if there is no such split, and DataError for damaged shards or rows that are too short.
    """
    given = Path(place).expanduser()
    manifest = read_manifest(given) if given.is_dir() else None
    if manifest is not None:
        return _open_with_manifest(given, manifest, canonical(split), row_length)
    base, files = _files_at(given)
    names = [file.relative_to(base).as_posix() for file in files]
    shards = [base / name for name in shards_of(names, split, place)]
    if not shards:
        raise no_shards(place, split, names)
    return _open_without_manifest(shards, row_length)


def rows_fingerprint(manifest: Manifest, split: str) -> str:
    """Return the digest of the rows of a split and their order, independent of location and compression."""
    return digest_of([shard.content, shard.rows] for shard in manifest.splits[split])


def _open_without_manifest(shards: list[Path], row_length: int | None) -> ShardedRows:
    footers, problems = list[Footer](), list[str]()
    for path in shards:
        try:
            footers.append(read_footer(path, str(path)))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    for path, footer in zip(shards, footers):
        check_length(footer.lengths_G.min(initial=np.inf), row_length or 0, str(path))
    rows = [footer.rows for footer in footers]
    if sum(rows) == 0:
        raise DataError(f"{shards[0].parent}: its {len(shards)} parquet shards have no rows")
    digest = digest_of([edges(path), count] for path, count in zip(shards, rows))
    beside = (folder / "tokenizer.json" for folder in list(shards[0].parents)[:2])  # the shards may be in `data/`
    tokenizer = next((file for file in beside if file.is_file()), None)
    names = [str(path) for path in shards]
    return ShardedRows(
        names, rows, shards.__getitem__, fingerprint=digest, row_length=row_length, tokenizer_file=tokenizer,
        tokenizer_sha256=None if tokenizer is None else hashlib.sha256(tokenizer.read_bytes()).hexdigest(),
    )  # fmt: skip


def _open_with_manifest(folder: Path, manifest: Manifest, split: str, row_length: int | None) -> ShardedRows:
    shards = manifest.splits.get(split, [])
    if not manifest.rows(split):
        there = ", ".join(name for name, held in manifest.splits.items() if held)
        raise NoSplit(f"{folder}: has no split {split!r} (there are: {there}); prepare it with --val-fraction")
    if problems := damaged_files(folder, manifest, shards):
        raise DataError("\n".join([*problems, f"{folder}: is not whole; prepare the data again"]))
    needed = manifest.row_length if row_length is None else row_length
    check_length(manifest.row_length, needed, str(folder))
    return ShardedRows(
        [str(folder / shard.file) for shard in shards],
        [shard.rows for shard in shards],
        lambda index: folder / shards[index].file,
        fingerprint=rows_fingerprint(manifest, split),
        row_length=needed,
        manifest=manifest,
        split=split,
        tokenizer_file=folder / manifest.tokenizer["file"],
    )


def _files_at(place: Path) -> tuple[Path, list[Path]]:
    """Return the base folder and the parquet files of a folder, file or glob. Raises DataError if nothing matches."""
    if place.is_dir():
        files, others = shards_in(place)
        if others:
            log.warning(
                "%s: %d parquet files in other folders below it are not read, such as %s; a glob names them: %s/**/*.parquet",
                place, len(others), others[0].relative_to(place), place,
            )  # fmt: skip
        return place, files
    if place.is_file():
        return place.parent, [place]
    base, files = matching(str(place))
    if not files:
        raise DataError(f"{place}: there is no such file or folder, and no file matches it as a glob")
    return base, files


def edges(path: Path, edge_bytes: int = 1 << 16) -> str:
    """Return the sha-256 over a file's size and its first and last `edge_bytes` (default 64 KiB)."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(edge_bytes))
        file.seek(max(0, size - edge_bytes), os.SEEK_SET)
        digest.update(file.read(edge_bytes))
    return digest.hexdigest()
