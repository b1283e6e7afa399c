"""Training members as jobs of a SLURM cluster, through submitit: one job per member, with its own nodes and devices.

A job that is preempted or runs out of time is queued again and goes on from its latest checkpoint. The identifiers of jobs are
kept beside the suite, so giving the command again waits for what is queued instead of queueing it twice.
"""

import json
import logging
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from picolm.errors import PicoError
from picolm.suite.config import Member, SuiteConfig
from picolm.suite.local import Failure

log = logging.getLogger("picolm")

JOBS = "jobs.json"
POLL_S = 5.0


class Training:
    """What a job does, on each of its processes. submitit pickles it, calls it, and asks it for what to queue again."""

    def __init__(self, file: str):
        self.file = file

    def __call__(self) -> None:
        from picolm.schema import load
        from picolm.train import run_training
        from picolm.train.config import schema_for

        code = run_training(load(self.file, schema_for))
        if code:
            raise PicoError(f"training ended early, with exit code {code}; its steps so far are kept")

    def checkpoint(self) -> Any:
        """Called when the job is about to be taken away: the run goes on from its latest checkpoint."""
        import submitit

        return submitit.helpers.DelayedSubmission(Training(self.file))


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
    jobs, began = _jobs(config, members, files, cluster), time.monotonic()
    failures: list[Failure] = []
    while jobs:
        for name in [name for name, job in jobs.items() if job.done()]:
            failure = _outcome(name, jobs.pop(name))
            if failure is None:
                done(next(member for member in members if member.name == name), time.monotonic() - began)
            else:
                failures.append(failure)
                log.warning("%s failed: %s", *failure)
        time.sleep(POLL_S if cluster == "slurm" else 0.2)
    return failures


def _jobs(config: SuiteConfig, members: list[Member], files: list[Path], cluster: str) -> dict[str, Any]:
    """A job per member: the one that is queued already, or a new one."""
    folder, record = config.folder / "jobs", config.folder / JOBS
    known: dict[str, str] = json.loads(record.read_text()) if record.exists() else {}
    jobs: dict[str, Any] = {}
    for member, file in zip(members, files, strict=True):
        job = _queued(folder, known.get(member.name), cluster)
        if job is None:
            job = _submit(config, member, file.resolve(), folder, cluster)
            known[member.name] = job.job_id
            record.write_text(json.dumps(known, indent=1) + "\n")
            log.info("%s: job %s is queued; what it says is in %s.", member.name, job.job_id, folder)
        else:
            log.info("%s: waiting for job %s, which is queued already.", member.name, job.job_id)
        jobs[member.name] = job
    return jobs


def _submit(config: SuiteConfig, member: Member, file: Path, folder: Path, cluster: str) -> Any:
    fabric = member.config.training.fabric
    parameters: dict[str, Any] = {"name": member.name, "nodes": fabric.num_nodes, "tasks_per_node": fabric.num_devices}
    if fabric.accelerator in ("cuda", "gpu"):
        parameters["gpus_per_node"] = fabric.num_devices
    try:
        executor = _submitit().AutoExecutor(folder=str(folder.resolve()), cluster=cluster)
        executor.update_parameters(**parameters | config.slurm)
        return executor.submit(Training(str(file)))
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


def _queued(folder: Path, identifier: str | None, cluster: str) -> Any | None:
    """The job of that identifier, while it is queued or running: by squeue, which every cluster has, and not by sacct."""
    if identifier is None or cluster != "slurm" or shutil.which("squeue") is None:
        return None
    command = ["squeue", "--noheader", "--format=%T", "--jobs", identifier]
    if not subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip():
        return None
    return _submitit().SlurmJob(folder=folder.resolve(), job_id=identifier)


def _outcome(name: str, job: Any) -> Failure | None:
    error = job.exception()
    if error is None:
        return None
    # submitit puts the traceback of the job between two lines of dashes, and advice behind them
    trace = re.split(r"^-{5,}$", str(error), flags=re.MULTILINE)[1:2] or [str(error)]
    last = (trace[0].strip().splitlines() or [type(error).__name__])[-1]
    return Failure(name, f"job {job.job_id}: {last} ({job.paths.stderr})")


def _submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise PicoError("--executor slurm needs its package: pip install 'picolm[slurm]'") from error
    return submitit
