"""Carrying out a job: alone, from where it was left, and with its folder under its name only when it is whole."""

from __future__ import annotations

import errno
import glob
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from picolm.data.job import Job, Progress, Stage, run_stage
from picolm.data.manifest import FILE, Manifest, read_manifest
from picolm.errors import DataError

Executor = Callable[[Job, Sequence[Stage], Progress], bool]
"""Does the stages of a job, or sees to it that they are done; tells whether they are."""

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_LAST = "finish"


def in_this_process(job: Job, stages: Sequence[Stage], progress: Progress) -> bool:
    """One unit after the other."""
    for stage in stages:
        run_stage(job, stage, progress)
    return True


def carry_out(
    job: Job,
    stages: Sequence[Stage],
    there: Callable[[], Manifest | None],
    start: Callable[[], None],
    progress: Progress,
    executor: Executor | None = None,
) -> Manifest | None:
    """The manifest of the finished folder; None while others are at it. there: looks whether it is finished already.

    Another process that is at the same job is waited for. Raises DataError; what is done is kept where it can be of use.
    """
    if (manifest := there()) is None:
        _require_plain(job.folder)
        with _alone(job.folder):
            if (manifest := there()) is None:
                with _explained(job, stages):
                    start()
                    if not (executor or in_this_process)(job, stages, progress):
                        return None
                manifest = read_manifest(job.out)
    _sweep(job.out)
    shutil.rmtree(job.folder, ignore_errors=True)
    assert manifest is not None
    return manifest


def publish(job: Job, manifest: Manifest) -> None:
    """Write the manifest, and give the folder of shards its name."""
    result = job.path("result")
    if not result.is_dir() and read_manifest(job.out) is not None:
        return  # it had its name already when the process ended
    for torn in result.glob(".*"):
        torn.unlink()  # what a process that was killed was writing
    (result / FILE).write_text(manifest.to_json(), encoding="utf-8")
    if job.out.is_dir():
        job.out.rmdir()  # an empty one
    result.rename(job.out)
    for used in ("rows", "duplicates", "documents"):
        shutil.rmtree(job.path(used), ignore_errors=True)


def _require_plain(folder: Path) -> None:
    """Raise DataError where a work folder, which is gone on with, is or holds anything but folders and regular files."""
    inside = (Path(root, name) for root, folders, files in os.walk(folder) for name in (*folders, *files))
    for path in (folder, *inside):
        with suppress(FileNotFoundError):  # another process is at the same job, and moves its files
            mode = path.lstat().st_mode
            if not stat.S_ISDIR(mode) and (path == folder or not stat.S_ISREG(mode)):
                raise DataError(
                    f"{path}: is no {'folder' if path == folder else 'regular file'} of a job; delete {folder}"
                )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Make a folder, and wait until no other process of this user is at work in it."""
    lock = FileLock(folder / "lock", fallback_to_soft=False)
    while not lock.is_locked:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except FileNotFoundError:
            continue  # the other one has just finished, and cleared it away
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            break
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _explained(job: Job, stages: Sequence[Stage]) -> Iterator[None]:
    """Clear away what cannot be of use after a failure, and say of the rest where it is."""
    try:
        yield
    except (DataError, OSError) as error:
        spread = [stage for stage in stages if not stage.is_single]
        at_fault = next((stage for stage in stages if not _is_finished(job, stage)), stages[-1])
        hopeless = isinstance(error, DataError) and at_fault.is_single
        started = any(job.is_done(stage.name, 0) for stage in spread)
        message = f"{job.out}: cannot be written ({error})" if isinstance(error, OSError) else str(error)
        if hopeless or not started:
            shutil.rmtree(job.folder, ignore_errors=True)
            raise DataError(
                message + ("; nothing of it was left behind" if isinstance(error, OSError) else "")
            ) from error
        raise DataError(
            f"{message}; what is done is kept in {job.folder}: the same command goes on from there, or delete it"
        ) from error


def _is_finished(job: Job, stage: Stage) -> bool:
    return all(job.is_done(stage.name, unit) for unit in range(stage.units(job)))


def _sweep(out: Path) -> None:
    """Remove what jobs that made this folder left beside it."""
    for folder in out.parent.glob(f".{glob.escape(out.name)}.????????????"):
        if (folder / "reports" / _LAST / f"{0:06d}.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
