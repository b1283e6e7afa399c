"""Training members as jobs of a SLURM cluster, through submitit: one job per member, with its own nodes and devices.

A job that runs out of time saves its state and is queued again. The identifiers of jobs are kept beside the suite, so giving
the command again waits for what is queued instead of queueing it twice.
"""

import json
import logging
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from picolm.errors import PicoError
from picolm.registry import CodePolicy, code_policy, set_code_policy
from picolm.slurm import queued
from picolm.store.files import write_atomically
from picolm.suite.config import Member, SuiteConfig
from picolm.suite.local import Failure
from picolm.trusted import read_json

log = logging.getLogger("picolm")

JOBS = "jobs.json"
POLL_S = 5.0
LATE_S = 10
# Before torch is loaded: as many threads as the job has cores for a process, and none that spins in the way of others.
SETUP = [
    "export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}",
    "export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-10000}",
    "export PYTHONSAFEPATH=1",  # `python -m` finds no modules in the folder that the job was queued from
]


class Training:
    """What a job does, on each of its processes. submitit pickles it, calls it, and asks it for what to queue again.

    Shortly before the time is up SLURM sends SIGUSR2, which submitit answers by queueing the job again; here the run saves its
    state first. After SIGTERM (somebody cancelled the job, or SLURM needs its nodes) it saves as well, and what becomes of
    the job is SLURM's to decide.
    """

    code = CodePolicy()  # for jobs that an earlier version queued

    def __init__(self, file: str, code: CodePolicy):
        self.file, self.code = file, code

    def __call__(self) -> None:
        set_code_policy(self.code)
        from picolm.schema import load
        from picolm.train import run_training
        from picolm.train.config import schema_for

        time_is_up = _LastMinutes()
        code = run_training(load(self.file, schema_for))
        if code == 128 + signal.SIGTERM:
            if time_is_up.came:
                time_is_up.queue_again()
            sys.exit(code)
        if code:
            raise PicoError(f"training ended early, with exit code {code}; its steps so far are kept")

    def checkpoint(self) -> Any:
        """What to queue again: the run goes on from its latest checkpoint."""
        import submitit

        return submitit.helpers.DelayedSubmission(Training(self.file, self.code))


class _LastMinutes:
    """Listens for SIGUSR2, and passes it on to a training that is under way as the SIGTERM that makes it save and end."""

    def __init__(self) -> None:
        self.came = False
        self._before = signal.getsignal(signal.SIGTERM)
        self._queue_again: Any = signal.signal(signal.SIGUSR2, self._receive)

    def queue_again(self) -> None:
        """Put the job into the queue once more, as submitit does it; the first process leaves with that."""
        self._queue_again(signal.SIGUSR2, None)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        if signal.getsignal(signal.SIGTERM) == self._before:  # no training listens yet: there is nothing to save
            self.queue_again()
        else:
            signal.raise_signal(signal.SIGTERM)


def train_on_cluster(
    config: SuiteConfig,
    members: list[Member],
    files: list[Path],
    done: Callable[[Member, float], None],
    cluster: str = "slurm",
) -> list[Failure]:
    """Queue the members that are not queued yet, wait for all of them, and return those that failed.

    files: the configuration of each, under a path that the nodes see too. cluster: of submitit; `local` runs jobs as processes.
    """
    logging.getLogger("submitit").setLevel(logging.ERROR)  # it warns where there is no sacct, which nothing here asks
    jobs, began = _jobs(config, members, files, cluster), time.monotonic()
    failures: list[Failure] = []
    while jobs:
        for name in _over(jobs, cluster):
            failure = _outcome(name, jobs.pop(name))
            if failure is None:
                done(next(member for member in members if member.name == name), time.monotonic() - began)
            else:
                failures.append(failure)
                log.warning("%s failed: %s", *failure)
        time.sleep(POLL_S if cluster == "slurm" else 0.2)
    return failures


