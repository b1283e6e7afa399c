"""`pico data prepare --executor slurm` on a real cluster: arrays of tasks, each stage after the one before."""

from hashlib import sha256
from pathlib import Path

import pytest
from tests.slurm.conftest import Slurm, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_tasks_on_two_nodes_prepare_the_rows_of_one_process(slurm: Slurm, tmp_path: Path) -> None:
    pytest.importorskip("datatrove", reason="the extra corpora is not installed")
    for source in ("east", "west"):
        (tmp_path / "texts" / source).mkdir(parents=True)
        for number in range(60):
            text = f"Ship {number} went {source} and came home again with {number * number} sacks. " * 200
            (tmp_path / "texts" / source / f"{number}.txt").write_text(text)
    command = [
        "pico", "data", "prepare", "texts", "--vocab-size", "300", "--seq-len", "32", "--val-fraction", "0.1", "--memory", "1",
    ]  # fmt: skip
    slurm(*command, "--out", "alone")
    on_cluster = [
        *command, "--out", "rows", "--executor", "slurm", "--tasks", "2", "--slurm", "partition=cpu", "--slurm", "time=00:10:00",
    ]  # fmt: skip
    first = slurm(*on_cluster)
    assert slurm.jobs
    jobs = slurm("squeue", "--noheader", "--format=%F")
    assert slurm(*on_cluster) == first  # what is queued is not queued again
    assert set(slurm("squeue", "--noheader", "--format=%F").split()) <= set(jobs.split())
    wait_for((tmp_path / "rows").exists, 400)
    assert digests(tmp_path / "rows") == digests(tmp_path / "alone")
    wait_for(lambda: not slurm.jobs)
    assert "documents" in slurm(*on_cluster)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "rows", "texts"]
