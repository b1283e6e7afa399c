"""Query the queue of SLURM with squeue, which every cluster has; sacct needs a database that many clusters lack."""

import shutil
import subprocess
from collections.abc import Collection

_UNKNOWN = "Invalid job id"


def queued(jobs: Collection[str]) -> set[str]:
    """Return which of the jobs (or job arrays) are pending, running or completing; none if squeue is not installed.

    If SLURM does not answer, all jobs are returned, since it is not known that they have ended.
    """
    if not jobs or shutil.which("squeue") is None:
        return set()
    command = ["squeue", "--noheader", "--format=%F", "--jobs", ",".join(jobs)]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    if asked.returncode == 0:
        return set(jobs) & set(asked.stdout.split())
    return set() if _UNKNOWN in asked.stderr else set(jobs)
