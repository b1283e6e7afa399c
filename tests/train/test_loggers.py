"""Loggers: each says the same as metrics.jsonl, and none of them stops a run."""

import contextlib
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from picolm.errors import PicoError
from picolm.store import Run

Train = Callable[..., Run]
Numbers = dict[tuple[int, str], float]


def numbers(run: Run) -> Numbers:
    """What metrics.jsonl holds, by step and name."""
    entries = [(entry["step"], name, value) for entry in run.metrics() for name, value in entry.items()]
    return {(step, name): value for step, name, value in entries if name != "step" and isinstance(value, int | float)}


def events(run: Run) -> list[tuple[int, str, float]]:
    """What the TensorBoard files hold."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run.path / "logs" / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    names = accumulator.Tags()["scalars"]
    return [(event.step, name, event.value) for name in names for event in accumulator.Scalars(name)]


def check_equal(seen: Numbers, written: Numbers, rel: float) -> None:
    assert set(seen) == set(written)
    for key, value in written.items():
        assert seen[key] == pytest.approx(value, rel=rel, nan_ok=True), key


@pytest.mark.slow
def test_metrics_jsonl_has_a_line_of_json_for_each_logged_step_and_evaluation(train: Train) -> None:
    run = train("training.max_steps=5", "evaluation.every_n_steps=3")
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [0, 2, 4, 5]
    assert [line["step"] for line in lines if "val/paloma" in line] == [0, 3, 5]
    assert len(lines) == 7
    assert lines[0]["val/paloma"] == run.evaluation(0)["paloma"]


def test_tensorboard_files_say_what_metrics_jsonl_says(train: Train) -> None:
    run = train("monitoring.save_to_tensorboard=true")
    seen = {(step, name): value for step, name, value in events(run)}
    assert len(seen) > 100
    check_equal(seen, numbers(run), rel=1e-6)  # they are kept in float32


@pytest.mark.slow
def test_a_continued_run_has_each_step_once(train: Train) -> None:
    options = ("monitoring.save_to_tensorboard=true", "monitoring.logging.log_every_n_steps=1")
    run = train(*options, "training.max_steps=5", "training.optimization.lr_scheduler=constant")
    (run.path / "checkpoints" / "step_5" / "manifest.json").write_bytes(b"")  # so that it goes on from step 4
    run = train(*options, "training.max_steps=7", "training.optimization.lr_scheduler=constant")
    seen = [(step, name) for step, name, _ in events(run) if name == "train/loss"]
    assert sorted(seen) == [(step, "train/loss") for step in range(8)]
    check_equal({(step, name): value for step, name, value in events(run)}, numbers(run), rel=1e-6)


@pytest.mark.parametrize("package", ["tensorboard", "wandb", "trackio"])
def test_a_package_that_is_not_installed_is_named_with_the_command(
    train: Train, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if package == "tensorboard" else package, None)
    with pytest.raises(PicoError, match=rf"monitoring.save_to_{package} needs: pip install 'picolm\[{package}\]'"):
        train(f"monitoring.save_to_{package}=true")


class Wandb:
    """Stands in for the package: `fail` says which calls raise."""

    def __init__(self, fail: set[str]):
        self.fail, self.calls, self.logged = fail, [], []
        self.Settings = SimpleNamespace

    def _do(self, what: str) -> None:
        self.calls.append(what)
        if what in self.fail:
            raise RuntimeError(f"{what}: connection refused")

    def init(self, **arguments: Any) -> "Wandb":
        self._do(f"init {arguments.get('mode', 'as configured')}")
        self.id = arguments["id"]
        return self

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self._do("log")
        self.logged.append(step)

    def finish(self) -> None:
        self._do("finish")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fail", "words"),
    [
        (
            "init as configured",
            "Weights & Biases is out of reach (init as configured: connection refused); writing an off",
        ),
        ("log", "Weights & Biases took nothing at step 0: log: connection refused"),
        ("finish", "Weights & Biases did not close: finish: connection refused"),
    ],
)
def test_a_server_that_fails_does_not_stop_a_run(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fail: str, words: str
) -> None:
    wandb = Wandb({fail})
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run = train("monitoring.save_to_wandb=true", "training.max_steps=2")
    assert run.steps == [0, 2]
    assert words in capsys.readouterr().err
    assert wandb.calls[-1] == "finish"
    if fail.startswith("init"):
        assert wandb.calls[:2] == [fail, "init offline"]
        assert wandb.logged == [0, 0, 2, 2]


@pytest.mark.slow
def test_a_continued_run_keeps_its_identity_and_another_of_the_same_name_has_its_own(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ids = []
    options = ("monitoring.save_to_wandb=true", "checkpointing.run_name='a name: with #signs?'")
    for more in ("training.max_steps=0", "training.max_steps=1", f"checkpointing.runs_dir={tmp_path}/elsewhere"):
        wandb = Wandb(set())
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        train(*options, more)
        ids.append(wandb.id)
    assert ids[0] == ids[1] != ids[2]
    assert all(name.isalnum() for name in ids)


def records(file: Path) -> Iterator[bytes]:
    """The records of a LevelDB log: a 7-byte header, then blocks of 32 KiB with pieces (crc, length, type) of records."""
    content, place, record = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        _, length, kind = struct.unpack_from("<IHB", content, place)
        if kind == 0:
            return
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def offline_records(run: Run) -> list[Any]:
    """The records in the file of an offline W&B run, once its writer, a process of its own, has ended it."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = run.path.glob("logs/wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 30
    while True:
        read = [Record.FromString(data) for data in records(file)]
        if any(record.WhichOneof("record_type") == "exit" for record in read):
            break
        assert time.monotonic() < deadline, f"{file} has no end"
        time.sleep(0.05)
    return read


