"""Paths of a camp replaced by links to things outside, by pipes and by devices; and what is outside, watched."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

SECRET = "sentinel-0f9d2c"
COPY = "a link to its copy"
# Names with a process or a random number in them cannot be foreseen by one who lays a link.
UNFORESEEN = ("partial-", ".hub_cache", ".pico_cache", ".markers", "tmp", "__pycache__")
# What the user's own files name, and what they type: these may be links to wherever they keep their runs and texts.
NAMED = {"runs", "runs/toy", "runs/toys-seed42", "runs/toys-seed43", "rows", "more_rows", "results", "results/weights", "suites",
         "suites/toys", "base.yaml", "analysis.yaml", "suite.yaml", "runs/forked", "runs/hubbed", "runs/toy-replay"}  # fmt: skip
OWN = "texts/"  # links in a folder of texts are the user's, and followed; pipes and devices in it are not waited for


class Outside:
    """Files and folders of the user, beside the camp, that no command has any business with."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        (folder / "secret").write_text(SECRET + "\n")
        (folder / "secret.json").write_text(json.dumps({SECRET: SECRET}) + "\n")
        (folder / "empty").mkdir()
        (folder / "full").mkdir()
        (folder / "full" / "secret").write_text(SECRET + "\n")
        os.mkfifo(folder / "pipe")

    def keep(self, path: Path) -> Path:
        """A copy of something of the camp out here, where it is the user's own."""
        target = self.folder / "copied" / path.name
        shutil.rmtree(self.folder / "copied", ignore_errors=True)
        (self.folder / "copied").mkdir()
        if path.is_dir():
            shutil.copytree(path, target, symlinks=True)
        else:
            shutil.copyfile(path, target)
        return target

    def state(self) -> dict[str, tuple[str, int, int]]:
        """Digest, time of change and mode of everything out here."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            status = path.lstat()
            digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            found[str(path.relative_to(self.folder))] = (digest, status.st_mtime_ns, status.st_mode)
        return found


def paths(opened: list[str], folder: Path, words: list[str]) -> list[str]:
    """The paths inside of a camp that a command opened, and that a link can be laid at beforehand. words: of the command."""
    names = {os.path.relpath(path, folder) for path in opened if path.startswith(f"{folder}/")}
    parents = {parent.as_posix() for name in names for parent in Path(name).parents}
    wanted = (names | parents) - NAMED - {*words, "."}
    return sorted(name for name in wanted if not any(part in name for part in UNFORESEEN))


def replacements(name: str, healthy: Path, outside: Outside) -> dict[str, Callable[[Path], None]]:
    """What a path of a camp can be replaced by: functions of the path that do it, by what they put there."""
    there = healthy / name
    special: dict[str, Callable[[Path], None]] = {
        "a link to an endless device": lambda path: path.symlink_to("/dev/zero"),
        "a link to a pipe": lambda path: path.symlink_to(outside.folder / "pipe"),
        "a pipe": os.mkfifo,
    }
    if name.startswith(OWN):
        return special
    copied: dict[str, Callable[[Path], None]] = {COPY: lambda path: path.symlink_to(outside.keep(there))}
    if there.is_dir() and not there.is_symlink():
        return copied | {
            "a link to an empty folder": lambda path: path.symlink_to(outside.folder / "empty"),
            "a link to a folder": lambda path: path.symlink_to(outside.folder / "full"),
            "a link to nothing": lambda path: path.symlink_to(outside.folder / "new"),
        }
    files: dict[str, Callable[[Path], None]] = {
        "a link to a file": lambda path: path.symlink_to(outside.folder / "secret"),
        "a link to JSON": lambda path: path.symlink_to(outside.folder / "secret.json"),
        "a link to nothing": lambda path: path.symlink_to(outside.folder / "new"),
        "a link to a folder": lambda path: path.symlink_to(outside.folder / "full"),
        "a folder": Path.mkdir,
    }
    return (copied if there.is_file() else {}) | files | special


def replace(path: Path, lay: Callable[[Path], None]) -> bool:
    """Put something into the place of a path; False where there can be nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.is_symlink() or path.exists():
        path.unlink()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lay(path)
    except OSError:
        return False
    return True


def holders(folder: Path) -> list[str]:
    """The regular files of a camp that hold the secret."""
    return [
        path.relative_to(folder).as_posix()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not path.is_symlink()
        and path.stat().st_size < 1 << 26
        and SECRET.encode() in path.read_bytes()
    ]
