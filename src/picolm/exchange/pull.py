"""Download a run, step by step. An interrupted download continues where it stopped.

RUN/.pull/step_N/    a step that is being downloaded; its files stay for the next attempt

A step gets its name when all requested files are there, with the digests they were uploaded with. A run in Pico's
format becomes the uploaded run, byte for byte; a run of pico-train gets the layout that pico-train writes to disk.
Nothing that is downloaded is executed, and no name from a server can lead out of the folder.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from picolm.errors import FileError, StoreError
from picolm.store import hub
from picolm.store.checkpoint import SealedCheckpoint
from picolm.store.files import (
    LOCK,
    RunLock,
    digest_file,
    disk_errors,
    link_or_copy,
    replacement,
    sync_directory,
    write_atomically,
)
from picolm.store.hub import HubCheckpoint, HubRun
from picolm.store.legacy_run import configured_directories
from picolm.store.manifest import (
    CONFIG,
    ENVIRONMENT,
    MANIFEST,
    METRICS,
    RUN,
    Directories,
    Manifest,
    check_name,
    inside,
    step_directory,
)
from picolm.store.publish import exchange, point_latest
from picolm.store.records import identity, read_directories
from picolm.store.run import Run
from picolm.store.selection import check_parts, chosen, origin, united
from picolm.trusted import open_regular, read_bytes, refuse_links, remove_folder, require_regular

_TEMPORARY = ".pull"
_THREADS = 8
_RESULTS = Directories.eval_results_dir
_NOT_A_MODEL = {"README.md", ".gitattributes", ".gitignore", CONFIG, RUN, ENVIRONMENT, METRICS}


class RemoteFile(NamedTuple):
    """A file on the Hub: the commit to take it from, its size, and its sha-256 or else the id of its git object."""

    commit: str
    bytes: int
    sha256: str
    oid: str = ""

    def is_at(self, path: Path) -> bool:
        """Return whether `path` is a file with this size and this digest."""
        try:
            if require_regular(path).st_size != self.bytes:
                return False
            if self.sha256:
                return digest_file(path).sha256 == self.sha256
            data = read_bytes(path, most_bytes=self.bytes)
        except (OSError, FileError):
            return False
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == self.oid


def pull(
    source: HubRun,
    folder: Path,
    steps: Sequence[int] | None = None,
    only: Collection[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[int]:
    """Download steps of a run (None: all) into `folder`; return the steps of which anything was missing there.

    only: parts of a step (weights, optimizer, dynamics); none means all. progress: called with the number of steps
    done, and of all steps. Raises StoreError; complete steps are kept.
    """
    check_parts(only)
    wanted = source.steps if steps is None else sorted(set(steps))
    if absent := [step for step in wanted if step not in source]:
        source[absent[0]]  # raises Missing, before anything is written
    if folder.is_dir() and not any((folder / name).exists() for name in (LOCK, RUN, CONFIG)):
        # check before a lock file is created in it
        _refuse_other_content(folder, (Directories.checkpoints_dir, Directories.eval_results_dir))
    with disk_errors("the run", folder):
        folder.mkdir(parents=True, exist_ok=True)
        with RunLock(inside(folder, LOCK)).held():
            copy = _CopyOfOurs(source, folder) if source.is_ours else _CopyOfPublished(source, folder)
            fetched = []
            for done, step in enumerate(wanted):
                progress(done, len(wanted))
                if copy.bring(step, only):
                    fetched.append(step)
            copy.add_records()
            remove_folder(folder / _TEMPORARY)
    progress(len(wanted), len(wanted))
    return fetched


class _Copy:
    """A folder that becomes a copy of a run on the Hub. Raises StoreError when it holds something else."""

    directories: Directories

    def __init__(self, source: HubRun, folder: Path):
        self.source, self.folder, self.branch = source, folder, source.branch

    @property
    def checkpoints(self) -> Path:
        return self.folder / self.directories.checkpoints_dir

    def bring(self, step: int, only: Collection[str]) -> bool:
        """Download what is missing of a step; return whether anything was."""
        raise NotImplementedError

    def read(self, name: str, commit: str | None = None) -> bytes:
        """Return the content of a file of the branch; empty when there is none."""
        path = self.branch.find(name, commit or self.source.head)
        return read_bytes(path) if path is not None else b""

    def copy(self, name: str, target: Path, commit: str | None = None) -> None:
        """Write a small file of the branch to `target`, unless `target` exists or the branch has no such file."""
        refuse_links(target, self.folder)
        if not target.exists() and (data := self.read(name, commit)):
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(target, data)

    def add_records(self) -> None:
        """Download the evaluations that are missing here, and the metrics when they continue those here."""
        there = self.branch.entries(self.source.head)
        for name in there:
            if name.startswith(f"{_RESULTS}/step_") and name.count("/") == 1:
                file = check_name(name, self.branch.place).rpartition("/")[2]
                self.copy(name, self.folder / self.directories.eval_results_dir / file)
        if METRICS in there and self.source.is_ours:
            path, here = self.branch.find(METRICS, self.source.head, None), inside(self.folder, METRICS)
            if path is not None and _continues(path, here):
                with replacement(here) as temporary:
                    shutil.copyfile(path, temporary)
                    _sync(temporary)

    def stage(self, step: int, files: Mapping[str, RemoteFile]) -> Path:
        """Return a temporary folder that holds the files of a step.

        Files that are here already are hard-linked, the others are downloaded.
        """
        temporary, here = (
            inside(self.folder, f"{_TEMPORARY}/{step_directory(step)}"),
            self.checkpoints / step_directory(step),
        )
        refuse_links(here, self.folder)
        temporary.mkdir(parents=True, exist_ok=True)
        remove_folder(temporary / ".cache")  # records of huggingface_hub, and incomplete files
        for path in [path for path in temporary.rglob("*") if path.is_symlink() or not path.is_dir()]:
            if path.is_symlink() or str(path.relative_to(temporary)) not in files:
                path.unlink()
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="pull") as pool:
            try:
                list(pool.map(lambda name: self._place(name, files[name], temporary, here), files))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        remove_folder(temporary / ".cache")
        return temporary

    def _place(self, name: str, file: RemoteFile, temporary: Path, here: Path) -> None:
        path = temporary / check_name(name, self.branch.place)
        path.parent.mkdir(parents=True, exist_ok=True)
        if file.is_at(path):
            return
        path.unlink(missing_ok=True)
        if not (here / name).is_symlink() and file.is_at(here / name):
            link_or_copy(here / name, path)
        else:
            self.branch.download(name, file.commit, temporary, file.bytes)
        if not file.is_at(path):
            path.unlink(missing_ok=True)
            raise StoreError(f"{self.branch.place}: {name}: what came is not the file that it should be; try again")
        _sync(path)

    def publish(self, step: int, temporary: Path, known: Collection[str]) -> None:
        """Rename a staged step to its final name, replacing what is there of it.

        known: names of the files of the step; other files that are there are kept.
        """
        place = self.checkpoints / step_directory(step)
        self.checkpoints.mkdir(exist_ok=True)
        for folder in [temporary, *(path for path in temporary.rglob("*") if path.is_dir())]:
            sync_directory(folder)
        if place.exists():
            exchange(temporary, place, known)
            remove_folder(temporary)
        else:
            os.rename(temporary, place)
            sync_directory(self.checkpoints)


class _CopyOfOurs(_Copy):
    """A copy of a run in Pico's format: the same manifests, so the same digests."""

    def __init__(self, source: HubRun, folder: Path):
        super().__init__(source, folder)
        self._begin()
        self.directories = read_directories(folder / RUN)
        self.run = Run(folder, self.directories)
        self.checkpoints.mkdir(exist_ok=True)

    def bring(self, step: int, only: Collection[str]) -> bool:
        remote = self.source[step]
        assert isinstance(remote, HubCheckpoint)
        manifest, present = chosen(remote, only), self._present(step)
        if present is not None:
            if origin(present) != origin(manifest):
                raise StoreError(
                    f"{self.run.step_path(step)}: is another state than step {step} of {self.branch.place}; choose another --out"
                )
            manifest = united(present, manifest)
            if manifest.files == present.files and not self.run.problems(step):
                return False
        files = {
            name: RemoteFile(remote.commit, record.bytes, record.sha256) for name, record in manifest.files.items()
        }
        temporary = self.stage(step, files)
        write_atomically(temporary / MANIFEST, manifest.to_bytes())
        self.publish(step, temporary, {*manifest.files, *(present.files if present is not None else ())})
        point_latest(self.checkpoints, self.run.steps[-1])
        return True

    def _present(self, step: int) -> Manifest | None:
        """Return the manifest of the step that is here; None when there is none, or a damaged one."""
        try:
            return SealedCheckpoint(self.run.step_path(step)).manifest
        except StoreError:
            return None

    def _begin(self) -> None:
        """Write the files that make the folder this run. Raises StoreError when it is another run."""
        about = self.read(RUN)
        if os.path.lexists(self.folder / RUN):
            if identity(about) != identity(read_bytes(inside(self.folder, RUN))):
                raise StoreError(f"{self.folder} holds another run than {self.branch.place}; choose another --out")
            return
        _refuse_other_content(self.folder)
        if not about:
            Run.create(self.folder, self.source.config, {})
            return
        for name in (CONFIG, ENVIRONMENT):
            here = inside(self.folder, name)
            if os.path.lexists(here) and read_bytes(here) != self.read(name):
                raise StoreError(f"{here} is not that of {self.branch.place}; choose another --out, or move it away")
            self.copy(name, here)
        write_atomically(self.folder / RUN, about)


