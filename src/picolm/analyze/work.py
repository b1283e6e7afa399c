"""The work of an analysis: its steps, the units that it is split into, and the runs that each process opens for them."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from picolm.analyze.compute import Cell, Task, plan_step, tasks_of
from picolm.analyze.config import AnalysisConfig, EachStep, StepRange
from picolm.analyze.heads import stated_anatomy
from picolm.analyze.pairing import Place
from picolm.analyze.reading import Readers, model_section
from picolm.errors import PicoError
from picolm.observe.config import Observe
from picolm.registry import CodePolicy
from picolm.store import Run
from picolm.store.checkpoint import SealedCheckpoint
from picolm.store.listing import damaged
from picolm.store.manifest import step_of

MOST_MISSING = 1000  # steps of a range that are listed one by one
# If every step is compared with every other, this many layers get a unit each; the rest share one.
MOST_LAYERS = 512


@dataclass
class Outcome:
    """The result of an analysis: rows of the long table, what is absent, number of values computed (not cached), number
    of tensors read.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    computed: int = 0
    read: int = 0
    found: set[int] = field(default_factory=set)  # numbers of the tasks that found something
    readings: dict[str, str] = field(default_factory=dict)  # what probes found now, by key, to be kept

    def add(self, other: "Outcome") -> None:
        self.rows += other.rows
        self.absent += other.absent
        self.computed += other.computed
        self.read += other.read
        self.found |= other.found
        self.readings |= other.readings


@dataclass(frozen=True)
class Unit:
    """Work for one process: one step, or one layer at all steps if every step is compared with every other."""

    places: tuple[Place, ...]
    tasks: tuple[int, ...]
    layer: int | None = None  # -1: all outside of the blocks, and the blocks from number `layers` on
    layers: int = 0
    probes: bool = False  # whether the probes of the analysis run at its step


@dataclass(frozen=True)
class Ask:
    """An analysis as it is sent to each process: everything by value."""

    config: AnalysisConfig
    runs: tuple[tuple[str, str], ...]  # (name, place)
    values: Path
    code: CodePolicy


def chosen_steps(config: AnalysisConfig, there: list[int]) -> tuple[list[int], list[int]]:
    """Return (the steps to analyze, the steps that were requested by number and do not exist)."""
    asked = config.steps
    if asked == "all":
        return there, []
    if asked == "log":
        chosen: list[int] = []
        for step in there:
            if not chosen or step >= 2 * chosen[-1]:
                chosen.append(step)
        return chosen + ([there[-1]] if there and there[-1] not in chosen else []), []
    if isinstance(asked, EachStep):
        return [step for step in there if step % asked.every == 0], []
    if isinstance(asked, StepRange):  # may be huge: list existing steps, and at most MOST_MISSING others
        wanted = range(asked.start, asked.end + 1, asked.step)
        missing = (step for step in wanted if step not in there)
        return [step for step in there if step in wanted], list(islice(missing, MOST_MISSING))
    return [step for step in asked if step in there], [step for step in asked if step not in there]


def unreadable_steps(config: AnalysisConfig, run: Run) -> dict[int, str]:
    """Return, by step, why a step of the analysis cannot be read: it is damaged or renamed. If steps are compared, all
    steps of the run count, since without a damaged last step another one would be the last.
    """
    whole, found = set(run.steps), damaged(run)
    for path in sorted(run.checkpoints_path.glob("*/manifest.json")) if run.checkpoints_path.is_dir() else []:
        if step_of(path.parent.name) is None and not path.parent.is_symlink() and not path.parent.name.startswith("."):
            with suppress(PicoError, OSError):
                step = SealedCheckpoint(path.parent).step
                if step not in whole:
                    found[step] = f"{path.parent}: holds step {step} under another name; call it step_{step}"
    compares = any(task.target is not None for task in tasks_of(config))
    asked = found if compares else set(chosen_steps(config, sorted({*whole, *found}))[0])
    return {step: found[step] for step in sorted(found) if step in asked}


def units_of(config: AnalysisConfig, runs: Mapping[str, Run], outcome: Outcome) -> Iterator[Unit]:
    """Yield the units of an analysis; what is missing is added to `outcome`. Raises PicoError for a run that is not given."""
    tasks = tasks_of(config)
    compared = [(task.metric.name, task.target) for task in tasks] + [
        (entry.probe_name, entry.target) for entry in config.probes
    ]
    for name, target in compared:
        if target is not None and target.run is not None and target.run not in runs:
            raise PicoError(
                f"{name} compares with run {target.run!r}, which is not given (there are: {', '.join(runs)})"
            )
    every = tuple(i for i, task in enumerate(tasks) if task.target is not None and task.target.checkpoint == "all")
    others = tuple(i for i in range(len(tasks)) if i not in every)
    for name, run in runs.items():
        steps, missing = chosen_steps(config, run.steps)
        unreadable = unreadable_steps(config, run)
        outcome.absent += [f"step {step} of {name}: {problem}" for step, problem in unreadable.items()]
        outcome.absent += [
            f"step {step} of {name}: there is no such checkpoint" for step in missing if step not in unreadable
        ]
        if len(missing) == MOST_MISSING:
            outcome.absent.append(f"further steps of {name} that were asked for: there are no such checkpoints")
        if others or config.probes:
            yield from (Unit((Place(name, step),), others, probes=bool(config.probes)) for step in steps)
        if every:
            count = min(stated_anatomy(model_section(run), run.name).layers or 1, MOST_LAYERS)
            for layer in range(-1, count):
                yield Unit(tuple(Place(name, step) for step in steps), every, layer, count)


def fits_any(config: AnalysisConfig, readers: Readers, task: Task) -> bool:
    """Return whether a task is for the model of any run, by the last of its steps that are analyzed, which have been read."""
    if task.statespace is None:
        return True
    last = {name: (chosen_steps(config, there)[0] or there)[-1] for name, there in readers.steps.items()}
    return any(task.fits(readers.at(name, step)) for name, step in last.items())


def readers_of(ask: Ask) -> Readers:
    """Return the open runs, cached per process: a step that many steps are compared with is read once per process."""
    return _opened(ask.runs, observed(ask.config))


@cache
def _opened(runs: tuple[tuple[str, str], ...], observe: Observe | None) -> Readers:
    return Readers({name: Run.open(place) for name, place in runs}, observe)


def observed(config: AnalysisConfig) -> Observe | None:
    """Return what is to be observed, None if nothing of it is measured."""
    return config.observe if any(is_observed(config, task) for task in tasks_of(config)) else None


def is_observed(config: AnalysisConfig, task: Task) -> bool:
    """Return whether a task measures what is observed, and not what is stored."""
    asked = config.observe
    return asked is not None and task.split == asked.split and task.component.data_type in asked.what


def cells_of(
    readers: Readers, unit: Unit, tasks: list[Task], steps: Mapping[str, list[int]]
) -> tuple[list[Cell], Outcome]:
    """Return what is to be measured in a unit, and an outcome that says what is missing. steps: those analyzed of each run."""
    outcome, cells = Outcome(), []
    for place in unit.places:
        work = plan_step(readers, place, tasks, steps)
        outcome.absent += work.absent if unit.layer in (None, -1) else []
        for cell in work.cells:
            layer = cell.operand.address.layer
            if unit.layer is None or (-1 if layer is None or layer >= unit.layers else layer) == unit.layer:
                cells.append(cell)
    return cells, outcome


def forget_runs() -> None:
    """Open runs anew: they may have changed since the last analysis in this process."""
    _opened.cache_clear()
