"""Which parts of older checkpoints stay on disk: one rule in `keep` per part, applied once the next step is complete.

A part is `weights`, `optimizer` or `dynamics` (captures and the rows behind them). A rule is `all`, `last N` (the
newest N steps that hold the part) or `every N` (the steps divisible by N, and the newest). The newest step that
training can resume from keeps its weights and its optimizer state, whatever the rules say.
"""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

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
