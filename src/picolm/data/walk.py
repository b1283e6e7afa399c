"""Find the files below a folder of texts: follow links, visit each real folder once, and list all that is not read."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

_NAMED = 5


class Walked(NamedTuple):
    """The result of `walk`.

    files: files to read, sorted by relative name. not_read: (reason, relative name). outside: links that lead out.
    """

    files: list[Path]
    not_read: list[tuple[str, str]]
    outside: list[str]


def walk(folder: Path, is_wanted: Callable[[Path], bool]) -> Walked:
    """Find the files below a folder, except hidden ones. Links to folders are followed; each real folder is read once.

    Links are followed after all real folders, so a folder keeps its own name even if a link leads to it.
    """
    root, seen, found = folder.resolve(), set[tuple[int, int]](), Walked([], [], [])

    def name_of(path: str | Path) -> str:
        return Path(path).relative_to(folder).as_posix()

    def read(start: Path) -> list[Path]:
        """Add the files below `start` to `found`, and return the links to folders there."""
        links = list[Path]()
        unreadable = lambda error: found.not_read.append(("cannot be read", name_of(error.filename)))  # noqa: E731
        for parent, folders, files in os.walk(start, onerror=unreadable):
            if (identity := _identity(parent)) in seen:
                folders.clear()
                continue
            seen.add(identity)
            inside = [Path(parent, name) for name in folders if not name.startswith(".")]
            links += [path for path in inside if path.is_symlink()]
            folders[:] = [path.name for path in inside if not path.is_symlink()]
            for path in (Path(parent, name) for name in files if not name.startswith(".")):
                if why := _why_not(path, is_wanted):
                    found.not_read.append((why, name_of(path)))
                    continue
                found.files.append(path)
                if path.is_symlink() and not path.resolve().is_relative_to(root):
                    found.outside.append(name_of(path))
        return links

    waiting = read(folder)
    while waiting:
        links = list[Path]()
        for start in sorted(waiting):
            if not start.resolve().is_relative_to(root) and _identity(start) not in seen:
                found.outside.append(name_of(start))
            links += read(start)
        waiting = links
    found.files.sort(key=name_of)
    found.not_read.sort(key=lambda entry: entry[1])
    return found


def counted(not_read: list[tuple[str, str]]) -> tuple[dict[str, int], list[str]]:
    """Return the number of unread files per reason, and the first of their names."""
    return dict(sorted(Counter(why for why, _ in not_read).items())), [visible(name) for _, name in not_read[:_NAMED]]


def visible(name: str) -> str:
    """Return the name of a file as valid text, with replacements for bytes that are not UTF-8."""
    return os.fsencode(name).decode("utf-8", "replace")


def _why_not(path: Path, is_wanted: Callable[[Path], bool]) -> str:
    """Return the reason why a file is not read; empty if it is read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return "not a regular file"
    except OSError:
        return "link to nothing" if path.is_symlink() else "cannot be read"
    return "" if is_wanted(path) else visible(path.suffix.lower()) or "no ending"


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino
