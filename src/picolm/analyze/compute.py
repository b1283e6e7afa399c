"""Compute the values of the long table from a configuration and runs.

The work is split by steps. First all values of one step are planned, from names and digests alone; then cached values
are looked up; then the tensors that are still needed are read, one matrix at a time. So memory does not grow with the
number of steps, nothing is computed twice, and steps can be spread over processes. If every step is compared with every
other, the work is split by layer instead, with one layer at all steps in memory.
"""

import hashlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import groupby
from typing import Any, NamedTuple

from picolm.analyze.components import COMPONENTS, Operand, digest_of
from picolm.analyze.config import AnalysisConfig, Component, Target
from picolm.analyze.matrix import Matrix
from picolm.analyze.metrics import Metric, Undefined, find_metric
from picolm.analyze.pairing import Place, by_name, check_same_rows, partner_places, partners
from picolm.analyze.permuted import Permuted
from picolm.analyze.reading import Reader, Readers
from picolm.analyze.values import Value
from picolm.errors import PicoError
from picolm.models.anatomy import CAPTURED


@dataclass(frozen=True)
class Task:
    """One metric of one component: an entry of the configuration with one of its components."""

    metric: Any
    options: tuple[tuple[str, Any], ...]
    component: Component
    split: str
    target: Target | None
    chance: int | None = None  # number of permutations
    statespace: bool | None = None  # of a component that nobody named: which models it is for (None: all)

    @cached_property
    def identity(self) -> str:
        """Digest of what a value depends on besides the matrices: metric, code, options, number of permutations."""
        codes = code_of(self.metric.function), code_of(COMPONENTS.get(self.component.component_name))
        return digest_of(self.metric.name, *codes, self.options, *filter(None, [self.chance]))

    def fits(self, reader: Reader | None) -> bool:
        """Return whether the task is for the model of a step."""
        return self.statespace is None or (
            reader is not None and self.statespace == ("ssm.output" in reader.anatomy.parts)
        )


class Cell(NamedTuple):
    """A value to compute: its task, run and step, operand, optional partner with run and step, and cache key."""

    task: Task
    place: Place
    operand: Operand
    against: Place | None
    partner: Operand | None
    key: str


@dataclass
class Work:
    """The work of one step: the values to compute, and sentences on what is missing."""

    cells: list[Cell] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)


def tasks_of(config: AnalysisConfig) -> list[Task]:
    """Return the tasks of a configuration, in its order."""
    tasks, observed = [], config.observe.split if config.observe is not None else None
    for entry in config.metrics:
        metric = find_metric(entry.metric_name)
        target = entry.compared_with if metric.arity == 2 else None
        split = entry.data_split or observed or ("val" if metric.arity == 2 else "train")
        options = tuple(sorted(entry.options.items()))
        components = [(named, None) for named in entry.components or ()] or default_components(metric)
        tasks += [Task(metric, options, named, split, target, entry.chance, models) for named, models in components]
    return tasks


def default_components(metric: Any) -> list[tuple[Component, bool | None]]:
    """Return the components of an entry that names none, each with whether it is for state space models (None: for all models).

    Metrics that need matching rows take what the layers write to the residual stream: activations of OV circuits and MLPs, of a
    state space model those of the output projection. Others take captured weights and gradients.
    """
    if metric.arity == 2 and metric.needs == "rows":
        return [
            (Component(component_name="ov_circuit", data_type="activations"), False),
            (Component(component_name="mlp", data_type="activations"), False),
            (Component(data_type="activations", layer_suffixes=("ssm.output",)), True),
        ]
    kinds = [kind for kind in ("weights", "gradients") if kind in metric.of]
    return [(Component(data_type=kind, layer_suffixes=CAPTURED), None) for kind in kinds]


@cache
def code_of(function: Any) -> str:
    """Return a digest of the source of a metric or component, so that an edited formula is computed again."""
    shared = (sys.modules[part.__module__] for part in (Matrix, Permuted, Metric))
    modules = (inspect.getmodule(function), *shared)
    return hashlib.sha256(
        "".join(inspect.getsource(module) for module in modules if module is not None).encode()
    ).hexdigest()


