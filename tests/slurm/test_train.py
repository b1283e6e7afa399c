"""The batch scripts of examples/slurm on a real cluster of two nodes, without its GPUs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.slurm.conftest import Slurm, wait_for

from picolm.store import Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

EXAMPLES = Path(__file__).parents[2] / "examples" / "slurm"
NO_GPU = ["--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1", "--time=10"]


def losses(place: Path) -> dict[int, float]:
    return {entry["step"]: entry["train/loss"] for entry in Run.open(place).metrics() if "train/loss" in entry}


def test_one_process_on_each_of_two_nodes_stopped_and_queued_again(
    slurm: Slurm, make_config: Callable[..., Any], tmp_path: Path
) -> None:
    make_config()  # writes toy.yaml
    words = [
        "toy.yaml",
        "training.max_steps=800",
        "checkpointing.save_every_n_steps=100000",
        "monitoring.logging.log_every_n_steps=20",
    ]
    slurm("sbatch", *NO_GPU, EXAMPLES / "train.sbatch", *words, "checkpointing.run_name=two")
    run = tmp_path / "runs/two"
    wait_for(lambda: (run / "run.json").exists() and len(losses(run)) > 3)
    slurm("scancel", "--signal=TERM", slurm.number("pico"))  # to its processes, as SLURM does before the time is up
    wait_for(lambda: not slurm.jobs, 300)
    (log,) = tmp_path.glob("pico-*.log")
    first, stopped, last = Run.open(run).steps
    assert (first, last) == (0, 800), log.read_text()
    assert 0 < stopped < 800
    assert Run.open(run).environment["world_size"] == 2
    slurm("pico", "train", *words, "checkpointing.run_name=one")
    one, two = losses(tmp_path / "runs/one"), losses(run)
    assert one.keys() <= two.keys()
    early = [step for step in one if step <= 40]
    assert [two[step] for step in early] == pytest.approx([one[step] for step in early], rel=1e-5)


def test_torchrun_on_each_of_two_nodes(slurm: Slurm, make_config: Callable[..., Any], tmp_path: Path) -> None:
    make_config()  # writes toy.yaml
    slurm.environment["GPUS"] = "1"
    slurm("sbatch", "--wait", *NO_GPU, EXAMPLES / "torchrun.sbatch", "toy.yaml", "checkpointing.run_name=two")
    slurm("pico", "train", "toy.yaml", "checkpointing.run_name=one")
    one, two = losses(tmp_path / "runs/one"), losses(tmp_path / "runs/two")
    assert Run.open(tmp_path / "runs/two").environment["world_size"] == 2
    assert list(two) == list(one)
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-5)
