"""Folders made by commands: filled under a temporary name, then renamed, so that they are complete or not there at all.

Only what the same call has made is deleted.
"""

import logging
import os
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from picolm.errors import StoreError
from picolm.store.files import disk_errors, sync_directory
from picolm.store.manifest import RUN
from picolm.trusted import remove_folder

log = logging.getLogger("picolm")


@contextmanager
def new_folder(out: Path, what: str) -> Iterator[Path]:
    """Yield an empty folder beside `out` to fill; at the end of the block it is renamed to `out`.

    what: the thing that is written, for messages. Raises StoreError when `out` is not empty or cannot be written. In
    that case, and when the block raises, the new folder is deleted and `out` stays as it was.
    """
    out = Path(os.path.realpath(out))  # a link to an empty folder: the user made that folder
    with disk_errors(what, out):
        refuse_content(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        _tell_of_leftovers(out)
        partial = out.with_name(f"{_prefix(out)}{uuid.uuid4().hex[:8]}")
        partial.mkdir()
        try:
            yield partial
            refuse_content(out)
            os.rename(partial, out)
            sync_directory(out.parent)
        finally:
            remove_folder(partial)


def refuse_content(out: Path) -> None:
    """Raise StoreError unless `out` does not exist or is an empty folder.

    Raises OSError for a name that the file system does not allow.
    """
    try:
        os.lstat(out)
    except FileNotFoundError:
        return
    if not out.is_dir():
        raise StoreError(f"{out} is there already, and is no folder; choose another name")
    held = {path.name for path in out.iterdir()}
    if RUN in held:
        raise StoreError(f"{out} holds a run already, and nothing in it is replaced; choose another name")
    if held:
        raise StoreError(
            f"{out} is there already (it holds {min(held)}), and nothing in it is replaced; choose another name"
        )


def others_in(folder: Path, known: Collection[str]) -> list[str]:
    """Return the names, relative to `folder`, of the files in it that are not `known`: others put them there."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
    return [name for path in found if (name := path.relative_to(folder).as_posix()) not in known]


def move_others(old: Path, new: Path, known: Collection[str]) -> None:
    """Move the files that are not `known` from a folder that is going to be deleted to its replacement `new`.

    A file whose name exists in `new` is not moved.
    """
    for name in others_in(old, known):
        target = new / name
        if not os.path.lexists(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(old / name, target)


def _prefix(out: Path) -> str:
    return f".{out.name[:100]}.partial-"


def _tell_of_leftovers(out: Path) -> None:
    for path in out.parent.iterdir():
        if path.name.startswith(_prefix(out)):
            log.warning("%s was left by a command that was killed; delete it if no other one is at work there.", path)