def plan_step(readers: Readers, place: Place, tasks: Iterable[Task], steps: Mapping[str, list[int]]) -> Work:
    """Return the values that `tasks` need at one step. Reads no tensor. Raises PicoError for an invalid comparison."""
    work = Work()
    reader = readers.at(*place)
    if reader is None:
        work.absent.append(f"step {place.step} of {place.run}: there is no such checkpoint")
        return work
    for task in tasks:
        if not task.fits(reader):
            continue
        found, absent = reader.operands(task.component, task.split)
        work.absent += [f"{reader.name}: no {missing.what}" for missing in absent]
        if task.target is None:
            work.cells += [Cell(task, place, operand, None, None, _key(task, operand)) for operand in found]
        else:
            _plan_pairs(readers, reader, place, task, found, steps, work)
    work.absent = list(dict.fromkeys(work.absent))
    return work


def _plan_pairs(
    readers: Readers,
    reader: Reader,
    place: Place,
    task: Task,
    found: list[Operand],
    steps: Mapping[str, list[int]],
    work: Work,
) -> None:
    assert task.target is not None
    run = task.target.run or place.run
    for other in partner_places(task.target, place, steps[run], task.metric.symmetric):
        kept = has_fixed_target(task) or task.target.checkpoint == "all"
        other_reader = reader if other == place else readers.at(*other, pin=kept)
        if other_reader is None:
            work.absent.append(f"step {other.step} of {other.run}, to compare with: there is no such checkpoint")
            continue
        candidates, absent = other_reader.operands(task.component, task.split)
        work.absent += [f"{other_reader.name}, to compare with: no {missing.what}" for missing in absent]
        index = by_name(candidates)
        mirrored = task.target.layer == "all" and other == place and task.metric.symmetric
        for operand in found:
            check_same_rows(reader, other_reader, operand.address)
            for partner in partners(operand, index, task.target):
                if mirrored and _after(partner, operand):
                    continue  # the reversed pair gets its row from the computed pair
                work.cells.append(Cell(task, place, operand, other, partner, _key(task, operand, partner)))


def _after(partner: Operand, operand: Operand) -> bool:
    return (partner.address.layer or 0) > (operand.address.layer or 0)


def _key(task: Task, *matrices: Operand) -> str:
    digests = [matrix.digest for matrix in matrices]
    return digest_of(task.identity, sorted(digests) if task.metric.symmetric else digests)


def compute(
    cells: Iterable[Cell], known: Mapping[str, Value], fixed: dict[str, Matrix] | None = None, threads: int = 1
) -> Iterator[tuple[str, Value]]:
    """Yield (cache key, value) of the cells that are not in `known`, layer by layer, `threads` layers at a time.

    fixed: matrices of the step that all others are compared with, kept from call to call with all their derived
    quantities; other matrices are released after their last value.
    """
    unknown = sorted((cell for cell in cells if cell.key not in known), key=_layer_and_matrix)
    layers = [list(group) for _, group in groupby(unknown, key=lambda cell: _layer_and_matrix(cell)[0])]
    kept = {} if fixed is None else fixed
    if threads == 1:
        yield from (value for layer in layers for value in _compute_layer(layer, kept))
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="layer") as pool:
        for values in pool.map(lambda layer: list(_compute_layer(layer, kept)), layers):
            yield from values


def _compute_layer(cells: list[Cell], fixed: dict[str, Matrix]) -> Iterator[tuple[str, Value]]:
    """Yield the values of cells that are sorted by matrix; the tensors of a layer are read once for all of them."""
    uses, held, done = _uses(cells), dict[str, Matrix](), set[str]()
    for cell in cells:
        pair = [cell.operand, *([cell.partner] if cell.partner is not None else [])]
        for operand in pair:
            if operand.digest not in held:
                held[operand.digest] = fixed.get(operand.digest) or operand.load()
        if cell.partner is not None and has_fixed_target(cell.task):
            fixed[cell.partner.digest] = held[cell.partner.digest]
        if cell.key not in done:
            done.add(cell.key)
            yield cell.key, _value(cell, [held[operand.digest] for operand in pair])
        for operand in pair:
            uses[operand.digest] -= 1
            if not uses[operand.digest]:
                held.pop(operand.digest, None)


