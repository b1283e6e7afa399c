"""Run an analysis: spread the work over processes, use cached values, report what is missing."""

import importlib
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from picolm.analyze.components import CIRCUITS, available
from picolm.analyze.compute import compute, rows_of, tasks_of
from picolm.analyze.config import AnalysisConfig
from picolm.analyze.fetching import fetch_ahead, fetching, tidying
from picolm.analyze.heads import read_anatomy, stated_anatomy
from picolm.analyze.probing import over_steps, probe_step
from picolm.analyze.reading import Readers, model_section
from picolm.analyze.values import Value, Values, rename_damaged
from picolm.analyze.work import (
    Ask,
    Outcome,
    Unit,
    cells_of,
    chosen_steps,
    fits_any,
    forget_runs,
    observed,
    readers_of,
    units_of,
)
from picolm.errors import PicoError
from picolm.registry import code_policy, set_code_policy
from picolm.store import Run
from picolm.store.listing import damaged

log = logging.getLogger("picolm")

WIDE = 192  # width of a model from which layers are computed in parallel; below it, Python takes most of the time
OF_HEADS = (*CIRCUITS, "per_head")  # whose rows say what the architecture adds to them


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
    forget_runs()
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
    units = list(units_of(config, by_name, outcome))
    fetch_ahead(ask, progress)
    tidy = tidying(ask, by_name, units, keep_downloads)
    with closing(Values(ask.values)) as values:
        for done, (part, new) in enumerate(_results(ask, units, workers, backend), start=1):
            values.add(new)
            values.add_readings(part.readings)
            outcome.add(part)
            tidy(done)
            progress(done, len(units))
    outcome.rows += list(over_steps(config, outcome.rows))
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
        if row["component"] in OF_HEADS:
            if row["run"] not in left_out:
                run = runs[row["run"]]
                left_out[row["run"]] = read_anatomy(run[row["step"]], model_section(run), row["run"]).notes
            other = {"ov_circuit": "QK", "qk_circuit": "OV"}.get(row["component"])
            found += [note for note in left_out[row["run"]] if other is None or other not in note]
        row["note"] = "; ".join(filter(None, (row["note"], *found)))


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


def run_unit(ask: Ask, unit: Unit, threads: int = 1) -> tuple[Outcome, dict[str, Value]]:
    """Return the outcome of one unit, and the values that were computed for it, `threads` layers at a time."""
    readers, all_tasks = readers_of(ask), tasks_of(ask.config)
    tasks = [all_tasks[number] for number in unit.tasks]
    steps = {name: chosen_steps(ask.config, there)[0] for name, there in readers.steps.items()}
    before, readers.threads = readers.tensors_read, threads
    cells, outcome = cells_of(readers, unit, tasks, steps)
    outcome.found = {number for number, task in zip(unit.tasks, tasks) if any(cell.task is task for cell in cells)}
    with closing(Values(ask.values)) as values:
        known = values.get(cell.key for cell in cells)
    asked = (cell for cell in cells if cell.key not in known and readers.observes(cell.operand.address))
    readers.fetch(sorted({place for cell in asked for place in (cell.place, cell.against) if place is not None}))
    new = dict(compute(cells, known, readers.fixed, threads))
    known |= new
    outcome.rows = [row for cell in cells for row in rows_of(cell, known[cell.key])]
    outcome.computed, outcome.read = len(new), readers.tensors_read - before
    if unit.probes:
        for place in unit.places:
            outcome.add(probe_step(ask, readers, place))
    return outcome, new


def _results(ask: Ask, units: list[Unit], workers: int, backend: str) -> Iterator[tuple[Outcome, dict[str, Value]]]:
    if workers == 1 and backend == "loky":
        with _threads_for(readers_of(ask)) as threads, fetching(ask, units) as fetched:
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


def _in_worker(ask: Ask, unit: Unit) -> tuple[Outcome, dict[str, Value]]:
    import torch

    set_code_policy(ask.code)
    torch.set_num_threads(1)  # the workers share the cores
    return run_unit(ask, unit)


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


def _report(outcome: Outcome, ask: Ask, strict: bool) -> None:
    """Log what is missing. Raises PicoError if a metric found nothing at all, or if `strict` and any is missing."""
    tasks, readers = tasks_of(ask.config), readers_of(ask)
    for number, task in enumerate(tasks):
        if number not in outcome.found and fits_any(ask.config, readers, task):
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
    readers, tasks = Readers(opened, observed(config)), tasks_of(config)
    steps = {name: chosen_steps(config, there)[0] for name, there in readers.steps.items()}
    values = 0
    for unit in units_of(config, opened, outcome):
        cells, part = cells_of(readers, unit, [tasks[number] for number in unit.tasks], steps)
        outcome.add(part)
        values += sum(1 for cell in cells for _ in rows_of(cell, Value(None)))
    files = {readers.location(*asked) for asked in readers.asked}
    probes = "".join(f", probe {entry.probe_name}" for entry in config.probes)
    fitting = sum(fits_any(config, readers, task) for task in tasks)
    lines = [f"{fitting} metrics of components{probes}, {sum(map(len, steps.values()))} steps of {len(opened)} run(s)"]
    lines += [
        f"{values} values from {len(readers.asked)} tensors in {len(files)} files:",
        *(f"  {file}" for file in sorted(files)),
    ]
    return "\n".join(lines + [f"Missing: {line}" for line in dict.fromkeys(outcome.absent)])
