"""The hidden work folder in which rows are prepared, unit by unit, until the finished rows get their final name."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from picolm import trusted
from picolm.data.manifest import Manifest, read_manifest
from picolm.data.shards import written
from picolm.errors import DataError

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
    out.parent.mkdir(parents=True, exist_ok=True)
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
            shutil.rmtree(plan.folder, ignore_errors=True)
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
    shutil.rmtree(plan.folder, ignore_errors=True)
    return manifest
