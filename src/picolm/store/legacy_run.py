"""A run of pico-train on disk: its steps, and the names of its directories."""

import os
from contextlib import AbstractContextManager
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

from picolm.errors import StoreError
from picolm.store.checkpoint import Checkpoint
from picolm.store.legacy import MODEL_FILES, STATE, LegacyCheckpoint, LocalFiles, capture_meta
from picolm.store.manifest import CONFIG, Directories, step_of
from picolm.store.records import parse_config
from picolm.store.roworder import RowOrder, lookup
from picolm.store.run import OPENERS, Run
from picolm.trusted import read_bytes


class LegacyRun(Run):
    """A run that pico-train wrote, on disk; read-only."""

    def __init__(self, path: Path, directories: Directories):
        super().__init__(path, directories)
        self._order = RowOrder(self.config, str(path))

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration as written; empty when there is none."""
        return super().config if os.path.lexists(self.path / CONFIG) else {}

    @property
    def steps(self) -> list[int]:
        """The steps that have anything to read, ascending."""
        return [step for step in self.step_directories() if _is_step(self.step_path(step), self.directories)]

    def __getitem__(self, step: int) -> Checkpoint:
        if step not in self:
            raise self._no_step(step)
        names = self.directories.learning_dynamics_dir
        return LegacyCheckpoint(step, LocalFiles(self.step_path(step)), self._order, names, capture_meta(self.config))

    def __contains__(self, step: object) -> bool:
        return isinstance(step, int) and _is_step(self.step_path(step), self.directories)

    def problems(self, step: int) -> list[str]:
        return self[step].verify()

    def lock(self) -> AbstractContextManager[None]:
        raise StoreError(f"{self.path}: written by pico-train; it can be read and analyzed, not added to")


def open_legacy(place: str) -> Run | None:
    """Return the pico-train run at `place` (its directory, its checkpoints, or one step); None without one."""
    path = Path(place).absolute()
    run = _run_at(path)
    if run is not None or not path.exists():
        return run
    above = (_run_at(parent) for parent in path.parents[:2])
    return next((run for run in above if run is not None and run.checkpoints_path in (path, path.parent)), None)


OPENERS.append(open_legacy)


def _run_at(path: Path) -> LegacyRun | None:
    directories = configured_directories(path / CONFIG)
    steps = (path / directories.checkpoints_dir).glob("step_*")
    found = any(step_of(step.name) is not None and _is_step(step, directories) for step in steps)
    return LegacyRun(path, directories) if found else None


def configured_directories(config: Path) -> Directories:
    """Return the names of the run's directories from its configuration; defaults when that cannot be read."""
    try:
        section = lookup(parse_config(read_bytes(config), str(config)), "checkpointing", {})
        names = {field.name: lookup(section, field.name, field.default) for field in fields(Directories)}
        names["eval_results_dir"] = lookup(section, "evaluation.eval_results_dir", names["eval_results_dir"])
        return Directories(**names)
    except StoreError:
        return Directories()  # opening the run reports what is wrong with it


def _is_step(path: Path, directories: Directories) -> bool:
    marks = (*MODEL_FILES, "config.json", STATE, directories.learning_dynamics_dir)
    return not path.is_symlink() and any(os.path.lexists(path / mark) for mark in marks)
