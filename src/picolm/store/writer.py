"""Save steps in the background, and drop parts of older ones by the rules of retention.

A snapshot is taken at once, and one thread writes it; at most one step is being written. Once it is complete, one rule in
`keep` per part says which older checkpoints keep that part. A part is `weights`, `optimizer` or `dynamics` (captures and
the rows behind them). A rule is `all`, `last N` (the newest N steps that hold the part) or `every N` (the steps divisible
by N, and the newest). The newest step that training can resume from keeps its weights and its optimizer state, whatever
the rules say.
"""

import logging
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from torch import Tensor

from picolm.address import Address
from picolm.errors import StoreError
from picolm.store.checkpoint import Checkpoint, Missing
from picolm.store.run import Run

log = logging.getLogger("picolm")

RESUMING = {"weights", "optimizer"}
_NOT_DYNAMICS = {*RESUMING, "tokenizer", "other"}


def surplus(
    held: Mapping[int, Collection[str]], keep: Mapping[str, str], resumable: Collection[int]
) -> dict[int, set[str]]:
    """Return the parts to delete, by step; steps with nothing to delete are left out.

    held: the parts of each step. keep: rules by part; a part without one is kept. resumable: steps that training can
    resume from.
    """
    needed = max(resumable, default=None)
    going: dict[int, set[str]] = {}
    for part, rule in keep.items():
        holding = sorted(step for step, parts in held.items() if part in parts)
        for step in set(holding) - _kept(holding, rule):
            if not (step == needed and part in RESUMING):
                going.setdefault(step, set()).add(part)
    return going


def _kept(holding: list[int], rule: str) -> set[int]:
    """Return the steps that a rule keeps. holding: the steps that hold the part, ascending."""
    word, _, count = rule.partition(" ")
    if word == "last":
        return set(holding[-int(count) :])
    if word == "every":
        return {step for step in holding if step % int(count) == 0} | set(holding[-1:])
    return set(holding)


@dataclass
class Retention:
    """The rules of one run. `apply` applies them to the steps up to the one that was just written.

    resumable: whether training can resume from a checkpoint. A step with `replayed` in the `about` of its manifest was
    requested by the user, and is never deleted.
    """

    run: Run
    keep: Mapping[str, str]
    resumable: Callable[[Checkpoint], bool]
    _held: dict[int, tuple[set[str], bool]] = field(default_factory=dict)  # parts, and whether it is resumable

    def apply(self, newest: int) -> None:
        """Delete what the steps up to `newest`, which is complete, need not keep. Failures are logged as warnings.

        Newer steps were left by an earlier start and will be written again, so they are ignored here.
        """
        if all(rule == "all" for rule in self.keep.values()):
            return
        self._held.pop(newest, None)
        steps = [step for step in self.run.step_directories() if step <= newest]
        known = {step: found for step in steps if (found := self._look(step)) is not None}
        held = {step: parts for step, (parts, _) in known.items()}
        resumable = [step for step, (_, possible) in known.items() if possible]
        for step, parts in sorted(surplus(held, self.keep, resumable).items()):
            self._drop(step, parts)

    def _look(self, step: int) -> tuple[set[str], bool] | None:
        """Return the parts that a step holds and whether it is resumable; None when it is damaged or exempt."""
        if step not in self._held:
            try:
                checkpoint = self.run[step]
                if "replayed" in checkpoint.about:
                    return None
                self._held[step] = (
                    {part_of(kind) for kind in checkpoint.bytes_by_kind()} - {""},
                    self.resumable(checkpoint),
                )
            except StoreError:
                return None
        return self._held[step]

    def _drop(self, step: int, parts: set[str]) -> None:
        held = self._held.pop(step)[0]
        try:
            if parts == held:
                self.run.remove(step)
            else:
                kinds = self.run[step].bytes_by_kind()
                self.run.thin(step, {kind for kind in kinds if part_of(kind) in parts})
        except Missing:
            pass  # already deleted
        except StoreError as error:
            log.warning("Step %d keeps its %s: %s", step, " and ".join(sorted(parts)), error)


def part_of(kind: str) -> str:
    """Return the part that a kind of `Checkpoint.bytes_by_kind` belongs to; empty for what every step keeps."""
    return kind if kind in RESUMING else "" if kind in _NOT_DYNAMICS else "dynamics"


class BackgroundWriter:
    """A writer that commits steps to a run from its own thread. Use it as a context manager, or call `close`.

    retention: rules applied to older steps once a new one is complete. written: callback, called with each committed
    step before the rules are applied.
    snapshot_s, waiting_s, writing_s: seconds spent so far copying tensors, waiting for the previous step to be written
    (both hold up the training), and writing (which does not).
    """

    def __init__(
        self, run: Run, retention: Retention | None = None, written: Callable[[int], None] = lambda step: None
    ):
        self.run, self.retention, self.written = run, retention, written
        self.snapshot_s = self.waiting_s = self.writing_s = 0.0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint-writer")
        self._under_way: Future[Checkpoint] | None = None

    def submit(self, step: int, tensors: Mapping[Address, Tensor], **arguments: Any) -> None:
        """Copy the tensors as they are now and start to commit them; takes the arguments of `Run.commit`.

        Waits for the previous step first, and raises its error. One snapshot exists at a time: it costs as much main
        memory as the tensors.
        """
        self.wait()
        start = time.perf_counter()
        snapshot = {address: tensor.detach().to("cpu", copy=True) for address, tensor in tensors.items()}
        self.snapshot_s += time.perf_counter() - start
        self._under_way = self._thread.submit(self._commit, step, snapshot, arguments)

    def check(self) -> None:
        """Raise the error of the step that was being written, if it has ended with one. Does not wait."""
        if self._under_way is not None and self._under_way.done():
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being written. Raises the error of that step, once."""
        start = time.perf_counter()
        under_way, self._under_way = self._under_way, None
        try:
            if under_way is not None:
                under_way.result()
        finally:
            self.waiting_s += time.perf_counter() - start

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(
        self, failed: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception as late:
            if error is None:
                raise
            error.add_note(f"besides, saving failed: {late}")  # the first error is the one to show

    def _commit(self, step: int, snapshot: Mapping[Address, Tensor], arguments: Mapping[str, Any]) -> Checkpoint:
        start = time.perf_counter()
        try:
            checkpoint = self.run.commit(step, snapshot, **arguments)
            self.written(step)
            if self.retention is not None:
                self.retention.apply(step)
            return checkpoint
        finally:
            self.writing_s += time.perf_counter() - start