def has_fixed_target(task: Task) -> bool:
    """Return whether all steps are compared with the same step."""
    return task.target is not None and task.target.checkpoint not in ("previous", "same", "all")


def _layer_and_matrix(cell: Cell) -> tuple[int, str]:
    layer = cell.operand.address.layer
    return -1 if layer is None else layer, cell.operand.digest


def _uses(cells: Iterable[Cell]) -> dict[str, int]:
    """Return how many values each matrix is needed for, by digest."""
    uses: dict[str, int] = {}
    for cell in cells:
        for operand in filter(None, (cell.operand, cell.partner)):
            uses[operand.digest] = uses.get(operand.digest, 0) + 1
    return uses


def _value(cell: Cell, matrices: list[Matrix]) -> Value:
    metric, options = cell.task.metric, dict(cell.task.options)
    try:
        forced = _or_none(lambda: metric.forced(*matrices, **options))
        try:
            value = metric(*matrices, **options)
        except Undefined as undefined:
            return Value(None, str(undefined), forced)
        if cell.task.chance is None:
            return Value(value, forced=forced)
        if metric.symmetric and cell.partner is not None and cell.partner.digest < cell.operand.digest:
            matrices = matrices[
                ::-1
            ]  # both orders of a pair have one cache key: the digests decide which matrix is permuted
        try:
            chance = metric.chance(*matrices, draws=cell.task.chance, **options)
        except Undefined as undefined:
            return Value(value, f"no chance level: {undefined}", forced)
        return Value(value, "", forced, chance.mean, chance.std)
    except PicoError:
        raise
    except Exception as error:
        what = f"{cell.operand.address} of step {cell.place.step} of {cell.place.run}"
        raise PicoError(f"{metric.name} fails on {what}: {type(error).__name__}: {error}") from error


def _or_none(count: Callable[[], int | None]) -> int | None:
    try:
        return count()
    except Undefined:
        return None


def rows_of(cell: Cell, value: Value) -> Iterator[dict[str, Any]]:
    """Yield the rows of the long table for a value: one, or two if it is also the value of the reversed pair."""
    yield _row(cell.task, cell.place, cell.operand, cell.against, cell.partner, value)
    if is_mirrored(cell):
        assert cell.against is not None
        assert cell.partner is not None
        yield _row(cell.task, cell.against, cell.partner, cell.place, cell.operand, value)


def _row(
    task: Task, place: Place, operand: Operand, against: Place | None, partner: Operand | None, value: Value
) -> dict[str, Any]:
    kind, split, module = operand.address
    compared = (against.run, against.step, partner.address.layer) if against and partner else (None, None, None)
    return {
        "run": place.run,
        "step": place.step,
        "split": split,
        "component": task.component.component_name,
        "kind": kind,
        "layer": operand.address.layer,
        "head": operand.head,
        "module": module,
        "metric": task.metric.name,
        "metric_kind": task.metric.kind,
        "options": " ".join(f"{key}={option}" for key, option in (*task.options, *_chance_option(task))),
        "value": value.value,
        "chance": value.chance,
        "chance_std": value.chance_std,
        "z": value.z,
        "forced": value.forced,
        **dict(zip(("against_run", "against_step", "against_layer"), compared)),
        "target": "" if task.target is None else task.target.words,
        "reason": value.reason,
        "note": "",  # the engine writes it
        **dict.fromkeys(("bin", "units", "definition", "rows"), ""),
        "standard_error": None,
        "asked_split": task.split,
    }


def _chance_option(task: Task) -> list[tuple[str, int]]:
    return [] if task.chance is None else [("chance", task.chance)]


def is_mirrored(cell: Cell) -> bool:
    """Return whether the value is also that of the reversed pair, which is not planned on its own."""
    target = cell.task.target
    if target is None or cell.partner is None or cell.against is None or not cell.task.metric.symmetric:
        return False
    layers = target.layer == "all" and cell.against == cell.place and _after(cell.operand, cell.partner)
    steps = target.checkpoint == "all" and cell.against.run == cell.place.run and cell.against.step < cell.place.step
    return layers or steps
