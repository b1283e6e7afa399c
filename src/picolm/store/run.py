"""A run on disk: a mapping from step to checkpoint, and the only way to add one.

A step is written under a temporary name beside the others, flushed to disk with fsync, and renamed once it is complete.
So a reader sees only complete steps at any moment, and a crash costs at most the step that was being written.
"""

import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from picolm.address import Address
from picolm.errors import StoreError
from picolm.registry import Registry
from picolm.store.checkpoint import Checkpoint, Missing, SealedCheckpoint
from picolm.store.files import GONE, LOCK, RunLock, disk_errors
from picolm.store.manifest import MANIFEST, RUN, Directories, check_name, inside, step_directory, step_of
from picolm.store.publish import (
    Content,
    discard,
    exchange,
    point_latest,
    publish,
    sweep,
    temporary_step,
    write_renewed,
    write_step,
    write_thinned,
)
from picolm.store.records import Records, read_directories

if TYPE_CHECKING:
    from torch import Tensor


class Run(Records, Mapping[int, Checkpoint]):
    """The complete checkpoints of a run, by step. Made by `Run.create` and `Run.open`.

    Runs of other formats are subclasses: they are read in the same way, and taking their lock raises StoreError.
    """

    def __init__(self, path: Path, directories: Directories):
        super().__init__(path, directories)
        self.checkpoints_path = inside(path, directories.checkpoints_dir)
        self._lock = RunLock(inside(path, LOCK))
        self._commits = threading.Lock()
        self._seen: dict[int, tuple[tuple[int, ...], str]] = {}  # complete manifests: inode, size, times; digest

    @staticmethod
    def create(
        path: str | Path,
        config: Mapping[str, Any],
        environment: Mapping[str, Any],
        directories: Directories | None = None,
        name: str | None = None,
    ) -> "Run":
        """Create a run in a directory that holds none yet, and return it.

        name: of the run; that of the directory by default. Raises StoreError when there is a run already, when a file
        would be replaced, or when the directory cannot be written.
        """
        path = Path(path)
        with disk_errors("a new run", path):
            path.mkdir(parents=True, exist_ok=True)
        run = Run(path, directories or Directories())
        with run.lock(), disk_errors("a new run", path):
            if (path / RUN).exists():
                raise StoreError(f"{path} holds a run already; continue it, or choose another run_name")
            run.refuse_replacing(config)
            run.checkpoints_path.mkdir(parents=True, exist_ok=True)
            sweep(run.checkpoints_path)
            run.write_config(config)
            run.write_environment(environment)
            run._sign(name)  # last: until then the directory is not a run
        return run

    @staticmethod
    def open(place: str | Path) -> "Run":
        """Open the run at `place`, in any known format: its directory, its `checkpoints`, one of its steps, or `hub:…`.

        Raises StoreError that says what was expected when there is no run.
        """
        try:
            for recognise in chain(OPENERS, map(READERS.get, HIGHER)):
                run = recognise(str(place))
                if run is not None:
                    return run
            path = Path(place)
            found = "it is another kind of directory" if path.is_dir() else "there is no such directory"
            found = "it is no directory" if path.exists() and not path.is_dir() else found
        except OSError as error:  # a name that is too long, a directory that may not be read
            raise StoreError(f"{place}: cannot be read ({error.strerror})") from error
        raise StoreError(
            f"{place}: no run here ({found}); expected {RUN} in it, or checkpoints/step_N/{MANIFEST}, or a run of "
            "pico-train (checkpoints/step_N/learning_dynamics), or folders of transformers checkpoints with their steps in their "
            "names, or hub:OWNER/REPOSITORY@BRANCH"
        )

    @property
    def steps(self) -> list[int]:
        """The steps that have a complete manifest, ascending. Their other files are not checked: see `problems`."""
        return [step for step in self.step_directories() if self._is_whole(step)]

    @property
    def doubts(self) -> Mapping[int, Sequence[str]]:
        """For each doubtful step, why: sentences. Steps in Pico's format have digests, and are whole or damaged."""
        return {}

    def step_directories(self) -> list[int]:
        """Return the steps that have a directory, ascending, including damaged ones."""
        try:
            found = [step_of(entry.name) for entry in self.checkpoints_path.iterdir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StoreError(f"{self.checkpoints_path}: cannot be read ({error.strerror})") from error
        return sorted(step for step in found if step is not None)

    def step_path(self, step: int) -> Path:
        return self.checkpoints_path / step_directory(step)

    def __getitem__(self, step: int) -> Checkpoint:
        """Return the checkpoint of a step. Raises Missing, naming the steps that exist; StoreError when damaged."""
        return self._sealed(step)

    def _sealed(self, step: int) -> SealedCheckpoint:
        path = self.step_path(step)
        if path.is_symlink():
            raise StoreError(f"{path}: a symbolic link is not a step; put the directory itself there")
        if not path.exists() and step not in self._seen:
            raise self._no_step(step)
        try:
            checkpoint = SealedCheckpoint(path)
        except StoreError:
            if step not in self._seen or (path / MANIFEST).exists():
                raise
            if not path.exists():
                raise Missing(f"{path} {GONE}") from None
            raise StoreError(f"{path / MANIFEST}: cannot be read (it {GONE}); not a whole checkpoint") from None
        if checkpoint.step != step:
            raise StoreError(f"{path}: holds step {checkpoint.step}; the directory was renamed")
        return checkpoint

    fetched_by_step: ClassVar[bool] = False
    """Whether files come from elsewhere one step after the other, because the run may be larger than the disk."""

    def prefetch(
        self,
        steps: Iterable[int],
        addresses: Collection[Address],
        *,
        rows: Collection[str] = (),
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Download what is going to be read, see `Checkpoint.fetch`. Does nothing for a run on disk.

        progress: called with the number of steps done so far, and the number of all steps.
        """

    def __iter__(self) -> Iterator[int]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    def __contains__(self, step: object) -> bool:
        return isinstance(step, int) and step >= 0 and self._is_whole(step)

    __eq__ = object.__eq__  # a Mapping would compare by opening every step
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {len(self)} steps)"

    def __reduce__(self) -> tuple[Callable[[Path], "Run"], tuple[Path]]:
        return Run.open, (self.path,)  # a worker process opens the run itself, without the lock

    def latest(self) -> Checkpoint | None:
        """Return the newest step that can be opened, None without one. Reads no more manifests than necessary."""
        for step in reversed(self.step_directories()):
            try:
                if step in self:
                    return self[step]
            except StoreError:  # deleted or damaged since it was checked
                if step in self:
                    raise
        return None

    def latest_whole(
        self, verify: bool = True, accept: Callable[[Checkpoint], bool] = lambda checkpoint: True
    ) -> tuple[Checkpoint | None, list[str]]:
        """Return the newest step that `accept` takes and whose digests are correct, and the problems of newer steps.

        The step is None when there is none. verify: False skips the digests.
        """
        problems: list[str] = []
        for step in reversed(self.step_directories()):
            try:
                checkpoint = self[step]
                if not accept(checkpoint):
                    continue
                found = checkpoint.verify() if verify else []
                if not found:
                    return checkpoint, problems
                problems += found
            except StoreError as error:
                problems.append(str(error))
        return None, problems

    def problems(self, step: int) -> list[str]:
        """Recompute every digest of a step; return what is wrong with it, one sentence each.

        The list is empty when all is well, or when the writer of the run deleted the step meanwhile.
        """
        there = self.step_path(step).exists()
        try:
            checkpoint = self._sealed(step)
            found = checkpoint.verify()
            replaced = found and self._sealed(step).manifest.digest != checkpoint.manifest.digest
        except StoreError as error:
            return [] if there and not self.step_path(step).exists() else [str(error)]
        return self.problems(step) if replaced else found  # thinned by its writer while we were reading

    def commit(
        self,
        step: int,
        tensors: Mapping[Address, "Tensor"],
        *,
        meta: Mapping[str, Any],
        texts: Mapping[str, str | bytes] | None = None,
        tables: Mapping[str, Mapping[str, Any]] | None = None,
        weight_prefix: str = "",
        parameters: Collection[str] = (),
        about: Mapping[str, Any] | None = None,
        replace: bool = False,
    ) -> Checkpoint:
        """Add a step and return it: complete and on disk when this returns, not there at all when this raises.

        tensors: of any kinds. Weights go to `model.safetensors`, tensors without a split to `optimizer.safetensors`,
            all others to one file per split and kind.
        meta: JSON values, kept in `trainer_state.json`. Put wall-clock times into `about` instead, so that equal states
            give equal files.
        texts: further files, by name. tables: by split, the rows behind the captured tensors, as columns
            (`input_ids`: R x T).
        weight_prefix: put before the names of the weights in their file (`pico_decoder.`).
        parameters: full names of the model's parameters, needed for those that end in neither `.weight` nor `.bias`.
        about: extra provenance written to the manifest (replayed, forked from …).

        An existing step with the same files is kept, and a damaged one is replaced; a complete one with other content
        raises StoreError unless `replace`. Raises StoreError when the disk is full or cannot be written.
        """
        names = frozenset(parameters)
        content = Content(step, tensors, meta, texts or {}, tables or {}, weight_prefix, names, about or {})
        with self._changing(f"step {step}", content.bytes):
            self._metrics.sync()
            sweep(self.checkpoints_path)
            with temporary_step(self.checkpoints_path, step) as partial:
                manifest = write_step(partial, content, self.directories.learning_dynamics_dir, self._parent(step))
                publish(partial, self.step_path(step), manifest, replace)
            self._seen[step] = (), manifest.digest
            point_latest(self.checkpoints_path, max([step, *self.steps]))
            return self._sealed(step)

    def thin(self, step: int, drop: Collection[str]) -> Checkpoint:
        """Delete the files of some kinds from a step, and return it. drop: kinds of `files_by_kind` (`optimizer`, …).

        The step stays complete and verifiable; its manifest records what was deleted. Its other files are not read, and
        not copied where the file system has hard links. Raises StoreError for the kind `other`.
        """
        if "other" in drop:
            raise StoreError(f"step {step}: the kind 'other' cannot be dropped; a step is nothing without its metadata")
        with self._changing(f"step {step}, thinned,"):
            checkpoint = self._sealed(step)
            if set(drop) & set(checkpoint.files_by_kind()):
                with temporary_step(self.checkpoints_path, step) as partial:
                    write_thinned(partial, checkpoint, drop)
                    exchange(partial, self.step_path(step), checkpoint.files)
        return self[step]

    def renew(self, step: int, texts: Mapping[str, str]) -> list[str]:
        """Replace the modelling code of a step (its `*.py` files) by `texts`. Return the names of the changed files.

        Tensors and all other files stay as they are; the manifest records what was replaced. Nothing is written when
        nothing differs. Raises StoreError for a step that is damaged or has no modelling code.
        """
        with self._changing(f"step {step}, renewed,"):
            checkpoint = self._sealed(step)
            code = {name for name in checkpoint.files if name.endswith(".py") and "/" not in name}
            if not code:
                raise StoreError(f"{checkpoint.path}: has no modelling code to renew (*.py beside its weights)")
            if problems := checkpoint.verify():
                raise StoreError(f"step {step} is damaged, and stays as it is: {problems[0]}")
            data = {check_name(name, f"step {step}"): text.encode() for name, text in texts.items()}
            changed = {name: text for name, text in data.items() if name not in code or checkpoint.read(name) != text}
            gone = code - data.keys()
            if changed or gone:
                with temporary_step(self.checkpoints_path, step) as partial:
                    write_renewed(partial, checkpoint, changed, gone)
                    exchange(partial, self.step_path(step), {*checkpoint.files, *changed})
        return sorted({*changed, *gone})

    def remove(self, step: int) -> None:
        """Delete a step. Raises Missing when it does not exist."""
        with self._changing(f"the deletion of step {step}"):
            if step not in self.step_directories():
                raise self._no_step(step)
            discard(self.checkpoints_path, step)
            self._seen.pop(step, None)
            if (left := self.steps) and left[-1] < step:
                point_latest(self.checkpoints_path, left[-1])

    def lock(self) -> AbstractContextManager[None]:
        """Return a context that holds the lock of the run. Raises StoreError, on entry, when another process has it."""
        return self._lock.held()

    @property
    def is_live(self) -> bool:
        """Whether a process of this machine writes the run now, as far as its lock says."""
        return self._lock.is_alive

    @contextmanager
    def _changing(self, what: str, needed_bytes: int = 0) -> Iterator[None]:
        """Lock the run for a change. A failing disk, or a file deleted meanwhile, raises a StoreError about `what`."""
        with self.lock(), self._commits, disk_errors(what, self.path, needed_bytes):
            try:
                yield
            except StoreError as error:
                if isinstance(error.__cause__, FileNotFoundError):  # an older step, deleted meanwhile
                    raise error.__cause__ from None
                raise

    def _is_whole(self, step: int) -> bool:
        """Return whether the manifest of a step is complete.

        The manifest is read again only when it was replaced or written to since the last time.
        """
        try:
            state = (self.step_path(step) / MANIFEST).stat()
            identity = (state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
            if step not in self._seen or self._seen[step][0] != identity:
                self._seen[step] = identity, self._sealed(step).manifest.digest
        except (OSError, StoreError):
            return False
        return not self.step_path(step).is_symlink()

    def _no_step(self, step: int) -> Missing:
        return Missing(f"{self.path} has no step {step} (there are: {_short(self.step_directories())})")

    def _parent(self, step: int) -> dict[str, Any] | None:
        """Return step and manifest digest of the newest checkpoint before `step`, None for the first."""
        earlier = [other for other in self.steps if other < step]
        return {"step": earlier[-1], "digest": self._seen[earlier[-1]][1]} if earlier else None


def open_ours(place: str) -> Run | None:
    """Return the run of this format at `place` (its directory, its checkpoints, or one step); None without one."""
    path = Path(place).absolute()
    run = _run_at(path)
    if run is not None:
        return run
    for above in path.parents[:3]:
        run = _run_at(above)
        if run is not None and path.exists() and run.checkpoints_path in (path, path.parent):
            return run
    return None


def _run_at(path: Path) -> Run | None:
    if os.path.lexists(path / RUN):
        return Run(path, read_directories(path / RUN))
    if any(path.glob(f"{Directories.checkpoints_dir}/step_*/{MANIFEST}")):
        return Run(path, Directories())
    return None


READERS: Registry[Callable[[str], Run | None]] = Registry("reader")
HIGHER = ("picolm.readers.series:open_series",)  # names, because store must not import readers, a higher room
OPENERS: list[Callable[[str], Run | None]] = [open_ours]  # other formats append theirs; the first run returned wins


def _short(steps: list[int]) -> str:
    shown = map(str, steps if len(steps) <= 12 else [*steps[:6], "…", *steps[-5:]])
    return ", ".join(shown) or "none"
