"""Read data sets of the Hugging Face Hub shard by shard.

A shard is downloaded into the Hub's cache when one of its rows is first read, and then read like any local shard. The
next shard is downloaded in the background.

A data set is pinned to the commit found when it is opened. Its shards are listed once. Row counts come from its
`manifest.json`; without one, two footers are read over the network and all shards but the last are assumed to have as
many rows as the first, and a downloaded shard with another row count is an error. The result is stored as an index in
the cache folder, so that offline mode (`HF_HUB_OFFLINE=1`) can use the downloaded shards. The fingerprint is computed
from the shards' digests on the Hub, so it does not change when a commit only edits the data set card.

`HF_ENDPOINT`, `HF_TOKEN` and `HF_HOME` mean the same as in huggingface_hub.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from picolm import trusted
from picolm.data import SOURCES
from picolm.data.batches import Ahead
from picolm.data.decode import Footer, read_footer
from picolm.data.manifest import (
    FILE,
    Count,
    Manifest,
    Name,
    NoSplit,
    canonical,
    digest_of,
    no_shards,
    parse_manifest,
    shards_of,
)
from picolm.data.parquet import ShardedRows, check_length, rows_fingerprint
from picolm.data.shards import written
from picolm.errors import DataError, FileError
from picolm.network import TreeEntry, answers_of, cache_folder, fetch, file_list, in_cache, is_offline, persist

_FOOTER_BYTES = 1 << 16
_MOST_FOOTER_BYTES = 1 << 28
_TIMEOUT_S = 30.0
_PARTIAL = 206  # HTTP status of a response with the requested byte range


@dataclass(frozen=True)
class Repository:
    """A data set on the Hub at one commit. endpoint: None for that of the environment."""

    name: str
    commit: str
    endpoint: str | None = None

    def fetch(self, file: str, most_bytes: int | None = None) -> Path:
        """Return the local path of a file, downloading it unless it is in the Hub's cache. Raises DataError."""
        return fetch(self.name, file, self.commit, DataError, self.endpoint, most_bytes=most_bytes, repo_type="dataset")

    def read_tail(self, file: str, size: int, tail_bytes: int) -> bytes:
        """Return the last `tail_bytes` of a file of `size` bytes.

        Requests only this range; if the server ignores ranges, downloads the whole file into the cache.
        """
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        url = hf_hub_url(self.name, file, repo_type="dataset", revision=self.commit, endpoint=self.endpoint)
        headers = build_hf_headers() | {"Range": f"bytes={max(0, size - tail_bytes)}-{size - 1}"}

        def read() -> bytes | None:
            options: Any = {"headers": headers, "follow_redirects": True, "timeout": _TIMEOUT_S}
            with get_session().stream("GET", url, **options) as response:
                hf_raise_for_status(response)
                return response.read() if response.status_code == _PARTIAL else None

        with answers_of(tail_bytes):
            tail = persist(read, f"{self.name}: {file}", DataError, self.endpoint)
        if tail is not None:
            return tail
        with trusted.open_regular(in_cache(self.fetch(file, size))) as whole:
            whole.seek(max(0, size - tail_bytes))
            return whole.read(tail_bytes)

    def read_footer(self, file: str, size: int) -> Footer:
        """Return the footer of a shard without its data (parquet ends with footer, its length in 4 bytes, `PAR1`)."""
        import pyarrow as pa

        tail = self.read_tail(file, size, _FOOTER_BYTES)
        needed = struct.unpack("<I", tail[-8:-4])[0] + 8 if len(tail) >= 8 else 0
        if len(tail) < needed <= min(size, _MOST_FOOTER_BYTES):
            tail = self.read_tail(file, size, needed)
        return read_footer(pa.BufferReader(tail), f"{self.name}: {file}")


@dataclass(frozen=True)
class Index:
    """The facts about a split that are needed before any shard is downloaded: its files with digests and row counts."""

    commit: Annotated[str, Field(pattern=r"^[\w-]+$")]
    files: list[Name]
    digests: list[str]
    rows: list[Count]
    has_manifest: bool
    has_tokenizer: bool


class Shards:
    """A function from shard number to local path; downloads shard k + 1 in advance while shards are read in order."""

    def __init__(self, repository: Repository, files: list[str]):
        self._files, self._asked = files, set[int]()
        self._ahead: Ahead[int, Path] = Ahead(lambda shard: repository.fetch(files[shard]))

    def __call__(self, shard: int) -> Path:
        path = self._ahead.take(shard)
        if not self._asked or shard - 1 in self._asked:
            self._prefetch(shard + 1)
        self._asked.add(shard)
        return path

    def _prefetch(self, shard: int) -> None:
        if shard < len(self._files) and shard not in self._asked:
            self._ahead.start(shard)


