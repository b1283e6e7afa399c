"""The one door to datatrove: its executors do our stages, its filters judge our documents.

Each task of a stage does every N-th unit; datatrove starts the tasks, here, on SLURM or on Ray, and keeps their logs in
`logs/STAGE-N` of the job's folder. The result does not depend on any of it (see `job.py`).
"""

from __future__ import annotations

import atexit
import inspect
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import joblib

from picolm.data.documents import Document
from picolm.data.job import Job, Progress, Stage, read_sealed, run_stage, sealed, written
from picolm.errors import DataError
from picolm.registry import did_you_mean
from picolm.slurm import queued

try:
    from datatrove.data import Document as TroveDocument
    from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
    from datatrove.pipeline.base import PipelineStep
    from loguru import logger
except ImportError as error:
    raise DataError(f"this needs datatrove ({error}): pip install 'picolm[corpora]'") from error

_OURS = ("pipeline", "tasks", "workers", "depends", "depends_job_id", "logging_dir", "skip_completed", "job_name")
_QUIET = open(os.devnull, "w")  # noqa: SIM115  (until the process ends; log lines are in the logs)
atexit.register(_QUIET.close)


@dataclass(frozen=True)
class Local:
    """Tasks in processes of this machine, `workers` at once."""

    tasks: int
    workers: int

    def __call__(self, job: Job, stages: Sequence[Stage], progress: Progress) -> bool:
        """Do all stages; those of one unit in this process."""
        return _in_turn(job, stages, progress, self._run)

    def _run(self, job: Job, stage: Stage, units: int) -> None:
        tasks = min(self.tasks, units)
        workers = min(self.workers, tasks)
        with _threads_shared_by(workers), redirect_stderr(_QUIET):
            logger.remove()
            executor = _QuietLocal(
                [Units(job, stage)], tasks=tasks, workers=workers, logging_dir=_logs(job, stage, tasks)
            )
            executor.run()


@dataclass(frozen=True)
class Ray:
    """Tasks on the Ray cluster that the environment names (RAY_ADDRESS), or one started here."""

    tasks: int
    workers: int

    def __call__(self, job: Job, stages: Sequence[Stage], progress: Progress) -> bool:
        """Do all stages; those of one unit in this process."""
        try:
            import ray
        except ImportError as error:
            raise DataError("--executor ray needs Ray: pip install 'picolm[ray]', or use --executor local") from error
        if not ray.is_initialized():
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        return _in_turn(job, stages, progress, self._run)

    def _run(self, job: Job, stage: Stage, units: int) -> None:
        tasks = min(self.tasks, units)
        with redirect_stderr(_QUIET):
            logger.remove()
            RayPipelineExecutor(
                [Units(job, stage)], tasks=tasks, workers=min(self.workers, tasks), logging_dir=_logs(job, stage, tasks)
            ).run()


@dataclass(frozen=True)
class Slurm:
    """Arrays of tasks on SLURM, each stage after the one before. options: of datatrove's SlurmPipelineExecutor."""

    tasks: int
    workers: int
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, job: Job, stages: Sequence[Stage], progress: Progress) -> bool:
        """Hand in what is not done; False, as nobody waits here. Nothing is handed in twice."""
        submitted = job.path("slurm.json")
        if submitted.is_file() and queued([str(number) for number in read_sealed(submitted, job.folder)]):
            return False
        executors = list[SlurmPipelineExecutor]()
        for stage in stages:
            executors.append(self._executor(job, stage, executors[-1] if executors else None))
        with redirect_stderr(_QUIET):
            logger.remove()
            try:
                executors[-1].run()  # and before it those that it depends on
            except (OSError, subprocess.CalledProcessError) as error:
                raise DataError(f"sbatch took no job ({error}); is this a machine that may hand in jobs?") from error
        with written(submitted) as file:
            file.write(sealed([executor.job_id for executor in executors if executor.job_id != -1]))
        return False

    def _executor(self, job: Job, stage: Stage, before: SlurmPipelineExecutor | None) -> SlurmPipelineExecutor:
        tasks = 1 if stage.is_single else self.tasks
        environment = Path(sys.prefix) / "bin" / "activate"
        given = {
            "qos": None, "venv_path": str(environment) if environment.is_file() else None,
            "sbatch_args": {"kill-on-invalid-dep": "yes"}, "workers": self.workers,
        } | self.options  # fmt: skip
        return SlurmPipelineExecutor(
            [Units(job, stage)], tasks=tasks, depends=before, logging_dir=_logs(job, stage, tasks),
            job_name=f"pico-{stage.name}", **given,
        )  # fmt: skip


