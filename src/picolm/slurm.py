"""What SLURM has in its queue. By squeue, which every cluster has; sacct needs a database that many do without."""

import shutil
import subprocess
from collections.abc import Collection

_UNKNOWN = "Invalid job id"


def queued(jobs: Collection[str]) -> set[str]:
    """Those of the jobs (or arrays of jobs) that wait, run, or are about to end. Without SLURM's commands: none.

    While SLURM does not answer it is not known that a job is over, so all of them count.
    """
    if not jobs or shutil.which("squeue") is None:
        return set()
    command = ["squeue", "--noheader", "--format=%F", "--jobs", ",".join(jobs)]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    if asked.returncode == 0:
        return set(jobs) & set(asked.stdout.split())
    return set() if _UNKNOWN in asked.stderr else set(jobs)
