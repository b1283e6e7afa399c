"""Files of a run on the Hub on their way into a folder: fetched aside, held against their digests, put into their place whole.

<run>/.pull/step_N/    a step that is being fetched; what is there stays for the next attempt
"""

import hashlib
import os
import shutil
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from picolm.errors import FileError, StoreError
from picolm.store.files import digest_file, sync_directory, write_atomically, written_aside
from picolm.store.hub import HubRun
from picolm.store.layout import CONFIG, ENVIRONMENT, METRICS, Directories, check_name, inside, step_directory
from picolm.store.publish import exchange
from picolm.trusted import open_regular, read_bytes, refuse_links, require_regular

ASIDE = ".pull"
_THREADS = 8
RESULTS = Directories.eval_results_dir


class Parcel(NamedTuple):
    """A file to be fetched: the commit it is taken from, its bytes, and its sha-256 or else the id of its git object."""

    commit: str
    bytes: int
    sha256: str
    oid: str = ""


class Here:
    """A folder that becomes a copy of a run on the Hub. Raises StoreError where it holds something else."""

    directories: Directories

    def __init__(self, source: HubRun, folder: Path):
        self.source, self.folder, self.branch = source, folder, source.branch

    def bring(self, step: int, only: Collection[str]) -> bool:
        """Fetch what is missing of a step; whether anything was."""
        raise NotImplementedError

    @property
    def checkpoints(self) -> Path:
        return self.folder / self.directories.checkpoints_dir

    def add_records(self) -> None:
        """The evaluations that are not here, and the metrics where they go on from those that are."""
        there = self.branch.entries(self.source.head)
        for name in there:
            if name.startswith(f"{RESULTS}/step_") and name.count("/") == 1:
                file = check_name(name, self.branch.place).rpartition("/")[2]
                self.copy(name, self.folder / self.directories.eval_results_dir / file)
        if METRICS in there and self.source.is_ours:
            path, here = self.branch.find(METRICS, self.source.head, None), inside(self.folder, METRICS)
            if path is not None and _goes_on(here, path):
                with written_aside(here) as aside:
                    shutil.copyfile(path, aside)
                    _sync(aside)

    def read(self, name: str, commit: str | None = None) -> bytes:
        """A file of the branch; empty when there is none."""
        path = self.branch.find(name, commit or self.source.head)
        return read_bytes(path) if path is not None else b""

    def copy(self, name: str, target: Path, commit: str | None = None) -> None:
        refuse_links(target, self.folder)
        if not target.exists() and (data := self.read(name, commit)):
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(target, data)

    def stage(self, step: int, parcels: Mapping[str, Parcel]) -> Path:
        """A folder aside with the files, each as it should be: those that are here already linked, the others fetched."""
        aside, here = inside(self.folder, f"{ASIDE}/{step_directory(step)}"), self.checkpoints / step_directory(step)
        refuse_links(here, self.folder)
        aside.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside / ".cache", ignore_errors=True)  # pieces of files that a killed process was fetching
        for path in [path for path in aside.rglob("*") if path.is_symlink() or not path.is_dir()]:
            if path.is_symlink() or str(path.relative_to(aside)) not in parcels:
                path.unlink()
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="pull") as pool:
            try:
                list(pool.map(lambda name: self._place(name, parcels[name], aside, here), parcels))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        shutil.rmtree(aside / ".cache", ignore_errors=True)
        return aside

    def _place(self, name: str, parcel: Parcel, aside: Path, here: Path) -> None:
        path = aside / check_name(name, self.branch.place)
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_it(path, parcel):
            return
        path.unlink(missing_ok=True)
        if not (here / name).is_symlink() and is_it(here / name, parcel):
            _bring_over(here / name, path)
        else:
            self.branch.download(name, parcel.commit, aside, parcel.bytes)
        if not is_it(path, parcel):
            path.unlink(missing_ok=True)
            raise StoreError(f"{self.branch.place}: {name}: what came is not the file that it should be; try again")
        _sync(path)

    def publish(self, step: int, aside: Path, known: Collection[str]) -> None:
        """Let readers see the step, in the place of what there was of it. known: names of its files; others stay there."""
        place = self.checkpoints / step_directory(step)
        self.checkpoints.mkdir(exist_ok=True)
        for folder in [aside, *(path for path in aside.rglob("*") if path.is_dir())]:
            sync_directory(folder)
        if place.exists():
            exchange(aside, place, known)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.rename(aside, place)
            sync_directory(self.checkpoints)


def refuse_strangers(folder: Path, expected: Collection[str] = (CONFIG, ENVIRONMENT)) -> None:
    """Raises StoreError where a folder that is no copy yet holds anything that an interrupted pull does not leave."""
    strangers = {path.name for path in folder.iterdir()} - {".lock", ASIDE, *expected}
    if strangers:
        raise StoreError(f"{folder} is not empty (it holds {min(strangers)}); choose another --out")


def is_it(path: Path, parcel: Parcel) -> bool:
    """Whether a file is there and has the digest."""
    try:
        if require_regular(path).st_size != parcel.bytes:
            return False
        if parcel.sha256:
            return digest_file(path).sha256 == parcel.sha256
        data = read_bytes(path, most_bytes=parcel.bytes)
    except (OSError, FileError):
        return False
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == parcel.oid


def _goes_on(here: Path, remote: Path) -> bool:
    """Return whether `remote` begins with all of `here` and holds more; true where there is no `here`."""
    if not os.path.lexists(here):
        return True
    with open_regular(here) as one, open_regular(remote) as other:
        if os.fstat(one.fileno()).st_size >= os.fstat(other.fileno()).st_size:
            return False
        while block := one.read(1 << 20):
            if other.read(len(block)) != block:
                return False
    return True


def _bring_over(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
