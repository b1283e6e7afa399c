"""A run on the Hub, brought here, step by step; what was interrupted goes on where it stopped.

A reader of the run sees a step when all that was asked for of it is there. Runs of ours become the run that was sent, byte for
byte; runs of pico-train become what pico-train leaves on a disk. Nothing that is fetched is executed, and no name that a
server gives leads out of the folder.
"""

import logging
import os
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from picolm.errors import StoreError
from picolm.store import hub
from picolm.store.arrival import ASIDE, RESULTS, Here, Parcel, is_it, refuse_strangers
from picolm.store.files import disk_errors, write_atomically
from picolm.store.hub import HubCheckpoint, HubRun
from picolm.store.layout import (
    CONFIG,
    ENVIRONMENT,
    MANIFEST,
    METRICS,
    RUN,
    Directories,
    check_name,
    inside,
    step_directory,
)
from picolm.store.legacy_run import configured_directories
from picolm.store.lock import RunLock
from picolm.store.manifest import Manifest
from picolm.store.publish import point_latest
from picolm.store.records import identity, read_directories
from picolm.store.run import Run
from picolm.store.sealed import SealedCheckpoint
from picolm.store.selection import check_parts, chosen, origin, united
from picolm.trusted import read_bytes

log = logging.getLogger("picolm")

_NOT_A_MODEL = {"README.md", ".gitattributes", ".gitignore", CONFIG, RUN, ENVIRONMENT, METRICS}


def pull(
    source: HubRun,
    folder: Path,
    steps: Sequence[int] | None = None,
    only: Collection[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[int]:
    """Bring steps of a run (None: all) to `folder`; returns those that were not there yet. Continues what was interrupted.

    only: parts of a step (weights, optimizer, dynamics); none means all. progress: steps that are done, and all of them.
    Raises StoreError, having kept what is whole.
    """
    check_parts(only)
    wanted = source.steps if steps is None else sorted(set(steps))
    if absent := [step for step in wanted if step not in source]:
        source[absent[0]]  # raises Missing, before anything is written
    if folder.is_dir() and not any((folder / name).exists() for name in (".lock", RUN, CONFIG)):
        refuse_strangers(
            folder, (Directories.checkpoints_dir, Directories.eval_results_dir)
        )  # before a lock is left in it
    with disk_errors("the run", folder):
        folder.mkdir(parents=True, exist_ok=True)
        with RunLock(inside(folder, ".lock")).held():
            target = OursHere(source, folder) if source.is_ours else PicoTrainHere(source, folder)
            fetched = []
            for done, step in enumerate(wanted):
                progress(done, len(wanted))
                if target.bring(step, only):
                    fetched.append(step)
            target.add_records()
            shutil.rmtree(folder / ASIDE, ignore_errors=True)
    progress(len(wanted), len(wanted))
    return fetched


class OursHere(Here):
    """A run of ours: the same manifests, so the same digests."""

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
        aside = self.stage(step, self._parcels(manifest, remote))
        (aside / MANIFEST).unlink(missing_ok=True)
        write_atomically(aside / MANIFEST, manifest.to_bytes())
        self.publish(step, aside, {*manifest.files, *(present.files if present is not None else ())})
        point_latest(self.checkpoints, self.run.steps[-1])
        return True

    def _parcels(self, manifest: Manifest, remote: HubCheckpoint) -> dict[str, Parcel]:
        return {name: Parcel(remote.commit, record.bytes, record.sha256) for name, record in manifest.files.items()}

    def _present(self, step: int) -> Manifest | None:
        """What is here of a step; None where nothing of use is."""
        try:
            return SealedCheckpoint(self.run.step_path(step)).manifest
        except StoreError:
            return None

    def _begin(self) -> None:
        """Write what makes the folder this run, unless it is."""
        about = self.read(RUN)
        if os.path.lexists(self.folder / RUN):
            if identity(about) != identity(read_bytes(inside(self.folder, RUN))):
                raise StoreError(f"{self.folder} holds another run than {self.branch.place}; choose another --out")
            return
        refuse_strangers(self.folder)
        if not about:
            Run.create(self.folder, self.source.config, {})
            return
        for name in (CONFIG, ENVIRONMENT):
            here = inside(self.folder, name)
            if os.path.lexists(here) and read_bytes(here) != self.read(name):
                raise StoreError(f"{here} is not that of {self.branch.place}; choose another --out, or move it away")
            self.copy(name, here)
        write_atomically(self.folder / RUN, about)


class PicoTrainHere(Here):
    """A run of pico-train, laid out as pico-train does on a disk."""

    def __init__(self, source: HubRun, folder: Path):
        super().__init__(source, folder)
        config = self.read(CONFIG, source.commit_of(hub.CONFIGURATION, 0))
        mark = folder / CONFIG
        if not os.path.lexists(mark):
            refuse_strangers(folder, {Directories.checkpoints_dir, Directories.eval_results_dir})
            self.copy(CONFIG, mark, source.commit_of(hub.CONFIGURATION, 0))
        elif read_bytes(inside(folder, CONFIG)) != config:
            raise StoreError(f"{folder} holds another run than {self.branch.place}; choose another --out")
        self.directories = configured_directories(mark)

    def bring(self, step: int, only: Collection[str]) -> bool:
        parts = self._parts(step)
        there = {name: parcel for part in parts.values() for name, parcel in part.items()}
        here = inside(self.folder, f"{self.directories.checkpoints_dir}/{step_directory(step)}")
        asked = {name for part, parcels in parts.items() if not only or part in only for name in parcels}
        wanted = {name: parcel for name, parcel in there.items() if name in asked or (here / name).exists()}
        if not wanted:
            raise StoreError(f"{self.branch.place}: step {step} has no {' or '.join(only)}")
        if all(is_it(here / name, parcel) for name, parcel in wanted.items()):
            return False
        self.publish(step, self.stage(step, wanted), there)
        point_latest(self.checkpoints, step)
        return True

    def _parts(self, step: int) -> dict[str, dict[str, Parcel]]:
        """The files of a step by what they are. A commit shows all files of its branch, those of other artefacts too."""
        dynamics = self.directories.learning_dynamics_dir
        captured = {split: self._parcels(title, step) for split, title in hub.CAPTURES.items()}
        return {
            "weights": {
                name: parcel
                for name, parcel in self._parcels(hub.MODEL, step).items()
                if "/" not in name and name not in _NOT_A_MODEL
            },
            "optimizer": {
                name: parcel
                for name, parcel in self._parcels(hub.FABRIC, step).items()
                if "/" in name and not name.startswith((f"{dynamics}/", f"{RESULTS}/"))
            },
            "dynamics": {
                name: parcel
                for split, parcels in captured.items()
                for name, parcel in parcels.items()
                if name.startswith(f"{dynamics}/{split}_")
            },
        }

    def _parcels(self, title: str, step: int) -> dict[str, Parcel]:
        commit = self.source.commit_of(title, step)
        found = self.branch.entries(commit) if commit else {}
        return {check_name(name, self.branch.place): Parcel(commit or "", *entry) for name, entry in found.items()}
