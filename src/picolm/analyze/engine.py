"""Run an analysis: choose steps, spread the work over processes, use cached values, report what is missing."""

import importlib
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from picolm.address import Address
from picolm.analyze.components import available
from picolm.analyze.compute import Cell, Task, compute, plan_step, rows_of, tasks_of
from picolm.analyze.config import AnalysisConfig, EachStep, StepRange
from picolm.analyze.heads import read_anatomy, stated_anatomy
from picolm.analyze.pairing import Place, partner_places
from picolm.analyze.reading import Readers, model_section
from picolm.analyze.values import Value, Values, rename_damaged
from picolm.errors import PicoError
from picolm.observe.config import Observe
from picolm.registry import CodePolicy, code_policy, set_code_policy
from picolm.store import Run
from picolm.store.checkpoint import SealedCheckpoint
from picolm.store.listing import damaged
from picolm.store.manifest import step_of

log = logging.getLogger("picolm")

MOST_MISSING = 1000  # steps of a range that are listed one by one
WIDE = 192  # width of a model from which layers are computed in parallel; below it, Python takes most of the time
# If every step is compared with every other, this many layers get a unit each; the rest share one.
MOST_LAYERS = 512
CIRCUITS = ("ov_circuit", "qk_circuit", "per_head")


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

    def add(self, other: "Outcome") -> None:
        self.rows += other.rows
        self.absent += other.absent
        self.computed += other.computed
        self.read += other.read
        self.found |= other.found


@dataclass(frozen=True)
class Unit:
    """Work for one process: one step, or one layer at all steps if every step is compared with every other."""

    places: tuple[Place, ...]
    tasks: tuple[int, ...]
    layer: int | None = None  # -1: all outside of the blocks, and the blocks from number `layers` on
    layers: int = 0


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


