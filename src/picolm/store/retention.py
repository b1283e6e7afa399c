"""What of older steps stays on disk: `keep` says so by part, and nothing goes before the step after it is whole.

A part is `weights`, `optimizer` or `dynamics` (captures and the rows behind them). A rule is `all`, `last N` (the newest N
steps that hold the part) or `every N` (the steps divisible by N, and the newest). The newest step that training can go on
from keeps its weights and its optimizer state whatever the rules say.
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
    """The parts that go, by step, of those that are `held`; steps of which nothing goes are left out.

    keep: rules by part; a part without one is kept. resumable: the steps that training can go on from.
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
    """Those of the steps that a rule keeps. holding: ascending."""
    word, _, count = rule.partition(" ")
    if word == "last":
        return set(holding[-int(count) :])
    if word == "every":
        return {step for step in holding if step % int(count) == 0} | set(holding[-1:])
    return set(holding)


@dataclass
class Retention:
    """The rules of one run, applied to the steps up to one that was just written.

    resumable: whether training can go on from a checkpoint. A step with `replayed` in what its manifest says about it was
    asked for by name, and is left alone.
    """

    run: Run
    keep: Mapping[str, str]
    resumable: Callable[[Checkpoint], bool]
    _held: dict[int, tuple[set[str], bool]] = field(default_factory=dict)  # parts, and whether it is resumable

    def apply(self, newest: int) -> None:
        """Delete what steps up to `newest`, which is whole, need not keep. What cannot be deleted is told, and stays.

        Newer steps are left of an earlier start and will be written again: they count for nothing here.
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
        """What a step holds; None when it is damaged, or not under these rules."""
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
            pass  # it is gone
        except StoreError as error:
            log.warning("Step %d keeps its %s: %s", step, " and ".join(sorted(parts)), error)


def part_of(kind: str) -> str:
    """The part that a kind of `Checkpoint.bytes_by_kind` belongs to; empty for what every step keeps."""
    return kind if kind in RESUMING else "" if kind in _NOT_DYNAMICS else "dynamics"
