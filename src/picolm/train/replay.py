"""Any step again: the same loop from the nearest checkpoint, with another plan of what is kept.

Batches, learning rates and noise are functions of the step, so the state of step n is that of an earlier checkpoint after
training on. On the same versions and hardware it has the same bits, which the digests that the run recorded can prove.
"""

import logging
import math
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from picolm.address import Address
from picolm.errors import PicoError
from picolm.provenance import refuse_untrusted
from picolm.store import Run
from picolm.store.identity import weights_digest
from picolm.store.writer import BackgroundWriter
from picolm.train.build import equip
from picolm.train.config import TrainConfig
from picolm.train.history import check_same_data, check_trained, origin, recorded_digests, relative_difference, segments
from picolm.train.job import Job
from picolm.train.loop import train
from picolm.train.plan import Due, Plan, Schedule
from picolm.train.signals import StopSignal
from picolm.train.state import check_sizes
from picolm.train.strategies import keeps_shards

log = logging.getLogger("picolm")

UNUSED = ("evaluation.metrics", "evaluation.lm_eval.")  # code that a replay does not need: it evaluates nothing


class ReplayPlan:
    """The cadence of the run, but only `kinds` of `steps` are kept, and it ends at `last`."""

    def __init__(self, original: Schedule, last: int, steps: Collection[int], kinds: Due):
        self.original, self.last, self.steps, self.kinds = original, last, steps, kinds

    def due(self, step: int) -> Due:
        """`log` stays as it was: the running averages that a checkpoint holds are updated at logged steps."""
        kept = self.kinds if step in self.steps else Due()
        return kept._replace(log=self.original.due(step).log)

    def when_stopping(self, step: int) -> Due:
        """A replay that is interrupted leaves nothing of the step it was at."""
        return Due()


class Comparison(NamedTuple):
    """One recorded step against the same step made again. difference: relative, of the weights, where they are stored."""

    step: int
    identical: bool
    difference: float | None


@dataclass
class Verdict:
    """What came of a replay. first: the checkpoint it began with; stopped: the signal that ended it early, if one did."""

    first: int
    last: int
    seconds: float = 0.0
    compared: list[Comparison] = field(default_factory=list)
    stopped: int | None = None

    @property
    def identical(self) -> bool:
        return all(comparison.identical for comparison in self.compared)


def replay(
    run: Run,
    steps: Sequence[int],
    *,
    kinds: Due,
    destination: Run | None = None,
    about: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    verify: bool = False,
    watchers: Sequence[Any] = (),
) -> Verdict:
    """Make `steps` of `run` again, in one pass, and keep `kinds` of them in `destination`.

    verify: compare the weights at every recorded step on the way, and go on to the first one at or after the last step.
    watchers: called with (job, step) at each step, before its update. Raises PicoError for steps that were never trained,
    other data than the run had, and a destination that holds one of the steps with other weights.
    """
    check_trained(run, steps[-1])
    begin = origin(run, steps[0])
    recorded = recorded_digests(run) if verify else {}
    last = next((step for step in recorded if step >= steps[-1]), steps[-1])
    verdict = Verdict(begin.step, last)
    started, writer = time.perf_counter(), None
    tensors: Mapping[Address, Tensor] = begin
    metas = {begin.step: begin.meta}
    _use_threads(run)
    with ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        stretches = list(segments(run, begin.step, last, overrides))
        for config, _, _ in stretches:
            refuse_untrusted(config, but=UNUSED)
        for config, first, end in stretches:
            check_sizes(config.model, begin)
            job = _equip(run, config, stop, stack, hands_on=len(stretches) > 1)
            job.state.restore(tensors, metas[first])
            # The step at which the configuration changed was saved before it did.
            kept = [step for step in steps if first < step <= end or step == first == begin.step]
            job.plan = ReplayPlan(Plan(config), end, kept, kinds)
            job.most_skipped = math.inf  # the run came past them
            job.about = {"replayed": {"run": run.name, "from_step": begin.step}, **(about or {})}
            job.watchers = [*watchers, _compare(run, recorded, verdict), _remember(end, metas)]
            if destination is not None and job.fabric.is_global_zero:
                writer = writer or _writer(destination, stack)
                job.run, job.writer = destination, writer
            with job.progress:
                job.progress.start(first, end)
                train(job)
            if stop.received is not None:
                verdict.stopped = stop.received
                break
            tensors = {**job.state.weights(), **job.state.moments()}
    verdict.seconds = time.perf_counter() - started
    return verdict


def _equip(run: Run, config: TrainConfig, stop: StopSignal, stack: ExitStack, hands_on: bool) -> Job:
    """A job on the data of the run. hands_on: whether its state will be given to another one."""
    job = equip(config, stop, stack)
    if hands_on and keeps_shards(job.fabric):  # no process has the whole state
        raise PicoError("the configuration changed on the way: give training.fabric.strategy=ddp, or one device")
    check_same_data(run, job.batches.fingerprint, job.config)
    return job


def _remember(end: int, metas: dict[int, Mapping[str, Any]]) -> Any:
    """Keep the counters of the step that a stretch ends with, before its loss is taken note of: the next stretch does that."""

    def remember(job: Job, step: int) -> None:
        if step == end:
            metas[end] = job.state.meta()

    return remember


class CarefulWriter(BackgroundWriter):
    """Adds steps; one that is there already is only ever replaced by one that holds all of it, unchanged, and more."""

    def submit(self, step: int, tensors: Any, **arguments: Any) -> None:
        """Raises PicoError where the step is there with other content."""
        if step in self.run:
            there = self.run[step]
            missing = [address for address in there if address not in tensors]
            kept = [address for address in there.select(kind="weights") if address in tensors]
            if missing:
                raise PicoError(f"{there.path} holds {missing[0]}, which the replay does not make; it is left as it is")
            if kept and weights_digest({a: tensors[a] for a in kept}) != weights_digest({a: there[a] for a in kept}):
                raise PicoError(f"{there.path} is there with other weights; it is left as it is")
        super().submit(step, tensors, **arguments)


def _writer(destination: Run, stack: ExitStack) -> CarefulWriter:
    stack.enter_context(destination.lock())  # refused at the start rather than after the training
    writer = CarefulWriter(destination)
    stack.enter_context(writer)
    return writer


def _compare(run: Run, recorded: Mapping[int, str], verdict: Verdict) -> Any:
    def compare(job: Job, step: int) -> None:
        if step not in recorded or any(comparison.step == step for comparison in verdict.compared):
            return
        weights = job.state.weights()  # gathered from all processes
        if not job.fabric.is_global_zero:
            return
        identical, difference = weights_digest(weights) == recorded[step], None
        if not identical and step in run and run[step].select(kind="weights"):
            difference = relative_difference(weights, run[step])
        verdict.compared.append(Comparison(step, identical, difference))

    return compare


def _use_threads(run: Run) -> None:
    """As many threads as the run had: sums on a CPU are split by threads, and another split rounds differently."""
    threads = (run.environment.get("hardware") or {}).get("threads")
    if threads and threads != torch.get_num_threads():
        log.info("Computing with %d thread(s), as the run did.", threads)
        torch.set_num_threads(threads)
