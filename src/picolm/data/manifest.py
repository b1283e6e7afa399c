"""The shards in a folder: its `manifest.json` with their content and origin, and the split that each file belongs to.

A split is a whole word in the name of a file, or of a folder below the given path, at any separator and in any case:
`train-00000-of-00002.parquet`, `Corpus.VALID.parquet`, `dev/0001.parquet`. A split in the file name takes precedence
over one in the name of a folder.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
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


_SPLITS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "dev",
    "development": "dev", "test": "test", "testing": "test", "eval": "eval", "evaluation": "eval", "heldout": "heldout",
    "holdout": "heldout",
}  # fmt: skip
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_NAMED = 5


class NoSplit(DataError):
    """The error for a data set that has no rows of the requested split."""


def canonical(split: str) -> str:
    """Return the standard name of a split: `val` for valid and validation; other names unchanged."""
    return _SPLITS.get(split.lower(), split)


def split_of(file: str) -> str | None:
    """Return the split named in the relative path of a file, or None. Raises DataError if a name has two splits."""
    path = PurePosixPath(file)
    for part in (path.stem, *reversed(path.parts[:-1])):
        joined = re.sub(r"(?i)held[^a-z]out", "heldout", part)
        found = {_SPLITS[word] for word in map(str.lower, _WORD.findall(joined)) if word in _SPLITS}
        if len(found) > 1:
            raise DataError(f"{file}: {part!r} names several splits ({', '.join(sorted(found))}); rename it")
        if found:
            return found.pop()
    return None


def shards_of(files: Iterable[str], split: str, name: str) -> list[str]:
    """Return the parquet files of a split, sorted by name. If no file is named train, files without a split are train.

    files: paths relative to the data set `name`. Raises DataError for train if some files are named train and others
    have no split in their names.
    """
    shards, wanted = sorted(file for file in files if is_parquet(file)), canonical(split)
    if wanted not in _SPLITS.values():
        return [file for file in shards if PurePosixPath(file).name.startswith((f"{split}-", f"{split}."))]
    splits = {file: split_of(file) for file in shards}
    named = [file for file in shards if splits[file] == wanted]
    unnamed = [file for file in shards if splits[file] is None]
    if wanted != "train":
        return named
    if named and unnamed:
        raise DataError(
            f"{name}: {len(unnamed)} of its shards name no split, others are called train ({_some(named)}), so it cannot be "
            f"told what to train on: {_some(unnamed)}; rename them, or name the shards that are meant with a glob"
        )
    return named or unnamed


def no_shards(name: str, split: str, files: Iterable[str]) -> NoSplit:
    """Return the error for a data set that has no files of the requested split."""
    found = sorted({str(split_of(file) or "train") for file in files if is_parquet(file)})
    others = f"; it has shards of {', '.join(found)}" if found else ""
    return NoSplit(f"{name}: has no parquet shards of the split {split!r}{others} (expected {split}-*.parquet)")


def is_parquet(file: str) -> bool:
    """Return whether the name of a file ends in `.parquet`, in any case."""
    return file.lower().endswith(".parquet")


def shards_in(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the parquet files that belong to a folder, and those in other folders below it, which are not read.

    A file belongs to a folder if it is directly in it, in its `data/`, or in a subfolder of these two that is named
    after a split.
    """
    own, other = list[Path](), list[Path]()
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = PurePosixPath(Path(parent).relative_to(folder).as_posix())
        parts = relative.parts[1:] if relative.parts[:1] == ("data",) else relative.parts
        is_own = not parts or (len(parts) == 1 and split_of(f"{parts[0]}/x") is not None)
        found = [Path(parent) / name for name in files if is_parquet(name) and not name.startswith(".")]
        (own if is_own else other).extend(found)
    return own, other


def matching(pattern: str) -> tuple[Path, list[Path]]:
    """Return the folder in which a glob begins, and the files that match it; `**` matches any number of folders.

    Leading folders that exist are taken literally, even if their names contain wildcards. A file that `**` finds
    several times, because of links, is returned once.
    """
    begin, rest = Path(pattern).anchor, list(Path(pattern).parts)
    base = Path(begin)
    while len(rest) > 1 and (base / rest[0]).is_dir():
        base /= rest.pop(0)
    found = glob.glob(str(Path(glob.escape(str(base)), *rest)), recursive=True)
    files = sorted(Path(file) for file in found if os.path.isfile(file))
    if "**" in rest:
        files = list({file.resolve(): file for file in reversed(files)}.values())[::-1]
    return base, files


def _some(files: Sequence[str]) -> str:
    return ", ".join(files[:_NAMED]) + (", …" if len(files) > _NAMED else "")
