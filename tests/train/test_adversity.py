"""What the world does to a training: a full disk, a lost folder, a second process, a clock that jumps, a signal too early."""

import logging.config
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from picolm.console import configure_logging
from picolm.errors import PicoError, StoreError
from picolm.store import Run
from picolm.store.checkpoint import SealedCheckpoint
from picolm.train import report, run_training

Train = Callable[..., Run]
MAIN = "from picolm.cli import main; print('ready', flush=True); main()"
QUIET = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, happening: Callable[[], object]) -> None:
    """Let something happen at the end of a step."""
    original = report.step

    def and_then(job: Any, number: int, *arguments: Any) -> None:
        original(job, number, *arguments)
        if number == step:
            happening()

    monkeypatch.setattr(report, "step", and_then)


def delete(place: Path) -> None:
    while place.exists():  # a step may be under way there
        shutil.rmtree(place, ignore_errors=True)


def states(run: Run) -> dict[int, Any]:
    return {step: run[step].manifest.files for step in run}  # type: ignore[attr-defined]


def test_a_disk_without_a_byte_left_shows_one_message(
    make_config: Any, monkeypatch: pytest.MonkeyPatch, small_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not one for each line of the log that cannot be written either."""

    def fill() -> None:
        while not (small_disk / "toy/checkpoints/step_0").exists():  # it is written beside the training
            time.sleep(0.01)
        (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free))
        logging.getLogger("picolm").warning("x" * 10_000)

    at_step(monkeypatch, 1, fill)
    with pytest.raises(
        StoreError, match=r"(step 2|step_2.json|a line of metrics) cannot be written to .*: no space left"
    ):
        run_training(make_config(f"checkpointing.runs_dir={small_disk}"))
    said = capfd.readouterr().err
    assert "x" * 10_000 in said
    assert "Logging error" not in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_disk_that_fills_up_ends_the_run_and_space_lets_it_go_on(
    train: Train, make_config: Any, small_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ("training.max_steps=12", f"checkpointing.runs_dir={small_disk}")
    whole = train("training.max_steps=12")
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - 500_000))
    with pytest.raises(
        StoreError, match=r"cannot be written to .*: no space left; .* What was stored before is intact"
    ):
        run_training(make_config(*options))
    assert "Traceback" not in capfd.readouterr().err
    run = Run.open(small_disk / "toy")
    assert run.steps
    assert 12 not in run
    assert all(run.problems(step) == [] for step in run.step_directories())
    ballast.unlink()
    assert states(train(*options)) == states(whole)


def test_a_disk_that_is_full_from_the_start(
    make_config: Any, small_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    with pytest.raises(
        StoreError, match=r"the configuration cannot be written to .*: no space left; it needs \d\.\d kB, 0 B"
    ):
        run_training(make_config(f"checkpointing.runs_dir={small_disk}"))
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("begun", [False, True])
def test_a_read_only_disk_is_named(train: Train, make_config: Any, small_disk: Path, begun: bool) -> None:
    options = (
        f"checkpointing.runs_dir={small_disk}",
        "training.max_steps=2",
        "checkpointing.learning_dynamics.max_rows=1",
    )
    if begun:
        train(*options)
    configure_logging("INFO")  # closes the log file of that run
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(
        StoreError, match=r"cannot be written to .*: no permission .*; check its owner and mode, or choose"
    ):
        run_training(make_config(*options, "training.max_steps=4"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["logs", "logs/train.log"])
def test_logs_that_lead_elsewhere_are_named(train: Train, name: str) -> None:
    run = train()
    configure_logging("INFO")
    shutil.rmtree(run.path / "logs")
    (run.path / name).parent.mkdir(exist_ok=True)
    (run.path / name).symlink_to("/dev/null/nowhere")
    with pytest.raises(PicoError, match=rf"{name}: is a link"):
        train("training.max_steps=8")


@pytest.mark.parametrize("gone", [False, True])
def test_a_package_that_configures_logging_costs_the_log_nothing(tmp_path: Path, gone: bool) -> None:
    """`logging.config` closes the files of every handler in the process, wherever the call comes from."""
    file = tmp_path / "logs" / "train.log"
    configure_logging("INFO", file)
    logging.getLogger("picolm").info("before")
    logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})
    if gone:
        shutil.rmtree(file.parent)
    logging.getLogger("picolm").info("after")
    configure_logging("INFO")
    assert file.exists() == (not gone)
    assert gone or [line.split()[-1] for line in file.read_text().splitlines()] == ["before", "after"]


def test_a_run_folder_deleted_meanwhile_ends_the_run(
    make_config: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = make_config("training.max_steps=8")
    place = Path(config.checkpointing.runs_dir) / "toy"
    at_step(monkeypatch, 3, lambda: delete(place))
    with pytest.raises(StoreError, match=r"is gone; was it deleted or moved while in use\?"):
        run_training(config)
    assert not place.exists()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("halfway", [False, True])
@pytest.mark.parametrize("look", range(1, 7))
def test_a_run_folder_deleted_while_an_older_step_is_looked_at_ends_the_run(
    make_config: Any, monkeypatch: pytest.MonkeyPatch, look: int, halfway: bool
) -> None:
    """halfway: the files of the steps are deleted at that moment, their directories not yet."""
    config, original, looks = make_config("training.max_steps=8"), SealedCheckpoint._manifest_bytes, count(1)
    place = Path(config.checkpointing.runs_dir) / "toy"

    def delete_first(checkpoint: Any) -> bytes:
        if next(looks) == look:
            for file in place.glob("checkpoints/step_*/*") if halfway else ():
                file.unlink() if file.is_file() else shutil.rmtree(file)
            if not halfway:
                delete(place)
        return original(checkpoint)

    monkeypatch.setattr(SealedCheckpoint, "_manifest_bytes", delete_first)
    with pytest.raises(StoreError, match=r"is gone; was it deleted or moved while in use\?"):
        run_training(config)


@pytest.mark.slow
def test_a_second_training_of_the_same_run_is_told_who_has_it(
    make_config: Any, monkeypatch: pytest.MonkeyPatch, train: Train
) -> None:
    """In another process, while the first is in the middle of it."""
    config, alone = make_config(), states(train("checkpointing.run_name=alone"))
    place = Path(config.checkpointing.runs_dir) / "toy"
    told: list[subprocess.CompletedProcess[str]] = []
    command = [sys.executable, "-c", MAIN, "train", str(place.parents[1] / "toy.yaml"), "training.max_steps=9"]
    call = lambda: told.append(subprocess.run(command, capture_output=True, text=True, env=QUIET))  # noqa: E731
    at_step(monkeypatch, 3, call)
    run_training(config)
    assert told[0].returncode == 1
    message = told[0].stderr.splitlines()[-1]
    assert f"{place}: another process is writing this run (process {os.getpid()} on " in message
    assert "wait for it to end, or choose another run_name" in message
    assert states(Run.open(place)) == alone


@pytest.mark.slow
def test_a_clock_that_jumps_back_changes_nothing(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train("checkpointing.run_name=whole", "checkpointing.keep.optimizer=last 1")
    real, chance = time.time, random.Random(0)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: real() - chance.uniform(0, 1e6))
        patch.setattr(time, "time_ns", lambda: int(1e9 * (real() - chance.uniform(0, 1e6))))
        run = train("training.max_steps=3", "checkpointing.keep.optimizer=last 1")
        run = train("checkpointing.keep.optimizer=last 1")
    del whole
    assert all(run.problems(step) == [] for step in run.step_directories())
    assert run.steps == [0, 2, 3, 4, 6]
    assert [entry["step"] for entry in run.metrics() if "train/loss" in entry] == [0, 2, 4, 6]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_first_step_ends_it_at_once_and_leaves_nothing_in_the_way(
    make_config: Any, train: Train, number: signal.Signals
) -> None:
    """While it imports, looks at the data, builds the model, makes the folder of the run."""
    place = Path(make_config().checkpointing.runs_dir) / "toy"
    constant = "training.optimization.lr_scheduler=constant"  # where it starts fast, some steps are made of 4000
    command = [
        sys.executable,
        "-c",
        MAIN,
        "train",
        str(place.parents[1] / "toy.yaml"),
        "training.max_steps=4000",
        constant,
    ]
    for moment in (0.05, 0.4, 0.8, 1.2, 1.6, 2.0, 2.4, 2.8):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=QUIET) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.readline()
            time.sleep(moment)
            process.send_signal(number)
            sent = time.monotonic()
            said = process.stderr.read()
        assert process.returncode in (128 + number, -number), said  # a shell shows 128 + number in both cases
        assert time.monotonic() - sent < 10
        assert "Traceback" not in said
    if (place / "run.json").exists():
        assert all(Run.open(place).problems(step) == [] for step in Run.open(place).step_directories())
    assert states(train(constant))[6] == states(train(constant, "checkpointing.run_name=whole"))[6]