@SOURCES.add("hub")
def open_hub(
    place: str,
    *,
    split: str = "train",
    row_length: int | None = None,
    cache_dir: Path | None = None,
    endpoint: str | None = None,
    **_: Any,
) -> ShardedRows:
    """Open a split of the data set `owner/name` or `owner/name@revision`.

    Raises NoSplit if it has no such split, or in offline mode if the split was never opened on this machine.
    """
    name, revision = place.partition("@")[::2]
    cached = (cache_dir or cache_folder()) / "hub" / f"{name.replace('/', '--')}@{revision or 'main'}--{split}.json"
    index = _load(cached)
    if is_offline():
        if index is None:
            raise NoSplit(
                f"{name}: offline mode (HF_HUB_OFFLINE) is on, and this machine has never opened the split {split!r} of "
                "this data set; switch it off once, or use local data"
            )
    else:
        commit = _commit(name, revision or "main", endpoint)
        if index is None or index.commit != commit:
            index = _survey(Repository(name, commit, endpoint), split, row_length)
            _save(index, cached)
    return _open(Repository(name, index.commit, endpoint), index, split, row_length)


def _open(repository: Repository, index: Index, split: str, row_length: int | None) -> ShardedRows:
    manifest = _manifest(repository) if index.has_manifest else None
    if manifest is not None:
        check_length(manifest.row_length, row_length or 0, repository.name)
        split = canonical(split)
        if [shard.file for shard in manifest.splits.get(split, [])] != index.files:
            raise DataError(
                f"{repository.name}: its manifest and its list of files in the cache differ; delete the latter"
            )
        fingerprint = rows_fingerprint(manifest, split)
    else:
        fingerprint = digest_of(zip(index.digests, index.rows))
    tokenizer = repository.fetch("tokenizer.json").resolve() if index.has_tokenizer else None
    return ShardedRows(
        [f"{repository.name}: {file}" for file in index.files],
        index.rows,
        Shards(repository, index.files),
        fingerprint=fingerprint,
        row_length=row_length,
        manifest=manifest,
        split=split,
        tokenizer_file=tokenizer,
        tokenizer_sha256=None if tokenizer is None else hashlib.sha256(trusted.read_bytes(tokenizer)).hexdigest(),
    )


def _commit(name: str, revision: str, endpoint: str | None) -> str:
    from huggingface_hub import HfApi

    info = persist(
        lambda: HfApi(endpoint=endpoint).dataset_info(name, revision=revision),
        f"{name} at {revision}",
        DataError,
        endpoint,
    )
    if info.sha is None:
        raise DataError(f"{name}: the server names no commit for the revision {revision!r}")
    return info.sha


def list_files(name: str, revision: str | None) -> tuple[str, dict[str, tuple[int, str | None]]]:
    """Return the commit of a revision of a data set, and for each file its size in bytes and, if large, its sha-256."""
    if is_offline():
        raise DataError(
            f"{name}: its files cannot be listed in offline mode (HF_HUB_OFFLINE); name files on this machine"
        )
    commit = _commit(name, revision or "main", None)
    entries = _tree(Repository(name, commit))
    return commit, {path: (entry.size, entry.lfs.oid if entry.lfs else None) for path, entry in entries.items()}


def _tree(repository: Repository) -> dict[str, TreeEntry]:
    """Return the files of a data set at its commit, by path."""
    return file_list(repository.name, repository.commit, "dataset", DataError, repository.endpoint)


def _survey(repository: Repository, split: str, row_length: int | None) -> Index:
    """List the files of a data set and return the index of the split, with the row count of each shard."""
    listed = _tree(repository)
    manifest = _manifest(repository) if FILE in listed else None
    if manifest is not None:
        rows = {shard.file: shard.rows for shard in manifest.splits.get(canonical(split), [])}
    else:
        files = shards_of(list(listed), split, repository.name)
        rows = dict(zip(files, _count_rows(repository, [(file, listed[file].size) for file in files], row_length)))
    if missing := [file for file in rows if file not in listed]:
        raise DataError(f"{repository.name}: its manifest names {', '.join(missing)}, which {_are(missing)} not there")
    if not rows:
        raise no_shards(repository.name, split, listed)
    entries = [listed[file] for file in rows]
    digests = [entry.lfs.oid if entry.lfs else entry.oid for entry in entries]
    return Index(
        repository.commit, list(rows), digests, list(rows.values()), manifest is not None, "tokenizer.json" in listed
    )


def _are(files: list[str]) -> str:
    return "is" if len(files) == 1 else "are"


def _count_rows(repository: Repository, shards: list[tuple[str, int]], row_length: int | None) -> list[int]:
    if not shards:
        return []
    first, last = (repository.read_footer(*shard) for shard in (shards[0], shards[-1]))
    check_length(first.lengths_G.min(initial=float("inf")), row_length or 0, f"{repository.name}: {shards[0][0]}")
    return [first.rows] * (len(shards) - 1) + [last.rows]


def _manifest(repository: Repository) -> Manifest | None:
    return parse_manifest(trusted.read_bytes(in_cache(repository.fetch(FILE))), f"{repository.name}: {FILE}")


def _load(path: Path) -> Index | None:
    try:
        index = trusted.read_json(path, Index)
    except FileError:
        return None  # it can be made again
    return index if 0 < len(index.files) == len(index.digests) == len(index.rows) else None


def _save(index: Index, path: Path) -> None:
    with written(path) as file:
        file.write(json.dumps(asdict(index)).encode())