def analyze(
    config: AnalysisConfig,
    places: Iterable[str],
    *,
    workers: int = 1,
    backend: str = "loky",
    strict: bool = False,
    keep_downloads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Outcome:
    """Run an analysis of the runs at `places` and return its outcome. Raises PicoError if a metric finds nothing at all
    and, if `strict`, if anything is missing.

    keep_downloads: of a series on the Hub, the number of measured steps whose weights stay in the Hub's cache if they were not
    there before; None: all. progress: called with the number of units that are done and of all units.
    """
    _opened.cache_clear()  # a run may have changed since the last analysis in this process
    runs = _open(config, places)
    folder = Path(config.monitoring.output_dir)
    named = tuple((name, place) for name, (place, _) in runs.items())
    by_name = {name: run for name, (_, run) in runs.items()}
    ask = Ask(config, named, folder / ".values.sqlite", code_policy())
    for run in by_name.values():
        asked = set(chosen_steps(config, run.steps)[0])
        for step, sentences in run.doubts.items():
            if step in asked:
                log.warning("Doubtful: %s.", "; ".join(sentences))
    rename_damaged(ask.values)
    outcome = Outcome()
    units = list(_units(config, by_name, outcome))
    _fetch_ahead(ask, progress)
    tidy = _tidying(ask, by_name, units, keep_downloads)
    with closing(Values(ask.values)) as values:
        for done, (part, new) in enumerate(_results(ask, units, workers, backend), start=1):
            values.add(new)
            outcome.add(part)
            tidy(done)
            progress(done, len(units))
    _note(outcome.rows, by_name)
    _report(outcome, ask, strict)
    return outcome


def _note(rows: Iterable[dict[str, Any]], runs: Mapping[str, Run]) -> None:
    """Write the column `note`: doubts about the steps of a row, and what the circuits of an architecture leave out."""
    left_out: dict[str, tuple[str, ...]] = {}
    for row in rows:
        places = {(row["run"], row["step"]), (row["against_run"], row["against_step"])}
        found = [
            doubt for run, step in sorted(places, key=str) if run in runs for doubt in runs[run].doubts.get(step, ())
        ]
        if row["component"] in CIRCUITS:
            if row["run"] not in left_out:
                run = runs[row["run"]]
                left_out[row["run"]] = read_anatomy(run[row["step"]], model_section(run), row["run"]).notes
            other = {"ov_circuit": "QK", "qk_circuit": "OV"}.get(row["component"])
            found += [note for note in left_out[row["run"]] if other is None or other not in note]
        row["note"] = "; ".join(found)


def _open(config: AnalysisConfig, places: Iterable[str]) -> dict[str, tuple[str, Run]]:
    """Return the runs by name, with their places. Raises PicoError for two of one name, and for one without
    checkpoints.
    """
    runs: dict[str, tuple[str, Run]] = {}
    for place in places:
        run = Run.open(place)
        if run.name in runs:
            raise PicoError(
                f"two runs are called {run.name}: {runs[run.name][0]} and {place}; rename one of the folders"
            )
        if not run.steps:
            problems = "".join(f"\n  step {step}: {problem}" for step, problem in damaged(run).items())
            raise PicoError(
                f"{place} holds no checkpoint that can be read{problems}"
                if problems
                else f"{place} holds no checkpoint yet"
            )
        runs[run.name] = place, run
    if not runs:
        raise PicoError("which run? give --run FOLDER, --repo_id with --branch, or `runs:` in the configuration")
    return runs


def _units(config: AnalysisConfig, runs: Mapping[str, Run], outcome: Outcome) -> Iterator[Unit]:
    tasks = tasks_of(config)
    for task in tasks:
        if task.target is not None and task.target.run is not None and task.target.run not in runs:
            raise PicoError(
                f"{task.metric.name} compares with run {task.target.run!r}, which is not given (there are: {', '.join(runs)})"
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
        if others:
            yield from (Unit((Place(name, step),), others) for step in steps)
        if every:
            count = min(stated_anatomy(model_section(run), run.name).layers or 1, MOST_LAYERS)
            for layer in range(-1, count):
                yield Unit(tuple(Place(name, step) for step in steps), every, layer, count)


def _results(ask: Ask, units: list[Unit], workers: int, backend: str) -> Iterator[tuple[Outcome, dict[str, Value]]]:
    if workers == 1 and backend == "loky":
        with _threads_for(_readers(ask)) as threads, _fetching(ask, units) as fetched:
            for number, unit in enumerate(units):
                fetched(number)
                yield run_unit(ask, unit, threads)
        return
    from joblib import Parallel, delayed, parallel_config

    # loky restarts a worker that has grown by 300 MB; the cached step to compare with may be that large.
    warnings.filterwarnings("ignore", "A worker stopped while some jobs", UserWarning)
    returned = "list" if backend == "ray" else "generator"  # Ray returns no result before it has all
    with parallel_config(**_cluster(backend)):
        yield from Parallel(n_jobs=workers, return_as=returned)(delayed(_in_worker)(ask, unit) for unit in units)


@contextmanager
def _threads_for(readers: Readers) -> Iterator[int]:
    """Yield how many layers to compute in parallel, with one thread of LAPACK each. For matrices of this size LAPACK's
    own threads wait for each other longer than they compute. The values are bit-identical for any number.
    """
    import torch

    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield cores if any(is_wide(model) for model in readers.models.values()) else 1
    finally:
        torch.set_num_threads(cores)


def is_wide(model: Mapping[str, Any]) -> bool:
    """Return whether the matrices of a model are large enough to compute layers in parallel; affects speed only."""
    return (stated_anatomy(model, "the run").width or 0) >= WIDE


def _cluster(backend: str) -> dict[str, Any]:
    """Return the settings of joblib for a backend. Raises PicoError for one that is unknown or not installed."""
    if backend == "loky":
        return {"backend": backend}
    try:
        if backend == "dask":
            importlib.import_module("distributed")
            return {"backend": backend, "scheduler_host": os.environ.get("DASK_SCHEDULER_ADDRESS")}
        if backend == "ray":
            importlib.import_module("ray.util.joblib").register_ray()
            return {"backend": backend}
    except ImportError as error:
        raise PicoError(f"--backend {backend} needs its package: pip install {error.name}") from error
    raise PicoError(f"unknown backend {backend!r} (there are: loky, dask, ray)")


def _in_worker(ask: Ask, unit: Unit) -> tuple[Outcome, dict[str, Value]]:
    import torch

    set_code_policy(ask.code)
    torch.set_num_threads(1)  # the workers share the cores
    return run_unit(ask, unit)


def _readers(ask: Ask) -> Readers:
    """Return the open runs, cached per process: a step that many steps are compared with is read once per process."""
    return _opened(ask.runs, _observed(ask.config))


@cache
def _opened(runs: tuple[tuple[str, str], ...], observe: Observe | None) -> Readers:
    return Readers({name: Run.open(place) for name, place in runs}, observe)


def _observed(config: AnalysisConfig) -> Observe | None:
    """Return what is to be observed, None if nothing of it is measured."""
    return config.observe if any(_is_observed(config, task) for task in tasks_of(config)) else None


def _is_observed(config: AnalysisConfig, task: Task) -> bool:
    asked = config.observe
    return asked is not None and task.split == asked.split and task.component.data_type in asked.what


def run_unit(ask: Ask, unit: Unit, threads: int = 1) -> tuple[Outcome, dict[str, Value]]:
    """Return the outcome of one unit, and the values that were computed for it, `threads` layers at a time."""
    readers, all_tasks = _readers(ask), tasks_of(ask.config)
    tasks = [all_tasks[number] for number in unit.tasks]
    steps = {name: chosen_steps(ask.config, there)[0] for name, there in readers.steps.items()}
    before, readers.threads = readers.tensors_read, threads
    cells, outcome = _cells(readers, unit, tasks, steps)
    outcome.found = {number for number, task in zip(unit.tasks, tasks) if any(cell.task is task for cell in cells)}
    with closing(Values(ask.values)) as values:
        known = values.get(cell.key for cell in cells)
    asked = (cell for cell in cells if cell.key not in known and readers.observes(cell.operand.address))
    readers.fetch(sorted({place for cell in asked for place in (cell.place, cell.against) if place is not None}))
    new = dict(compute(cells, known, readers.fixed, threads))
    known |= new
    outcome.rows = [row for cell in cells for row in rows_of(cell, known[cell.key])]
    outcome.computed, outcome.read = len(new), readers.tensors_read - before
    return outcome, new


def _cells(
    readers: Readers, unit: Unit, tasks: list[Task], steps: Mapping[str, list[int]]
) -> tuple[list[Cell], Outcome]:
    outcome, cells = Outcome(), []
    for place in unit.places:
        work = plan_step(readers, place, tasks, steps)
        outcome.absent += work.absent if unit.layer in (None, -1) else []
        for cell in work.cells:
            layer = cell.operand.address.layer
            if unit.layer is None or (-1 if layer is None or layer >= unit.layers else layer) == unit.layer:
                cells.append(cell)
    return cells, outcome


def _fetch_ahead(ask: Ask, progress: Callable[[int, int], None]) -> None:
    """Download what the analysis needs of remote runs: only the kinds of files it reads, several at a time."""
    tasks = tasks_of(ask.config)
    wanted = {pattern for task in tasks for pattern in _patterns(task, _observed(ask.config) is not None)}
    rows = {task.split for task in tasks if task.target is not None and task.component.data_type == "activations"}
    for name, run in _readers(ask).runs.items():
        if type(run).prefetch is not Run.prefetch:
            steps = chosen_steps(ask.config, run.steps)[0]
            log.info("Fetching what is needed of %d steps of %s.", len(steps), name)
            run.prefetch(steps, wanted, rows=rows, progress=progress)


@contextmanager
def _fetching(ask: Ask, units: list[Unit]) -> Iterator[Callable[[int], None]]:
    """Download what each unit needs of a series on the Hub while the one before it is computed.

    Yields a function that waits until a unit is there, and begins to download the next one.
    """
    if not any(run.fetched_by_step for run in _readers(ask).runs.values()):
        yield lambda number: None
        return
    readers = Readers({name: Run.open(place) for name, place in ask.runs})  # another thread's own
    with ThreadPoolExecutor(1, thread_name_prefix="fetch") as pool:
        coming: dict[int, Future[None]] = {}

        def begin(number: int) -> None:
            if number < len(units) and number not in coming:
                coming[number] = pool.submit(_fetch, ask, readers, units[number])

        def wait(number: int) -> None:
            begin(number)
            coming.pop(number).result()
            begin(number + 1)

        yield wait


def _fetch(ask: Ask, readers: Readers, unit: Unit) -> None:
    """Download the files of a unit that are not known by their values. Errors are left to whoever reads the files."""
    all_tasks = tasks_of(ask.config)
    tasks = [all_tasks[number] for number in unit.tasks if not _is_observed(ask.config, all_tasks[number])]
    steps = {name: chosen_steps(ask.config, there)[0] for name, there in readers.steps.items()}
    with suppress(PicoError, OSError):
        readers.asked.clear()
        cells, _ = _cells(readers, unit, tasks, steps)
        with closing(Values(ask.values)) as values:
            known = values.get(cell.key for cell in cells)
        if len(tasks) < len(unit.tasks):
            for run, step in unit.places:
                readers.runs[run][step].fetch([Address("weights", "", "*")])
        elif any(cell.key not in known for cell in cells):
            for run, step, address in readers.asked:
                readers.runs[run][step].fetch([address])


def _tidying(ask: Ask, runs: Mapping[str, Run], units: list[Unit], keep: int | None) -> Callable[[int], None]:
    """Return a function of the number of units that are done. It deletes what was downloaded and is not needed any more."""
    from picolm.readers.hub_series import Downloads, HubSeries
    from picolm.readers.listed import ListedSeries

    if keep is None:
        return lambda done: None
    series = {name: run for name, run in runs.items() if isinstance(run, HubSeries | ListedSeries)}
    downloads = {name: Downloads(run, run.repositories) for name, run in series.items()}
    tasks, steps = tasks_of(ask.config), {name: chosen_steps(ask.config, run.steps)[0] for name, run in runs.items()}
    needed = [set(_places(unit, [tasks[number] for number in unit.tasks], steps)) for unit in units]

    def tidy(done: int) -> None:
        later = set[Place]().union(*needed[done:])
        for name, each in downloads.items():
            measured = dict.fromkeys(place.step for unit in units[:done] for place in unit.places if place.run == name)
            recent = list(measured)[-keep:] if keep else []
            each.keep_only({*recent, *(place.step for place in later if place.run == name)})

    return tidy


def _places(unit: Unit, tasks: Iterable[Task], steps: Mapping[str, list[int]]) -> Iterator[Place]:
    """Yield the steps that a unit reads: its own, and those that it compares them with."""
    for place in unit.places:
        yield place
        for task in tasks:
            if task.target is not None:
                run = task.target.run or place.run
                yield from partner_places(task.target, place, steps[run], task.metric.symmetric)


def _patterns(task: Task, observes: bool) -> Iterator[Address]:
    """Yield what a task reads, as patterns of addresses; circuits need weights too, and so does what is observed."""
    kind = task.component.data_type
    yield Address(kind, task.split if kind in ("gradients", "activations") else "", "*")
    if task.component.component_name in ("ov_circuit", "qk_circuit") or observes:
        yield Address("weights", "", "*")


def _report(outcome: Outcome, ask: Ask, strict: bool) -> None:
    """Log what is missing. Raises PicoError if a metric found nothing at all, or if `strict` and any is missing."""
    tasks, readers = tasks_of(ask.config), _readers(ask)
    for number, task in enumerate(tasks):
        if number not in outcome.found:
            run = next(iter(readers.runs.values()))
            raise PicoError(
                f"{task.metric.name} of {task.component.component_name} ({task.component.data_type}, split {task.split}, "
                f"{task.component.layer_suffixes or 'default layers'}) finds nothing at any step. "
                f"Step {run.steps[-1]} of {run.name} holds {available(readers.at(run.name, run.steps[-1]))}"
            )
    given = [row for row in outcome.rows if row["value"] is not None]
    for metric in dict.fromkeys(row["metric"] for row in given if row["forced"]):
        forced = [row["forced"] or 0 for row in given if row["metric"] == metric]
        log.warning(
            "%s: in %d of %d values up to %d correlations are 1 whatever the data, see the column `forced`; capture more rows, "
            "or compare with the chance level (chance: 20).",
            metric, sum(map(bool, forced)), len(forced), max(forced),
        )  # fmt: skip
    outcome.absent = list(dict.fromkeys(outcome.absent))
    for line in outcome.absent:
        log.warning("Skipped: %s", line)
    if outcome.absent and strict:
        raise PicoError(f"{len(outcome.absent)} things that were asked for are missing (--strict)")


def plan(config: AnalysisConfig, places: Iterable[str]) -> str:
    """Return what an analysis would do, as text: numbers of values and tensors, and the files. Reads manifests only."""
    runs, outcome = _open(config, places), Outcome()
    opened = {name: run for name, (_, run) in runs.items()}
    readers, tasks = Readers(opened, _observed(config)), tasks_of(config)
    steps = {name: chosen_steps(config, there)[0] for name, there in readers.steps.items()}
    values = 0
    for unit in _units(config, opened, outcome):
        cells, part = _cells(readers, unit, [tasks[number] for number in unit.tasks], steps)
        outcome.add(part)
        values += sum(1 for cell in cells for _ in rows_of(cell, Value(None)))
    files = {readers.location(*asked) for asked in readers.asked}
    lines = [f"{len(tasks)} metrics of components, {sum(map(len, steps.values()))} steps of {len(opened)} run(s)"]
    lines += [
        f"{values} values from {len(readers.asked)} tensors in {len(files)} files:",
        *(f"  {file}" for file in sorted(files)),
    ]
    return "\n".join(lines + [f"Missing: {line}" for line in dict.fromkeys(outcome.absent)])
