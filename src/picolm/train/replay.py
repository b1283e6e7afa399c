"""Replay: recompute any step with the same training loop, from the nearest earlier checkpoint, and save what is wanted.

Batches, learning rates and noise are functions of the step, so training from an earlier checkpoint leads to the same
state at step n. With the same versions and hardware the bits are the same; the digests recorded by the run prove it.
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
from picolm.schema import refuse_untrusted
from picolm.store import Run
from picolm.store.checkpoint import weights_digest
from picolm.store.writer import BackgroundWriter
from picolm.train.build import equip
from picolm.train.config import TrainConfig
from picolm.train.devices import keeps_shards
from picolm.train.failure import StopSignal
from picolm.train.history import check_same_data, check_trained, origin, recorded_digests, relative_difference, segments
from picolm.train.job import Due, Job, Plan, Schedule
from picolm.train.loop import train
from picolm.train.state import check_sizes

log = logging.getLogger("picolm")

UNUSED = ("evaluation.metrics", "evaluation.lm_eval.")  # keys whose code a replay never runs: it evaluates nothing


class ReplayPlan:
    """The schedule of a replay: keep `kinds` at each of `steps`, nothing else, and end at `last`. Logs as the run did."""

    def __init__(self, original: Schedule, last: int, steps: Collection[int], kinds: Due):
        self.original, self.last, self.steps, self.kinds = original, last, steps, kinds

    def due(self, step: int) -> Due:
        """Return what is due at `step`. `log` is that of the run: averages in checkpoints are updated at logged steps."""
        kept = self.kinds if step in self.steps else Due()
        return kept._replace(log=self.original.due(step).log)

    def when_stopping(self, step: int) -> Due:
        """Return nothing due: an interrupted replay keeps nothing of its current step."""
        return Due()


class Comparison(NamedTuple):
    """A recorded step compared with its replay.

    difference: relative difference of the weights if they are not identical and the run stores them, else None.
    """

    step: int
    identical: bool
    difference: float | None


@dataclass
class Verdict:
    """The result of a replay. first: the step of the checkpoint it started from. last: its last step. stopped: the
    number of the signal that ended it early, or None.
    """

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
    """Recompute `steps` (ascending) of `run` in one pass and write `kinds` of them to `destination`. Returns a verdict.

    about: extra provenance for the manifests. overrides: `key=value` for where to compute and what to capture.
    verify: compare the weights at every recorded step, up to the first recorded step at or after the last of `steps`.
    watchers: callbacks that are called with (job, step) at each step, before its update. Raises PicoError for steps
    that were never trained, for data other than those of the run, and if `destination` holds a step with other weights.
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
            # A step at which the configuration changed belongs to the segment before the change, as in the run.
            kept = [step for step in steps if first < step <= end or step == first == begin.step]
            job.plan = ReplayPlan(Plan(config), end, kept, kinds)
            job.most_skipped = math.inf  # the run continued after these skipped updates
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
    """Build a job on the data of the run. Returns the job. hands_on: whether its final state is passed to another job.

    Raises PicoError if the data are not those of the run, or if a sharded state would have to be passed on.
    """
    job = equip(config, stop, stack)
    if hands_on and keeps_shards(job.fabric):  # no process has the complete state
        raise PicoError("the configuration changed on the way: give training.fabric.strategy=ddp, or one device")
    check_same_data(run, job.batches.fingerprint, job.config)
    return job


def _remember(end: int, metas: dict[int, Mapping[str, Any]]) -> Any:
    """Return a watcher that stores the counters of step `end` in `metas`, before its loss is counted.

    The next segment starts with this step and counts the loss.
    """

    def remember(job: Job, step: int) -> None:
        if step == end:
            metas[end] = job.state.meta()

    return remember


class CarefulWriter(BackgroundWriter):
    """A writer that replaces an existing step only by one that has all of its tensors, with the same weights."""

    def submit(self, step: int, tensors: Any, **arguments: Any) -> None:
        """Queue a step. Raises PicoError if the step exists with tensors that are not in `tensors`, or other weights."""
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
    stack.enter_context(destination.lock())  # locked first, so that a conflict shows before the training
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
    """Use as many threads as the run: sums on a CPU are split by threads, and another split rounds differently."""
    threads = (run.environment.get("hardware") or {}).get("threads")
    if threads and threads != torch.get_num_threads():
        log.info("Computing with %d thread(s), as the run did.", threads)
        torch.set_num_threads(threads)