def history(run: Run) -> Numbers:
    """The numbers in the file of an offline W&B run."""
    found: Numbers = {}
    for record in offline_records(run):
        if record.WhichOneof("record_type") == "history":
            items = {
                (item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item
            }
            found |= {
                (int(items["_step"]), name): value
                for name, value in items.items()
                if name[0] != "_" and isinstance(value, int | float)
            }
    return found


@pytest.mark.slow
def test_an_offline_wandb_run_says_what_metrics_jsonl_says(train: Train) -> None:
    run = train("monitoring.save_to_wandb=true", "monitoring.wandb.project=lab")
    check_equal(history(run), numbers(run), rel=1e-12)
    first = next(record.run for record in offline_records(run) if record.WhichOneof("record_type") == "run")
    assert (first.display_name, first.project) == ("toy", "lab")
    config = {update.key: json.loads(update.value_json) for update in first.config.update}
    assert {section: config[section] for section in run.config} == run.config


@pytest.mark.slow
def test_an_unreachable_wandb_server_costs_seconds_and_not_the_run(make_config: Any, tmp_path: Path) -> None:
    make_config()  # writes the file
    environment = os.environ | {
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_API_KEY": "0" * 40,
        "WANDB_MODE": "online",
    }
    command = [sys.executable, "-c", "from picolm.cli import main; main()", "train", f"{tmp_path}/toy.yaml"]
    done = subprocess.run(
        [*command, "monitoring.save_to_wandb=true"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "Weights & Biases is out of reach" in done.stderr
    run = Run.open(tmp_path / "runs" / "toy")
    assert run.steps == [0, 2, 4, 6]
    check_equal(history(run), numbers(run), rel=1e-12)


def train_elsewhere(tmp_path: Path, *words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """`pico train` in a process of its own, which reads the environment anew."""
    command = [sys.executable, "-c", "from picolm.cli import main; main()", "train", f"{tmp_path}/toy.yaml", *words]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)


def trackio_numbers(file: Path) -> list[tuple[str, int, str, float]]:
    """(id of the run, step, name, value) of all that a trackio database holds."""
    import sqlite3

    with contextlib.closing(sqlite3.connect(file)) as connection:
        lines = connection.execute("SELECT run_id, step, metrics FROM metrics ORDER BY id").fetchall()
    return [(run, step, name, value) for run, step, text in lines for name, value in json.loads(text).items()]


@pytest.mark.slow
def test_trackio_says_on_this_machine_what_metrics_jsonl_says(make_config: Any, tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="needs: pip install 'picolm[trackio]'")
    make_config()  # writes the file
    words = ["monitoring.save_to_trackio=true", "monitoring.wandb.project=lab"]
    elsewhere = {"TRACKIO_DIR": f"{tmp_path}/trackio", "TRACKIO_SERVER_URL": "http://127.0.0.1:9/?write_token=secret"}
    done = train_elsewhere(tmp_path, *words, **elsewhere)
    assert done.returncode == 0, done.stderr
    assert "Trackio" not in done.stdout + done.stderr  # it has nothing to say
    run = Run.open(tmp_path / "runs" / "toy")
    held = trackio_numbers(tmp_path / "trackio" / "lab.db")
    assert len({identity for identity, *_ in held}) == 1
    seen = {(step, name): value for _, step, name, value in held if isinstance(value, int | float)}
    check_equal(seen, numbers(run), rel=1e-12)

    (run.path / "checkpoints" / "step_6" / "manifest.json").write_bytes(b"")  # so that it goes on from step 4
    assert train_elsewhere(tmp_path, *words, **elsewhere).returncode == 0
    assert {identity for identity, *_ in trackio_numbers(tmp_path / "trackio" / "lab.db")} == {held[0][0]}
    assert train_elsewhere(tmp_path, *words, f"checkpointing.runs_dir={tmp_path}/others", **elsewhere).returncode == 0
    assert len({identity for identity, *_ in trackio_numbers(tmp_path / "trackio" / "lab.db")}) == 2
