"""Find the files of a data set in a folder or by a glob, and the split of each file from its name.

A split is a whole word in the name of a file, or of a folder below the given path, at any separator and in any case:
`train-00000-of-00002.parquet`, `Corpus.VALID.parquet`, `dev/0001.parquet`. A split in the file name takes precedence
over one in the name of a folder.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from picolm.errors import DataError

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