def executor(kind: str, tasks: int, workers: int | None = None, options: Sequence[str] = ()) -> Local | Ray | Slurm:
    """The executor of this name. workers: tasks at once, None: as many as there are processors (local), else all.

    options: KEY=VALUE of datatrove's SlurmPipelineExecutor, such as partition and time. Raises PicoError.
    """
    if tasks < 1 or (workers is not None and workers < 1):
        raise DataError(f"tasks is {tasks}, workers is {workers}; both are numbers from 1")
    if kind == "slurm":
        return Slurm(tasks, workers or -1, _slurm_options(options))
    if options:
        raise DataError(f"--slurm {options[0]}: is for --executor slurm")
    if kind not in ("local", "ray"):
        known = ("local", "slurm", "ray")
        raise DataError(f"unknown executor {kind!r}{did_you_mean(kind, known)} (there are: {', '.join(known)})")
    if kind == "ray":
        return Ray(tasks, workers or tasks)
    return Local(tasks, workers or min(tasks, joblib.cpu_count()))


class Units(PipelineStep):
    """A pipeline of one step: every N-th unit of a stage."""

    name, type = "units", "pico"

    def __init__(self, job: Job, stage: Stage):
        super().__init__()
        self._work = partial(run_stage, job, stage)

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Do the units of a task."""
        self._work(rank=rank, world=world_size)
        yield from ()


class _QuietLocal(LocalPipelineExecutor):
    """Its tasks' lines go to their logs alone: what the user has to know is said by whoever called."""

    def _run_for_rank(self, *arguments: Any, **named: Any) -> Any:
        with redirect_stderr(_QUIET):
            return super()._run_for_rank(*arguments, **named)


def adapted_filter(part: type, options: dict[str, Any], text: str) -> Callable[[Document], bool]:
    """A filter class of datatrove as a function of our documents."""
    try:
        judge = part(**options)
    except (TypeError, ImportError) as error:
        raise DataError(f"filter {text!r}: {error}") from error
    if not hasattr(judge, "filter"):
        raise DataError(f"filter {text!r}: {part.__name__} has no method `filter`")

    def keep(document: Document) -> bool:
        verdict = judge.filter(TroveDocument(text=document.text, id="", metadata={"source": document.source}))
        return bool(verdict[0] if isinstance(verdict, tuple) else verdict)

    return keep


def _in_turn(job: Job, stages: Sequence[Stage], progress: Progress, spread: Callable[[Job, Stage, int], None]) -> bool:
    for stage in stages:
        units = stage.units(job)
        if not stage.is_single and not all(job.is_done(stage.name, unit) for unit in range(units)):
            spread(job, stage, units)
            progress(stage.name, units, units)
            if missing := sum(not job.is_done(stage.name, unit) for unit in range(units)):
                raise DataError(
                    f"{missing} of {units} units of the stage {stage.name} failed; see the logs in {job.path('logs')}"
                )
        if stage.is_single:
            run_stage(job, stage, progress)
    return True


def _logs(job: Job, stage: Stage, tasks: int) -> str:
    return str(job.path("logs", f"{stage.name}-{tasks}").absolute())


@contextmanager
def _threads_shared_by(workers: int) -> Iterator[None]:
    """As many threads for each worker's tokenizer as leave none waiting, unless the user decided otherwise."""
    decided = "RAYON_NUM_THREADS" in os.environ
    if not decided:
        os.environ["RAYON_NUM_THREADS"] = str(max(1, joblib.cpu_count() // workers))
    try:
        yield
    finally:
        if not decided:
            del os.environ["RAYON_NUM_THREADS"]


def _slurm_options(words: Sequence[str]) -> dict[str, Any]:
    known = [name for name in inspect.signature(SlurmPipelineExecutor).parameters if name not in _OURS]
    options = dict[str, Any]()
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in known:
            raise DataError(
                f"--slurm {word}: is not KEY=VALUE of an option{did_you_mean(key, known)} ({', '.join(known)})"
            )
        options[key] = int(value) if value.lstrip("-").isdigit() else value
    if missing := [name for name in ("partition", "time") if name not in options]:
        raise DataError(f"--executor slurm needs {' and '.join(f'--slurm {name}=…' for name in missing)}")
    return options
