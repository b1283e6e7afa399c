"""What a run holds, how many bytes it takes compared with the minimum, and whether its digests are still correct."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from picolm.console import screen, sparkline
from picolm.errors import StoreError
from picolm.store.files import size
from picolm.store.run import Run

if TYPE_CHECKING:
    from rich.table import Table

KINDS = ("weights", "optimizer", "activations", "gradients", "data", "tokenizer", "other")
BOUND = "train/bound_nats_per_token"  # logged beside train/loss by a model whose loss is a bound
SMALL = {"data", "tokenizer", "other"}


@dataclass(frozen=True)
class StepContents:
    """The sizes of one step on disk.

    bytes: by kind, see `Checkpoint.bytes_by_kind`; empty when the step is damaged.
    minimum_bytes: elements x element size, summed over all tensors of the step; no format can need less.
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
        """Bytes stored beyond the minimum and the tokenizer, as a fraction of the minimum. None without tensors."""
        beyond = self.total_bytes - self.bytes.get("tokenizer", 0) - self.minimum_bytes
        return beyond / self.minimum_bytes if self.minimum_bytes else None


def contents(run: Run) -> list[StepContents]:
    """Return the sizes of every step that has a directory, ascending. Reads manifests only."""
    return [_contents(run, step) for step in run.step_directories()]


def damaged(run: Run) -> dict[int, str]:
    """Return the steps that have a directory but cannot be opened, with the reason.

    Steps that were deleted meanwhile are left out.
    """
    whole = set(run.steps)
    found = {step: _contents(run, step).problem for step in run.step_directories() if step not in whole}
    there = set(run.step_directories())
    return {
        step: problem or "nothing of it can be read"
        for step, problem in found.items()
        if step in there and step not in run
    }


def verify(run: Run) -> Iterator[tuple[int, list[str]]]:
    """Yield each step and what is wrong with it. Recomputes every digest, at the speed of the disk or of sha-256."""
    for step in run.step_directories():
        yield step, run.problems(step)


def loss_line(run: Run) -> str:
    """Return the logged training loss as one line, empty when none is logged; a bound of it is called `bound`.

    Example: `loss  8.34 █▅▃▂▁ 5.21  (steps 0 to 60, nats per token)`.
    """
    losses, name = logged_losses(run)
    if not losses:
        return ""
    steps = sorted(losses)
    series = [losses[step] for step in steps]
    drawn = f" {sparkline(series, 32)} {series[-1]:.4g}" if len(series) > 1 else ""
    return f"{name}  {series[0]:.4g}{drawn}  (steps {steps[0]} to {steps[-1]}, nats per token)"


def logged_losses(run: Run) -> tuple[dict[int, Any], str]:
    """Return the logged training losses by step, and what they are: `loss`, or `bound` of a model that has no exact one."""
    entries = [entry for entry in run.read_metrics(("train/loss", BOUND)) if "train/loss" in entry]
    losses = {entry["step"]: entry["train/loss"] for entry in entries}
    return losses, "bound" if any(BOUND in entry for entry in entries) else "loss"


def runs_in(folder: Path) -> list[Run]:
    """Return the runs in a folder, by name; none when it is not a folder. Other folders in it are ignored."""
    found = []
    for place in sorted(folder.iterdir()) if folder.is_dir() else ():
        if place.is_dir() and not place.name.startswith("."):
            with suppress(StoreError):
                found.append(Run.open(place))
    return found


def runs_table(runs: list[Run]) -> "Table":
    """Return a table for a terminal: a row for each run, with its checkpoints, last step and last logged loss."""
    from rich import box
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("run", "checkpoints", "last step", "damaged", "loss"):
        shown.add_column(heading, justify="left" if heading == "run" else "right", overflow="fold")
    for run in runs:
        steps, (losses, name) = run.steps, logged_losses(run)
        loss = f"{list(losses.values())[-1]:.4g}{' (bound)' * (name == 'bound')}" if losses else ""
        shown.add_row(run.name, str(len(steps)), str(steps[-1]) if steps else "", str(len(damaged(run)) or ""), loss)
    return shown


def table(steps: list[StepContents], title: str = "", width: int | None = None) -> "Table":
    """Return a table for a terminal: a row for each step, a column for each kind that occurs.

    It has fewer columns when they do not all fit into `width` characters.
    """
    kinds = [kind for kind in _kinds(steps) if any(kind in entry.bytes for entry in steps)]
    large = [kind for kind in kinds if kind not in SMALL]
    for chosen, minimum in ((kinds, True), (large, False), ([], True)):
        shown = _table(steps, title, chosen, minimum)
        if width is None or _width(shown) <= width:
            break
    return shown


def _table(steps: list[StepContents], title: str, kinds: list[str], minimum: bool) -> "Table":
    from rich import box
    from rich.table import Table

    shown = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("step", *kinds, "total", *["minimum"] * minimum, "over"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for entry in steps:
        if entry.problem:
            shown.add_row(str(entry.step), *[""] * len(kinds), "damaged")
            continue
        cells = [size(entry.bytes[kind]) if kind in entry.bytes else "" for kind in kinds]
        cells += [size(entry.total_bytes), *[size(entry.minimum_bytes)] * minimum]
        shown.add_row(str(entry.step), *cells, "" if entry.overhead is None else f"{entry.overhead:.2%}")
    return shown


def _width(shown: "Table") -> int:
    """Return the number of characters in its longest line."""
    unbounded = screen(width=10_000)
    return unbounded.measure(shown).maximum


def _contents(run: Run, step: int) -> StepContents:
    try:
        checkpoint = run[step]
    except StoreError as error:
        return StepContents(step, {}, 0, str(error))
    return StepContents(step, checkpoint.bytes_by_kind(), checkpoint.minimum_bytes)


def _kinds(steps: list[StepContents]) -> list[str]:
    """Return the known kinds, in their order, then the other kinds that were captured."""
    found = {kind for entry in steps for kind in entry.bytes}
    return [*KINDS, *sorted(found - set(KINDS))]
