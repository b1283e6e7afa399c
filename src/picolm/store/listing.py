"""What a run holds and what that costs, next to what it has to cost; and whether it still is what was written."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from picolm.errors import StoreError
from picolm.store.files import size
from picolm.store.run import Run

if TYPE_CHECKING:
    from rich.table import Table

KINDS = ("weights", "optimizer", "activations", "gradients", "data", "tokenizer", "other")


@dataclass(frozen=True)
class StepContents:
    """One step on disk.

    bytes: by kind, see `Checkpoint.bytes_by_kind`; empty when the step is damaged.
    minimum_bytes: elements x element size of every tensor the step holds, which no format can undercut.
    problem: why its manifest cannot be read, empty when it can.
    """

    step: int
    bytes: Mapping[str, int]
    minimum_bytes: int
    problem: str = ""

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes.values())

    @property
    def overhead(self) -> float | None:
        """What is stored beyond the minimum and the tokenizer, in parts of the minimum. None without tensors."""
        beyond = self.total_bytes - self.bytes.get("tokenizer", 0) - self.minimum_bytes
        return beyond / self.minimum_bytes if self.minimum_bytes else None


def contents(run: Run) -> list[StepContents]:
    """Every step there is a directory for, ascending. Reads manifests only."""
    return [_contents(run, step) for step in run.step_directories()]


def verify(run: Run) -> Iterator[tuple[int, list[str]]]:
    """Step by step, what is wrong with it; recomputes every digest, at the speed of the disk or of sha-256."""
    for step in run.step_directories():
        yield step, run.problems(step)


def table(steps: list[StepContents], title: str = "") -> "Table":
    """For a terminal: a row for each step, a column for each kind that occurs."""
    from rich import box
    from rich.table import Table

    kinds = [kind for kind in _kinds(steps) if any(kind in entry.bytes for entry in steps)]
    shown = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("step", *kinds, "total", "minimum", "over"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for entry in steps:
        if entry.problem:
            shown.add_row(str(entry.step), *[""] * len(kinds), "damaged")
            continue
        overhead = "" if entry.overhead is None else f"{entry.overhead:.2%}"
        cells = [size(entry.bytes[kind]) if kind in entry.bytes else "" for kind in kinds]
        shown.add_row(str(entry.step), *cells, size(entry.total_bytes), size(entry.minimum_bytes), overhead)
    return shown


def _contents(run: Run, step: int) -> StepContents:
    try:
        checkpoint = run[step]
    except StoreError as error:
        return StepContents(step, {}, 0, str(error))
    return StepContents(step, checkpoint.bytes_by_kind(), checkpoint.minimum_bytes)


def _kinds(steps: list[StepContents]) -> list[str]:
    """The known kinds first, in their order, then what else was captured."""
    found = {kind for entry in steps for kind in entry.bytes}
    return [*KINDS, *sorted(found - set(KINDS))]
