"""Training: from a configuration to a run on disk."""

from contextlib import ExitStack
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from picolm.train.config import TrainConfig


def run_training(config: "TrainConfig") -> int:
    """Train a model from `config` in the calling process. Returns the exit code: 0, or 128 + signal after a signal.

    Raises UntrustedCode, before anything is written, if `config` comes from a run and names code that is not trusted.
    """
    from picolm.schema import refuse_untrusted
    from picolm.train.build import build
    from picolm.train.failure import StopSignal
    from picolm.train.loop import train
    from picolm.train.report import log_summary

    refuse_untrusted(config)
    with ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        job = build(config, stop, stack)
        stack.enter_context(job.progress)
        if job.continued_from is None or job.continued_from < job.plan.last:
            job.progress.start(job.state.step, job.plan.last)
            train(job)
        log_summary(job)
        return 128 + stop.received if stop.received is not None else 0
