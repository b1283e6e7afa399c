"""Links, pipes and devices in a run: nothing outside of it is read or written, nothing waits, and a message names the path."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from picolm.address import Address
from picolm.console import configure_logging, log
from picolm.errors import PicoError
from picolm.exchange.outbox import Outbox
from picolm.store import Run
from picolm.tracking import _identity

FILES = [
    ".lock", "run.json", "training_config.yaml", "environment.json", "metrics.jsonl", "eval_results/step_0.json",
    "checkpoints/step_0/manifest.json", "checkpoints/step_0/trainer_state.json", "checkpoints/step_0/model.safetensors",
    "checkpoints/step_0/config.json", "checkpoints/step_0/optimizer.safetensors", ".hub/lock", ".hub/outbox.json",
]  # fmt: skip
FOLDERS = ["checkpoints", "checkpoints/step_0", "checkpoints/step_0/learning_dynamics", "eval_results", ".hub"]


@pytest.fixture
def full(run: Run, content: dict[str, Any]) -> Run:
    """A run that holds every kind of file."""
    run.commit(0, **content)
    run.append_metrics({"step": 0, "train/loss": 2.0})
    run.write_evaluation(0, {"paloma": 3.0})
    outbox = Outbox(run)
    with outbox.sending():
        outbox.remember("hub:lab/x@y")
    return run


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def use_all(path: Path, content: dict[str, Any]) -> list[str]:
    """Do everything that can be done with a run; the messages of what was refused."""
    told: list[str] = []
    opened: list[Run] = []

    def attempt(action: Callable[[], object]) -> None:
        try:
            action()
        except PicoError as error:
            told.append(str(error))

    def send() -> None:
        outbox = Outbox(opened[0])
        with outbox.sending():
            outbox.remember("hub:lab/x@z")
            outbox.hold(0)
            outbox.checkpoint(0)

    attempt(lambda: opened.append(Run.open(path)))
    if opened:
        run = opened[0]
        actions: list[Callable[[], object]] = [
            lambda: run.config,
            lambda: run.environment,
            lambda: list(run.metrics()),
            lambda: list(run.read_metrics(("train/loss",))),
            lambda: run.evaluation(0),
            lambda: list(run[0].values()),
            lambda: run[0].meta,
            lambda: run[0].rows("train"),
            lambda: run[0].read("config.json"),
            lambda: told.extend(run.problems(0)),
            run.latest_whole,
            lambda: run.append_metrics({"step": 1, "train/loss": 1.0}),
            lambda: run.truncate_metrics(0),
            lambda: run.write_evaluation(0, {"paloma": 1.0}),
            lambda: run.write_evaluation(1, {"paloma": 1.0}),
            lambda: run.write_config({"a": 1}),
            lambda: run.write_environment({"packages": {}}),
            lambda: run.commit(1, **content),
            send,
            lambda: run.thin(0, {"activations"}),
            lambda: run.remove(0),
        ]
        for action in actions:
            attempt(action)
    return told


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["link", "dangling", "pipe"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_regular_file_is_named_and_not_followed(
    full: Run, content: dict[str, Any], tmp_path: Path, name: str, kind: str
) -> None:
    place, outside = full.path / name, tmp_path / "outside"
    outside.mkdir()
    shutil.copyfile(place, outside / "file")
    place.unlink()
    if kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to(outside / ("file" if kind == "link" else "nothing"))
    before = snapshot(outside)
    told = use_all(full.path, content)
    assert any(
        name.rpartition("/")[2] in line and ("is a link" in line or "not a regular file" in line) for line in told
    ), told
    assert snapshot(outside) == before


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_is_a_link_is_named_and_not_followed(
    full: Run, content: dict[str, Any], tmp_path: Path, name: str
) -> None:
    place, outside = full.path / name, tmp_path / "outside"
    place.rename(outside)
    place.symlink_to(outside)
    before = snapshot(outside)
    told = use_all(full.path, content)
    assert any(name.rpartition("/")[2] in line and "link" in line for line in told), told
    assert snapshot(outside) == before


def test_the_run_itself_may_be_named_by_a_link(full: Run, content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "there").symlink_to(full.path)
    run = Run.open(tmp_path / "there")
    assert run.commit(1, **content).verify() == []
    assert (tmp_path / "there/checkpoints/latest").readlink() == Path("step_1")
    assert Run.open(tmp_path / "there/checkpoints").steps == [0, 1]
    assert use_all(tmp_path / "there", content) == []


def test_a_regular_file_called_latest_is_left_alone(
    run: Run, content: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    (run.checkpoints_path / "latest").write_text("notes")
    run.commit(0, **content)
    assert (run.checkpoints_path / "latest").read_text() == "notes"
    assert "latest is there, and is no link" in caplog.text


@pytest.mark.parametrize("link", ["logs", "logs/train.log"])
def test_a_log_is_not_written_through_a_link(tmp_path: Path, link: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "train.log").write_text("mine\n")
    run = tmp_path / "run"
    run.mkdir()
    if link == "logs":
        (run / "logs").symlink_to(outside)
    else:
        (run / "logs").mkdir()
        (run / "logs/train.log").symlink_to(outside / "train.log")
    try:
        with pytest.raises(PicoError, match=f"{link}: is a link"):
            configure_logging("INFO", run / "logs/train.log", within=run)
        log.info("a line")
    finally:
        configure_logging("INFO")
    assert (outside / "train.log").read_text() == "mine\n"


def test_a_log_or_an_identity_that_is_a_pipe_holds_nobody_up(tmp_path: Path) -> None:
    for name, action in (
        ("train.log", lambda path: configure_logging("INFO", path)),
        ("wandb_id", _identity),
    ):
        os.mkfifo(tmp_path / name)
        with pytest.raises(PicoError, match=f"{name}: is not a regular file"):
            action(tmp_path / name)
    configure_logging("INFO")


def test_an_identity_is_made_once_and_is_one_word(tmp_path: Path) -> None:
    made = _identity(tmp_path / "wandb_id")
    assert len(made) == 16
    assert _identity(tmp_path / "wandb_id") == made
    (tmp_path / "wandb_id").write_text("a secret\nof two lines")
    with pytest.raises(PicoError, match="wandb_id: holds no id"):
        _identity(tmp_path / "wandb_id")


def test_what_is_no_file_of_a_run_of_pico_train_is_named(tmp_path: Path) -> None:
    from tests.picotrain import write_run

    legacy = write_run(tmp_path / "legacy", [0])
    assert (legacy / "checkpoints/latest").is_symlink()
    step = legacy / "checkpoints/step_0"
    assert Run.open(legacy)[0].verify() == []
    for name in ("learning_dynamics/train_activations.pt", "model.safetensors", "config.json"):
        saved = (step / name).read_bytes()
        (step / name).unlink()
        os.mkfifo(step / name)
        told: list[str] = []
        with suppress(PicoError):
            told += Run.open(legacy)[0].verify()
        with pytest.raises(PicoError, match="is not a regular file"):
            Run.open(legacy)[0].read(name)
        assert any("is not a regular file" in line for line in told) or name == "config.json"
        (step / name).unlink()
        (tmp_path / "secret").write_bytes(saved)
        (step / name).symlink_to(tmp_path / "secret")
        with pytest.raises(PicoError, match="is a link"):
            Run.open(legacy)[0].read(name)
        (step / name).unlink()
        (step / name).write_bytes(saved)
    assert Run.open(legacy)[0][Address("activations", "train", "layers.0.attention.v_proj")].numel()


@pytest.mark.parametrize("name", ["results.parquet", ".results.parquet", "results.csv", ".results.csv"])
def test_the_table_of_an_analysis_is_not_written_through_a_link(tmp_path: Path, name: str) -> None:
    from picolm.analyze.table import write

    (tmp_path / "results").mkdir()
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "results" / name).symlink_to(tmp_path / "mine")
    write([], tmp_path / "results", csv=True)
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "results/results.parquet").is_symlink()
    assert not (tmp_path / "results/results.csv").is_symlink()
