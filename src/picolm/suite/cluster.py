"""Train members as jobs of a SLURM cluster, through submitit: one job per member, with its own nodes and devices.

A job that runs out of time saves its state and is queued again. The job ids are stored beside the suite, so a repeated
command waits for jobs that are queued instead of queueing them twice.
"""

import json
import logging
import re
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from picolm.errors import PicoError
from picolm.registry import CodePolicy, code_policy, set_code_policy
from picolm.slurm import queued
from picolm.store.files import disk_errors, write_atomically
from picolm.suite.config import Member, SuiteConfig
from picolm.suite.local import Failure
from picolm.trusted import read_json

log = logging.getLogger("picolm")

JOBS = "jobs.json"
POLL_S = 5.0
LATE_S = 10  # seconds: a shared file system may show a result late
# Set before torch is loaded: as many threads as a process has cores, and idle threads that stop spinning early.
SETUP = [
    "export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}",
    "export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-10000}",
    "export PYTHONSAFEPATH=1",  # `python -m` must not import from the folder that the job was queued from
]


class Training:
    """The work of a job, on each of its processes. submitit pickles it, calls it, and asks it what to queue again.

    Shortly before the time limit SLURM sends SIGUSR2, and submitit answers by queueing the job again; here the run
    saves its state first. After SIGTERM (somebody cancelled the job, or SLURM needs its nodes) it saves as well, and
    SLURM decides what becomes of the job.
    """

    code = CodePolicy()  # for jobs that an earlier version queued

    def __init__(self, file: str, code: CodePolicy):
        self.file, self.code = file, code

    def __call__(self) -> None:
        set_code_policy(self.code)
        from picolm.schema import load
        from picolm.train import run_training
        from picolm.train.config import schema_for

        before = signal.getsignal(signal.SIGTERM)
        queue_again: Any = signal.getsignal(signal.SIGUSR2)
        time_is_up = False

        def end_in_time(number: int, frame: FrameType | None) -> None:
            nonlocal time_is_up
            time_is_up = True
            if signal.getsignal(signal.SIGTERM) == before:  # training has not started: there is nothing to save
                queue_again(number, frame)
            else:
                signal.raise_signal(signal.SIGTERM)  # the training finishes its step, saves, and returns

        signal.signal(signal.SIGUSR2, end_in_time)
        code = run_training(load(self.file, schema_for))
        if code == 128 + signal.SIGTERM:
            if time_is_up:
                queue_again(signal.SIGUSR2, None)  # this ends the first process
            sys.exit(code)
        if code:
            raise PicoError(f"training ended early, with exit code {code}; its steps so far are kept")

    def checkpoint(self) -> Any:
        """Return what submitit queues again: the run resumes from its latest checkpoint."""
        return _submitit().helpers.DelayedSubmission(Training(self.file, self.code))


def train_on_cluster(config: SuiteConfig, members: list[Member], files: Mapping[str, Path]) -> list[Failure]:
    """Queue the members that are not queued yet, wait for all of them, and return those that failed.

    files: the configuration of each member, by name, under a path that the nodes can read too.
    """
    logging.getLogger("submitit").setLevel(logging.ERROR)  # it warns when there is no sacct, which is not used here
    jobs, failures = _jobs(config, members, files), list[Failure]()
    while jobs:
        # A result is not the end, as a job may be queued again after it: a job has ended when it has left the queue.
        waiting = queued([job.job_id for job in jobs.values()])
        for name in [name for name, job in jobs.items() if job.job_id not in waiting]:
            failure = _outcome(name, jobs.pop(name))
            if failure is None:
                log.info("%s: trained; %d to go.", name, len(jobs))
            else:
                failures.append(failure)
                log.warning("%s failed: %s", *failure)
        if jobs:
            time.sleep(POLL_S)
    return failures


def _jobs(config: SuiteConfig, members: list[Member], files: Mapping[str, Path]) -> dict[str, Any]:
    """Return a job per member: the one that is queued already, or a new one."""
    folder, record = config.folder / "jobs", config.folder / JOBS
    known: dict[str, str] = read_json(record, dict[str, str]) if record.exists() else {}
    there, jobs = queued(known.values()), dict[str, Any]()
    for member in members:
        if known.get(member.name) in there:
            fabric = member.config.training.fabric
            tasks = range(fabric.num_nodes * fabric.num_devices)
            job = _submitit().SlurmJob(folder=folder.resolve(), job_id=known[member.name], tasks=tasks)
            log.info("%s: waiting for job %s, which is queued already.", member.name, job.job_id)
        else:
            job = _submit(config, member, files[member.name].resolve(), folder)
            known[member.name] = job.job_id
            with disk_errors("the list of jobs", record):
                write_atomically(record, (json.dumps(known, indent=1) + "\n").encode())
            log.info("%s: job %s is queued; what it says is in %s.", member.name, job.job_id, folder)
        jobs[member.name] = job
    return jobs


def _submit(config: SuiteConfig, member: Member, file: Path, folder: Path) -> Any:
    """Queue a job, and return it.

    Raises PicoError without sbatch, for parameters that submitit does not have, and for what sbatch refuses.
    """
    fabric = member.config.training.fabric
    parameters: dict[str, Any] = {"name": member.name, "nodes": fabric.num_nodes, "tasks_per_node": fabric.num_devices}
    if fabric.accelerator in ("cuda", "gpu"):
        parameters["gpus_per_node"] = fabric.num_devices
    setup = {"slurm_setup": [*SETUP, *config.slurm.get("slurm_setup", ())]}
    try:
        executor = _submitit().AutoExecutor(folder=str(folder.resolve()), cluster="slurm")
        executor.update_parameters(**parameters | config.slurm | setup)
        return executor.submit(Training(str(file), code_policy()))
    except (RuntimeError, NameError, TypeError, ValueError, OSError) as error:
        raise PicoError(f"{member.name} cannot be queued: {error}") from error


def _outcome(name: str, job: Any) -> Failure | None:
    """Return how a job failed, None when it did not.

    Each of its processes leaves a result, or the traceback of an error.
    """
    processes = [job.task(number) for number in range(job.num_tasks)]
    results = [process.paths.result_pickle for process in processes]
    latest = time.monotonic() + LATE_S
    while not all(result.exists() for result in results) and time.monotonic() < latest:
        time.sleep(1)
    ended = [process for process in processes if process.paths.result_pickle.exists()]
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


def _submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise PicoError("--executor slurm needs its package: pip install 'picolm[slurm]'") from error
    return submitit
