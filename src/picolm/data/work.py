"""The hidden folder in which rows are prepared: parts of the work that are whole or absent, and its end under another name."""

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
    """What a process has to know to do a part of the work. folder: where all that is unfinished lies."""

    folder: Path
    row_length: int
    seed: int
    filters: tuple[str, ...]
    val_last: float
    piece_bytes: int
    unit_bytes: int
    rows_per_shard: int

    def path(self, *parts: str | int) -> Path:
        """Return where a part of the work lies; numbers are written with leading zeros."""
        return self.folder.joinpath(*(f"{part:06d}" if isinstance(part, int) else part for part in parts))

    def is_done(self, *parts: str | int) -> bool:
        """Return whether a part of the work has its report."""
        return self.path("reports", *parts).is_file()

    def finish(self, report: Report, *parts: str | int) -> Report:
        """Write the report of a part of the work."""
        with written(self.path("reports", *parts)) as file:
            file.write(json.dumps(report).encode())
        return report

    def report(self, *parts: str | int) -> Report:
        """Return the report of a part of the work. Raises FileError where it is damaged."""
        path = self.path("reports", *parts)
        return dict(trusted.parse_json(trusted.read_bytes(path, self.folder, _REPORT_BYTES), str(path), dict[str, Any]))


class Unusable(DataError):
    """Text that cannot become rows as it is asked for, whoever tries again."""


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Wait until no other process prepares `out`. Where the file system has no locks, do not wait."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out.parent / f".{out.name}.lock", fallback_to_soft=False)
    os.close(trusted.open_to_append(Path(lock.lock_file)))  # it is no link
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
    """Raise DataError where a work folder is, or holds, anything but folders and regular files."""
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
    """After a failure, remove what is of no use any more, and say of the rest where it is."""
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
    """Give the finished folder of rows its name. Returns its manifest."""
    result = plan.path("result")
    manifest = read_manifest(result)
    assert manifest is not None
    for torn in result.glob(".*"):
        torn.unlink()  # what a process that was killed was writing
    if out.is_dir():
        out.rmdir()  # an empty one
    result.rename(out)
    shutil.rmtree(plan.folder, ignore_errors=True)
    return manifest
