"""Fetch what an analysis reads of remote runs, before it is needed, and delete what is needed no more."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress

from picolm.address import Address
from picolm.analyze.components import CIRCUITS
from picolm.analyze.compute import Task, tasks_of
from picolm.analyze.pairing import Place, partner_places
from picolm.analyze.reading import Readers
from picolm.analyze.values import Values
from picolm.analyze.work import Ask, Unit, cells_of, chosen_steps, is_observed, observed, readers_of
from picolm.errors import PicoError
from picolm.store import Run

log = logging.getLogger("picolm")


def fetch_ahead(ask: Ask, progress: Callable[[int, int], None]) -> None:
    """Download what the analysis needs of remote runs: only the kinds of files it reads, several at a time."""
    tasks = tasks_of(ask.config)
    wanted = {pattern for task in tasks for pattern in _patterns(task, observed(ask.config) is not None)}
    if ask.config.probes:
        wanted.add(Address("weights", "", "*"))
    rows = {task.split for task in tasks if task.target is not None and task.component.data_type == "activations"}
    for name, run in readers_of(ask).runs.items():
        if type(run).prefetch is not Run.prefetch:
            steps = chosen_steps(ask.config, run.steps)[0]
            log.info("Fetching what is needed of %d steps of %s.", len(steps), name)
            run.prefetch(steps, wanted, rows=rows, progress=progress)


@contextmanager
def fetching(ask: Ask, units: list[Unit]) -> Iterator[Callable[[int], None]]:
    """Download what each unit needs of a series on the Hub while the one before it is computed.

    Yields a function that waits until a unit is there, and begins to download the next one.
    """
    if not any(run.fetched_by_step for run in readers_of(ask).runs.values()):
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
    tasks = [all_tasks[number] for number in unit.tasks if not is_observed(ask.config, all_tasks[number])]
    steps = {name: chosen_steps(ask.config, there)[0] for name, there in readers.steps.items()}
    with suppress(PicoError, OSError):
        readers.asked.clear()
        cells, _ = cells_of(readers, unit, tasks, steps)
        with closing(Values(ask.values)) as values:
            known = values.get(cell.key for cell in cells)
        if len(tasks) < len(unit.tasks) or unit.probes:
            for run, step in unit.places:
                readers.runs[run][step].fetch([Address("weights", "", "*")])
        elif any(cell.key not in known for cell in cells):
            for run, step, address in readers.asked:
                readers.runs[run][step].fetch([address])


def tidying(ask: Ask, runs: Mapping[str, Run], units: list[Unit], keep: int | None) -> Callable[[int], None]:
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
    if task.component.component_name in CIRCUITS or observes:
        yield Address("weights", "", "*")
