"""The file `manifest.json` in a folder of prepared shards: their content and origin, so nothing must be scanned."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from picolm import trusted
from picolm.errors import DataError, FileError, FileMissing

FORMAT = "picolm-rows-1"
FILE = "manifest.json"


_TOKENIZER = {"file": str, "sha256": str, "vocab_size": int, "eos_token": str, "eos_id": int}


def _inside(file: str) -> str:
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts or not path.name or "\\" in file or not file.isprintable():
        raise ValueError("should be the name of a file in the folder of the manifest")
    return file


def _tokenizer(value: dict[str, Any]) -> dict[str, Any]:
    for key, kind in _TOKENIZER.items():
        if type(value.get(key)) is not kind:
            raise ValueError(f"{key} should be {'text' if kind is str else 'a whole number'}")
    if not 0 <= value["eos_id"] < value["vocab_size"] <= 1 << 31:
        raise ValueError("eos_id should be below vocab_size")
    _inside(value["file"])
    return value


Count = Annotated[int, Field(ge=0, le=1 << 48)]
Name = Annotated[str, AfterValidator(_inside)]


@dataclass(frozen=True)
class Shard:
    """One file of rows. sha256: of the file; content: sha-256 of its rows (tokens, then labels), before compression."""

    file: Name
    rows: Count
    bytes: Count
    sha256: str
    content: str
    max_token: Count


@dataclass(frozen=True)
class Manifest:
    """The content of a folder of prepared rows.

    recipe: all that determines the rows (digest of the inputs, tokenizer, options); it identifies the folder.
    tokenizer: file, sha256, vocab_size, eos_token, eos_id, and config_sha256 (of tokenizer_config.json) if known.
    sources: number of documents per source, and of rows per source and split. documents: number of documents in the
    rows; for a mixture, in its parts. tokens: in all rows. dropped_tokens: in tails too short for a row. bad_lines:
    lines that were skipped; first_bad_lines: the first few. left_out: documents removed, per filter and as duplicates.
    not_read: files in the given folders that were not read, per reason; first_not_read: the first few. outside: links
    that were followed out of these folders. nul_characters: in the texts; files_with_nul: the first files that contain
    them. lost_characters: characters for which the tokenizer has no token; most_lost: the most frequent ones.
    """

    row_length: Annotated[int, Field(ge=1, le=1 << 28)]
    recipe: dict[str, Any]
    tokenizer: Annotated[dict[str, Any], AfterValidator(_tokenizer)]
    splits: dict[str, list[Shard]]
    sources: dict[str, dict[str, Count]] = field(default_factory=dict)
    documents: Count = 0
    tokens: Count = 0
    dropped_tokens: Count = 0
    bad_lines: Count = 0
    first_bad_lines: list[str] = field(default_factory=list)
    left_out: dict[str, Count] = field(default_factory=dict)
    not_read: dict[str, Count] = field(default_factory=dict)
    first_not_read: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    nul_characters: Count = 0
    files_with_nul: list[str] = field(default_factory=list)
    lost_characters: Count = 0
    most_lost: dict[str, Count] = field(default_factory=dict)
    format: str = FORMAT

    @property
    def seq_len(self) -> int:
        """The number of inputs in a row: one less than its tokens."""
        return self.row_length - 1

    def rows(self, split: str) -> int:
        """Return the number of rows of a split."""
        return sum(shard.rows for shard in self.splits.get(split, []))

    def to_json(self) -> str:
        """Return the text of the file."""
        return json.dumps({"format": self.format, "seq_len": self.seq_len, **asdict(self)}, indent=1) + "\n"


def parse_manifest(data: bytes | str, name: str) -> Manifest | None:
    """Return the manifest in a file's content; None if another program wrote the file.

    Raises FileError if it is damaged, and DataError if it has a format that this version cannot read.
    """
    try:
        content = trusted.parse_json(data, name)
        form = content.get("format", "") if isinstance(content, dict) else ""
        if form == FORMAT:
            manifest: Manifest = trusted.parse_json(data, name, Manifest)
    except FileError as error:
        advice = "prepare or fetch the data again, or delete this file to use the shards alone"
        raise FileError(f"{error}\n{name}: is damaged; {advice}") from None
    if form != FORMAT:
        if str(form).startswith("picolm-rows-"):
            raise DataError(f"{name}: is of the format {form}; this version reads {FORMAT}")
        return None
    for source, counts in manifest.sources.items():
        if missing := {"documents", *(f"{split}_rows" for split in manifest.splits)} - counts.keys():
            raise FileError(f"{name}: sources.{source}: has no {min(missing)}; prepare or fetch the data again")
    return manifest


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a folder, None if it has none. Raises like `parse_manifest`."""
    path = folder / FILE
    return parse_manifest(trusted.read_bytes(file_of(folder, FILE)), str(path)) if os.path.lexists(path) else None


def file_of(folder: Path, name: str) -> Path:
    """Return the path of a file named in the manifest of a folder. Raises FileError unless it is a regular file there.

    A folder in the cache of the Hub consists of links to the blobs of its repository; these are followed.
    """
    path, blobs = folder / name, folder.resolve().parent.parent / "blobs"
    if path.is_symlink() and folder.resolve().parent.name == "snapshots" and path.resolve().parent == blobs:
        path = path.resolve()
        trusted.require_regular(path, blobs)
    else:
        trusted.require_regular(path, folder)
    return path


def damaged_files(folder: Path, manifest: Manifest, shards: Iterable[Shard]) -> list[str]:
    """Return a message for each missing or changed file: `shards` by size, the tokenizer's files by digest."""
    problems = []
    for shard in shards:
        try:
            size = file_of(folder, shard.file).stat().st_size
        except FileMissing:
            problems.append(f"{folder / shard.file}: is missing, though the manifest lists it")
        except FileError as error:
            problems.append(str(error))
        else:
            if size != shard.bytes:
                problems.append(f"{folder / shard.file}: has {size} bytes, the manifest says {shard.bytes} bytes")
    for key, name in (("sha256", manifest.tokenizer["file"]), ("config_sha256", "tokenizer_config.json")):
        stated = manifest.tokenizer.get(key)
        try:
            found = hashlib.sha256(trusted.read_bytes(file_of(folder, name))).hexdigest() if stated else stated
        except FileMissing:
            problems.append(f"{folder / name}: is missing, though the manifest lists it")
        except FileError as error:
            problems.append(str(error))
        else:
            if found != stated:
                what = "tokenizer that made the rows" if key == "sha256" else "file that belongs to the rows"
                problems.append(f"{folder / name}: is not the {what} (sha-256 {found}, in the manifest {stated})")
    return problems


def digest_of(parts: Iterable[Any]) -> str:
    """Return the sha-256 of JSON-serializable values, in their order."""
    return hashlib.sha256(json.dumps(list(parts), sort_keys=True).encode()).hexdigest()
