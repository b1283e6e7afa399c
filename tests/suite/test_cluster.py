"""Jobs through submitit: here its executor that runs them as processes; the same code queues them with SLURM."""

import pickle
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from picolm.errors import PicoError
from picolm.registry import CodePolicy
from picolm.schema import dump
from picolm.suite import cluster
from picolm.suite.config import load_suite
from picolm.suite.standing import standing


def test_without_submitit_the_extra_is_named(toy_suite: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    suite = load_suite(toy_suite())
    with pytest.raises(PicoError, match=r"pip install 'picolm\[slurm\]'"):
        cluster._submit(suite.config, suite.members[0], Path("x.yaml"), Path("jobs"))


def test_a_job_asks_for_the_nodes_and_devices_of_its_member(
    toy_suite: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    asked: dict[str, Any] = {}

    class Executor:
        def __init__(self, **options: Any) -> None: ...

        def update_parameters(self, **parameters: Any) -> None:
            asked.update(parameters)

        def submit(self, call: Any) -> Any:
            return call

    monkeypatch.setattr("submitit.AutoExecutor", Executor)
    fabric = "overrides.training.fabric={num_nodes: 2, num_devices: 4, accelerator: cuda}"
    suite = load_suite(
        toy_suite(),
        [
            fabric,
            "overrides.training.optimization.gradient_accumulation_steps=1",
            "slurm={timeout_min: 9, slurm_setup: [module load cuda]}",
        ],
    )
    job = cluster._submit(suite.config, suite.members[0], Path("x.yaml"), Path("jobs"))
    assert asked == {
        "name": "toys-small", "nodes": 2, "tasks_per_node": 4, "gpus_per_node": 4, "timeout_min": 9,
        "slurm_setup": [*cluster.SETUP, "module load cuda"],
    }  # fmt: skip
    assert job.checkpoint().function.file == "x.yaml"  # what is queued again after a preemption


@pytest.mark.skipif(shutil.which("srun") is None, reason="SLURM is not installed")
def test_a_parameter_that_there_is_not(toy_suite: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    suite = load_suite(toy_suite(), ["slurm={slurm_partitoin: gpu}"])
    with pytest.raises(PicoError, match=r"toys-small cannot be queued: .*partitoin"):
        cluster._submit(suite.config, suite.members[0], Path("x.yaml"), tmp_path / "jobs")


def test_an_error_of_one_process_is_told_rather_than_the_silence_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr(cluster, "LATE_S", 0)
    job = submitit.SlurmJob(folder=tmp_path, job_id="7", tasks=(0, 1))
    silent = cluster._outcome("toy", job)
    assert silent is not None
    assert "job 7 left the queue without a result: it was cancelled, killed" in silent.reason
    job.task(1).paths.result_pickle.write_bytes(pickle.dumps(("error", "Traceback\n...\nValueError: no such layer")))
    told = cluster._outcome("toy", job)
    assert told is not None
    assert told.reason.startswith("job 7: ValueError: no such layer (")


@pytest.mark.slow
def test_what_a_job_does_and_how_it_ended(toy_suite: Callable[..., Path], tmp_path: Path) -> None:
    """By submitit's own processes on this machine; tests/slurm has the same with SLURM."""
    submitit = pytest.importorskip("submitit")
    suite = load_suite(toy_suite())
    files = [tmp_path / f"{member.name}.yaml" for member in suite.members]
    for member, file in zip(suite.members, files):
        file.write_text(dump(member.config))
    files[1].write_text("model: {d_modell: 3}\n")
    executor = submitit.LocalExecutor(folder=tmp_path / "jobs")
    executor.update_parameters(timeout_min=5)
    jobs = [executor.submit(cluster.Training(str(file), CodePolicy())) for file in files]
    while not all(job.done() for job in jobs):
        time.sleep(0.1)
    assert cluster._outcome("toys-small", jobs[0]) is None
    assert standing(suite.members[0]).state == "finished"
    failure = cluster._outcome("toys-wide", jobs[1])
    assert failure is not None
    assert failure.name == "toys-wide"
    assert "unknown key" in failure.reason
