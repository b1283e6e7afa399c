"""The recipe of prepared rows, and the hidden work folder in which they are prepared.

The recipe is all that determines the rows, and so the identity of a prepared folder. They are prepared unit by unit, until
the finished rows get their final name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from picolm import trusted
from picolm.data.documents import TextFile, is_remote
from picolm.data.filters import identity
from picolm.data.manifest import Manifest, damaged_files, read_manifest
from picolm.data.shards import written
from picolm.data.tokenizer import Vocabulary, check_size
from picolm.errors import DataError

VERSION = 2  # version of the row order; version 1 shuffled documents and rows, both by sorting


def recipe_of(
    files: Sequence[TextFile],
    vocabulary: Vocabulary | None,
    *,
    vocab_size: int,
    seq_len: int,
    seed: int,
    val_fraction: float,
    val_last: float,
    filters: Sequence[str],
    deduplicate: bool,
) -> dict[str, Any]:
    """Return the recipe of the rows, with an empty digest of the inputs. Raises DataError for invalid options."""
    if seq_len < 1:
        raise DataError(f"seq_len is {seq_len}; a row needs at least one input token")
    for name, share, whole in (
        ("val_fraction", val_fraction, "the documents"),
        ("val_last", val_last, "each document"),
    ):
        if not 0 <= share < 1:
            raise DataError(f"{name} is {share}; it is a share of {whole}, from 0 up to, but not including, 1")
    given = any(file.held_out for file in files)
    if (val_fraction > 0) + (val_last > 0) + given > 1:
        raise DataError("what is held out is said in two ways; choose one of val, val_fraction and val_last")
    if vocabulary is None:
        check_size(vocab_size)
        tokenizer = "trained"
    else:
        assert vocabulary.file is not None
        tokenizer = hashlib.sha256(trusted.read_bytes(vocabulary.file.resolve())).hexdigest()
    optional = {
        "filters": [identity(text) for text in filters], "deduplicate": deduplicate, "val_given": given, "val_last": val_last,
    }  # fmt: skip
    return {
        "inputs": "", "tokenizer": tokenizer, "vocab_size": vocab_size if vocabulary is None else None, "seq_len": seq_len,
        "seed": seed, "val_fraction": val_fraction, "version": VERSION,
    } | {name: value for name, value in optional.items() if value}  # fmt: skip


def is_free(out: Path) -> bool:
    """Return whether `out` does not exist or is an empty folder."""
    return not out.exists() or (out.is_dir() and not any(out.iterdir()))


def already_there(out: Path, recipe: dict[str, Any]) -> Manifest:
    """Return the manifest of `out` if it has this recipe, in any version. Raises DataError if it holds other data."""
    manifest = read_manifest(out) if out.is_dir() else None
    if manifest is None:
        raise DataError(f"{out}: is there already and holds something else; choose another folder or delete it")
    if differences := _differences(manifest.recipe, recipe):
        raise DataError(f"{out}: holds rows made in another way ({differences}); choose another folder or delete it")
    if problems := damaged_files(out, manifest, (shard for shards in manifest.splits.values() for shard in shards)):
        raise DataError("\n".join([*problems, f"{out}: is not whole; delete it and prepare it again"]))
    return manifest


def check_apart(out: Path, paths: Iterable[str | Path]) -> None:
    """Raise DataError if `out` is inside a folder of `paths` or the reverse: next time, `out` would be read as text."""
    for path in paths:
        place = Path(path).expanduser()
        if is_remote(path) or not place.exists():
            continue
        if place.is_dir() and out.resolve().is_relative_to(place.resolve()):
            raise DataError(f"{out}: lies inside of {path}, which is read; choose a folder outside of it")
        if place.resolve().is_relative_to(out.resolve()):
            raise DataError(f"{path}: lies inside of {out}, which is to be made; choose another folder for the result")


def _differences(there: dict[str, Any], asked: dict[str, Any]) -> str:
    return ", ".join(
        "other text" if key == "inputs" else f"{key} {there.get(key)} there, {asked.get(key)} asked for"
        for key in {**asked, **there}
        if there.get(key) != asked.get(key) and key != "version"
    )


_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_REPORT_BYTES = 1 << 30
Report = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The settings that a process needs to do a unit of work. folder: the hidden work folder."""

    folder: Path
    row_length: int
    seed: int
    filters: tuple[str, ...]
    val_last: float
    piece_bytes: int
    unit_bytes: int
    rows_per_shard: int

    def path(self, *parts: str | int) -> Path:
        """Return a path in the work folder; numbers are written with leading zeros."""
        return self.folder.joinpath(*(f"{part:06d}" if isinstance(part, int) else part for part in parts))

    def is_done(self, *parts: str | int) -> bool:
        """Return whether a unit is done: its report exists."""
        return self.path("reports", *parts).is_file()

    def finish(self, report: Report, *parts: str | int) -> Report:
        """Write the report of a unit, which marks it as done. Returns the report."""
        with written(self.path("reports", *parts)) as file:
            file.write(json.dumps(report).encode())
        return report

    def report(self, *parts: str | int) -> Report:
        """Return the report of a unit. Raises FileError if it is missing or damaged."""
        path = self.path("reports", *parts)
        return dict(trusted.parse_json(trusted.read_bytes(path, self.folder, _REPORT_BYTES), str(path), dict[str, Any]))


class Unusable(DataError):
    """The error for text that cannot become rows with these options; trying again does not help."""


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Wait for and hold a lock, so that only one process prepares `out`. No lock if the file system has none."""
    trusted.make_folder(out.parent)
    lock = FileLock(out.parent / f".{out.name}.lock", fallback_to_soft=False)
    os.close(trusted.open_to_append(Path(lock.lock_file)))  # refuses a link
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    try:
        yield
    finally:
        with suppress(OSError):  # while it is held: a process that waits for a removed file makes a new one
            os.unlink(lock.lock_file)
        lock.release()


def require_plain(folder: Path) -> None:
    """Raise DataError if a work folder is not a folder, or contains anything but folders and regular files."""
    inside = (Path(root, name) for root, folders, files in os.walk(folder) for name in (*folders, *files))
    for path in (folder, *inside):
        with suppress(FileNotFoundError):
            mode = path.lstat().st_mode
            if not stat.S_ISDIR(mode) and (path == folder or not stat.S_ISREG(mode)):
                raise DataError(
                    f"{path}: is not a {'folder' if path == folder else 'regular file'} of unfinished work; delete {folder}"
                )


@contextmanager
def explained(plan: Plan, out: Path) -> Iterator[None]:
    """After an error in the block, delete work that cannot be resumed, or say where the unfinished work is kept.

    Raises DataError with the original message.
    """
    try:
        yield
    except (DataError, OSError) as error:
        message = f"{out}: cannot be written ({error})" if isinstance(error, OSError) else str(error)
        if isinstance(error, Unusable) or not plan.path("reports").is_dir():
            trusted.remove_folder(plan.folder)
            raise DataError(
                message + ("; nothing of it was left behind" if isinstance(error, OSError) else "")
            ) from error
        raise DataError(
            f"{message}; what is done is kept in {plan.folder}: the same command continues there, or delete it"
        ) from error


def publish(plan: Plan, out: Path) -> Manifest:
    """Rename the finished rows to `out` and delete the work folder. Returns the manifest."""
    result = plan.path("result")
    manifest = read_manifest(result)
    assert manifest is not None
    for torn in result.glob(".*"):
        torn.unlink()  # temporary files of killed processes
    if out.is_dir():
        out.rmdir()  # an empty one
    result.rename(out)
    trusted.remove_folder(plan.folder)
    return manifest
