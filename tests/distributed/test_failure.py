"""When one process of several fails, all end soon, the first error is shown first, and nothing is left running."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from picolm.errors import DataError, PicoError
from picolm.train.failure import lost_connection

from .conftest import PICO, torchrun

slow = pytest.mark.slow
BAD = (
    "data.dataset.name=lab:source", "evaluation.metrics=null", "checkpointing.learning_dynamics.what=[]",
    "checkpointing.save_in_background=false",
)  # fmt: skip


def left_behind(name: str) -> list[str]:
    """Command lines of processes that still train the run of this folder."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_text().split("\0")
        except OSError:
            continue
        if any(name in word for word in words) and "train" in words:
            found.append(" ".join(words))
    return found


@slow
@pytest.mark.parametrize(
    ("rank", "how", "launcher", "first", "code"),
    [
        (1, "unreadable", PICO, r"[process 1 on ", 1),
        (0, "unreadable", PICO, "shard 7, row 3: cannot be read", 1),
        (1, "bug", torchrun(2), r"[process 1 on ", 1),
        (1, "SIGKILL", PICO, "process 1 ended the run: was killed by SIGKILL (out of memory?)", 1),
        (0, "SIGKILL", PICO, "[process 1 on ", -signal.SIGKILL),
    ],
    ids=["unreadable-1", "unreadable-0", "bug-under-torchrun", "killed-1", "killed-0"],
)
def test_one_failure_ends_all(
    launch: Any, open_run: Any, config: Path, rank: int, how: str, launcher: list[str], first: str, code: int
) -> None:
    done = launch("bad", 2, *BAD, launcher=launcher, HOW=how, BAD_RANK=str(rank))
    assert done.returncode == code, done.stderr
    until = time.monotonic() + 20
    while left_behind(str(config)) and time.monotonic() < until:  # those that lost the first process leave on their own
        time.sleep(0.2)
    assert left_behind(str(config)) == []
    lines = [line for line in done.stderr.splitlines() if not line.startswith(("step ", "W1", "E1", "I1"))]
    assert any(line.startswith(first) for line in lines), done.stderr
    if how == "unreadable":
        assert done.stderr.count("Traceback") == 0
        said = [line for line in lines if "cannot be read" in line]
        assert said[0].startswith(first)
        assert len(said) == (2 if rank else 1)  # where it happened, then by the first process
        assert "Connection closed" not in done.stderr
    if how == "bug":
        assert done.stderr.index("KeyError: 'no such thing'") < done.stderr.index("process 1 ended the run: KeyError")
    if (rank, how) == (0, "SIGKILL"):
        assert "the first process is gone" in done.stderr
    assert open_run("bad").latest_whole()[0].step == 0


@slow
def test_a_process_that_is_silent_is_missed(config: Path, environment: dict[str, str]) -> None:
    command = [*PICO, "train", str(config), "checkpointing.run_name=silent", "training.fabric.num_devices=2", *BAD]
    begin = time.monotonic()
    done = subprocess.run(
        [*command, "training.fabric.timeout_s=4"],
        env=environment | {"HOW": "SIGSTOP", "BAD_RANK": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "process 1 ended the run: has given no sign of life for 2 s" in done.stderr
    assert time.monotonic() - begin < 60
    assert left_behind(str(config)) == []


@slow
def test_slurm_tells_each_process_its_place(
    config: Path, open_run: Any, environment: dict[str, str], launch: Any
) -> None:
    """Two nodes of one process each, as srun would start them: nothing but the environment says so."""
    words = ["training.max_steps=2", "training.fabric.num_devices=1", "training.fabric.num_nodes=2"]
    command = [*PICO, "train", str(config), "checkpointing.run_name=slurm", *words]
    slurm = {
        "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "pico",
        "SLURM_NODELIST": "localhost", "SLURM_LOCALID": "0", "MASTER_PORT": str(20000 + os.getpid() % 20000),
    }  # fmt: skip
    tasks = [
        subprocess.Popen(
            command,
            env=environment | slurm | {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [task.communicate(timeout=120)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], errors
    assert "Trained 2 steps" in errors[0]
    assert errors[1] == ""
    assert open_run("slurm").environment["world_size"] == 2
    assert launch("one", 1, "training.max_steps=2").returncode == 0
    losses = [[e["train/loss"] for e in open_run(name).metrics() if "train/loss" in e] for name in ("slurm", "one")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("fsdp", r"training.fabric.strategy: fsdp is not supported: it hides parameters in flat buffers.*use fsdp2"),
        ("dp", r"dp is not supported: .*use ddp"),
        ("ddp_spawn", r"ddp_spawn is not supported: .*use ddp"),
        ("fsdp3", r"unknown training.fabric.strategy 'fsdp3'; did you mean 'fsdp2'\? \(there are: auto, ddp, .*fsdp2"),
    ],
)
def test_a_strategy_that_cannot_do_it_says_so(make_config: Any, strategy: str, message: str) -> None:
    from picolm.train import run_training

    with pytest.raises(PicoError, match=message):
        run_training(make_config(f"training.fabric.strategy={strategy}"))


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[/x/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3"), True),
        (torch.distributed.DistNetworkError("recv failed"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (DataError("gloo.parquet row 3: no such token"), False),
        (KeyError("gloo"), False),
    ],
)
def test_a_broken_connection_is_told_from_an_error_of_ones_own(error: Exception, lost: bool) -> None:
    assert lost_connection(error) is lost