def _over(jobs: dict[str, Any], cluster: str) -> list[str]:
    """The names of the jobs that have ended, in whatever way: a result is no end, as a job may be queued again after it."""
    if cluster != "slurm":
        return [name for name, job in jobs.items() if job.done()]
    waiting = queued([job.job_id for job in jobs.values()])
    return [name for name, job in jobs.items() if job.job_id not in waiting]


def _jobs(config: SuiteConfig, members: list[Member], files: list[Path], cluster: str) -> dict[str, Any]:
    """A job per member: the one that is queued already, or a new one."""
    folder, record = config.folder / "jobs", config.folder / JOBS
    known: dict[str, str] = read_json(record, dict[str, str]) if record.exists() else {}
    there = queued(known.values()) if cluster == "slurm" else set()
    jobs: dict[str, Any] = {}
    for member, file in zip(members, files, strict=True):
        if known.get(member.name) in there:
            processes = range(member.config.training.fabric.num_nodes * member.config.training.fabric.num_devices)
            job = _submitit().SlurmJob(folder=folder.resolve(), job_id=known[member.name], tasks=processes)
            log.info("%s: waiting for job %s, which is queued already.", member.name, job.job_id)
        else:
            job = _submit(config, member, file.resolve(), folder, cluster)
            known[member.name] = job.job_id
            write_atomically(record, (json.dumps(known, indent=1) + "\n").encode())
            log.info("%s: job %s is queued; what it says is in %s.", member.name, job.job_id, folder)
        jobs[member.name] = job
    return jobs


def _submit(config: SuiteConfig, member: Member, file: Path, folder: Path, cluster: str) -> Any:
    fabric = member.config.training.fabric
    parameters: dict[str, Any] = {"name": member.name, "nodes": fabric.num_nodes, "tasks_per_node": fabric.num_devices}
    if fabric.accelerator in ("cuda", "gpu"):
        parameters["gpus_per_node"] = fabric.num_devices
    own = {"slurm_setup": [*SETUP, *config.slurm.get("slurm_setup", ())]}
    try:
        executor = _submitit().AutoExecutor(folder=str(folder.resolve()), cluster=cluster)
        executor.update_parameters(**parameters | config.slurm | own)
        return executor.submit(Training(str(file), code_policy()))
    except (
        RuntimeError,
        NameError,
        TypeError,
        ValueError,
        OSError,
    ) as error:  # no sbatch here, a parameter that there is not
        raise PicoError(f"{member.name} cannot be queued: {error}") from error
    except Exception as error:  # submitit raises its own for what sbatch says
        if type(error).__module__.startswith("submitit"):
            raise PicoError(f"{member.name} cannot be queued: {error}") from error
        raise


def _outcome(name: str, job: Any) -> Failure | None:
    """How a job ended, by what its processes left: each of them a result, or the traceback of an error."""
    processes = [job.task(number) for number in range(job.num_tasks)]
    ended = _with_result(processes)
    for process in ended:
        error = process.exception()
        if error is not None:
            # submitit puts the traceback of the job between two lines of dashes, and advice behind them
            trace = re.split(r"^-{5,}$", str(error), flags=re.MULTILINE)[1:2] or [str(error)]
            last = (trace[0].strip().splitlines() or [type(error).__name__])[-1]
            return Failure(name, f"job {job.job_id}: {last} ({process.paths.stderr})")
    if len(ended) < len(processes):
        reason = "left the queue without a result: it was cancelled, killed, or lost its node"
        return Failure(name, f"job {job.job_id} {reason} ({processes[0].paths.stderr})")
    return None


def _with_result(processes: list[Any]) -> list[Any]:
    """Those that left one; a file system that machines share may show it late."""
    for _ in range(LATE_S):
        if all(process.paths.result_pickle.exists() for process in processes):
            break
        time.sleep(1)
    return [process for process in processes if process.paths.result_pickle.exists()]


def _submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise PicoError("--executor slurm needs its package: pip install 'picolm[slurm]'") from error
    return submitit