class _CopyOfPublished(_Copy):
    """A copy of a run of pico-train, in the layout that pico-train writes to disk."""

    def __init__(self, source: HubRun, folder: Path):
        super().__init__(source, folder)
        commit, mark = source.commit_of(hub.CONFIGURATION, 0), folder / CONFIG
        if not os.path.lexists(mark):
            _refuse_other_content(folder, {Directories.checkpoints_dir, Directories.eval_results_dir})
            self.copy(CONFIG, mark, commit)
        elif read_bytes(inside(folder, CONFIG)) != self.read(CONFIG, commit):
            raise StoreError(f"{folder} holds another run than {self.branch.place}; choose another --out")
        self.directories = configured_directories(mark)

    def bring(self, step: int, only: Collection[str]) -> bool:
        parts = self._parts(step)
        there = {name: file for part in parts.values() for name, file in part.items()}
        here = inside(self.folder, f"{self.directories.checkpoints_dir}/{step_directory(step)}")
        asked = {name for part, files in parts.items() if not only or part in only for name in files}
        wanted = {name: file for name, file in there.items() if name in asked or (here / name).exists()}
        if not wanted:
            raise StoreError(f"{self.branch.place}: step {step} has no {' or '.join(only)}")
        if all(file.is_at(here / name) for name, file in wanted.items()):
            return False
        self.publish(step, self.stage(step, wanted), there)
        point_latest(self.checkpoints, step)
        return True

    def _parts(self, step: int) -> dict[str, dict[str, RemoteFile]]:
        """Return the files of a step by part.

        A commit shows all files of its branch, including those of other artefacts.
        """
        dynamics = self.directories.learning_dynamics_dir

        def files(title: str, belongs: Callable[[str], bool]) -> dict[str, RemoteFile]:
            commit = self.source.commit_of(title, step)
            found = self.branch.entries(commit) if commit else {}
            names = [check_name(name, self.branch.place) for name in found if belongs(name)]
            return {
                name: RemoteFile(commit or "", found[name].size, found[name].sha256, found[name].oid) for name in names
            }

        return {
            "weights": files(hub.MODEL, lambda name: "/" not in name and name not in _NOT_A_MODEL),
            "optimizer": files(
                hub.FABRIC, lambda name: "/" in name and not name.startswith((f"{dynamics}/", f"{_RESULTS}/"))
            ),
            "dynamics": {
                name: file
                for split, title in hub.CAPTURES.items()
                for name, file in files(title, lambda name: name.startswith(f"{dynamics}/")).items()
                if name.startswith(f"{dynamics}/{split}_")
            },
        }


def _refuse_other_content(folder: Path, expected: Collection[str] = (CONFIG, ENVIRONMENT)) -> None:
    """Raise StoreError when a new folder holds anything that an interrupted pull does not leave."""
    others = {path.name for path in folder.iterdir()} - {LOCK, _TEMPORARY, *expected}
    if others:
        raise StoreError(f"{folder} is not empty (it holds {min(others)}); choose another --out")


def _continues(longer: Path, here: Path) -> bool:
    """Return whether `longer` begins with all of `here` and holds more; true when there is no `here`."""
    if not os.path.lexists(here):
        return True
    with open_regular(here) as one, open_regular(longer) as other:
        if os.fstat(one.fileno()).st_size >= os.fstat(other.fileno()).st_size:
            return False
        while block := one.read(1 << 20):
            if other.read(len(block)) != block:
                return False
    return True


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
