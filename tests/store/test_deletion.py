"""Nothing is deleted or replaced that the same command, or the run itself, did not make."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from picolm.address import Address
from picolm.errors import StoreError
from picolm.store import Run
from picolm.store.folders import new_folder
from picolm.store.writer import Retention

NAMES = ["training_config.yaml", "environment.json", "metrics.jsonl"]


def held(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", NAMES)
def test_a_new_run_replaces_no_file_of_the_user(tmp_path: Path, name: str) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / name).write_text("mine")
    (tmp_path / "notes/thoughts.md").write_text("mine as well")
    with pytest.raises(StoreError, match=f"notes: holds {name} and is no run"):
        Run.create(tmp_path / "notes", {"a": 1}, {})
    assert {key: text for key, text in held(tmp_path / "notes").items() if key != ".lock"} == {
        name: b"mine", "thoughts.md": b"mine as well",
    }  # fmt: skip


def test_a_run_whose_making_was_killed_can_be_made_again(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "x", {"a": 1}, {})
    (run.path / "run.json").unlink()  # what is written last
    assert Run.create(tmp_path / "x", {"a": 1}, {}).config == {"a": 1}
    (run.path / "run.json").unlink()
    with pytest.raises(StoreError, match=r"holds training_config.yaml and is no run"):
        Run.create(tmp_path / "x", {"a": 2}, {})


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError, OSError(28, "No space left on device")])
def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path, failure: Any) -> None:
    def make() -> None:
        with new_folder(tmp_path / "out", "it") as partial:
            (partial / "a").write_text("half")
            raise failure

    with pytest.raises((KeyboardInterrupt, RuntimeError, StoreError)):
        make()
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "out", "it") as partial:
        (partial / "a").write_text("whole")
    assert held(tmp_path) == {"out/a": b"whole"}


def test_a_folder_that_holds_something_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/thoughts.md").write_text("mine")
    (tmp_path / ".notes.partial").mkdir()
    (tmp_path / ".notes.partial/draft").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = held(tmp_path)
    for name, message in (("notes", r"it holds thoughts.md"), ("file", "is no folder")):
        with pytest.raises(StoreError, match=message), new_folder(tmp_path / name, "it"):
            raise AssertionError
    assert held(tmp_path) == before


def test_a_folder_that_somebody_fills_meanwhile_is_left_as_it_is(tmp_path: Path) -> None:
    def make() -> None:
        with new_folder(tmp_path / "out", "it") as partial:
            (partial / "a").write_text("ours")
            (tmp_path / "out").mkdir()
            (tmp_path / "out/theirs").write_text("theirs")

    with pytest.raises(StoreError, match="it holds theirs"):
        make()
    assert held(tmp_path) == {"out/theirs": b"theirs"}


def test_an_empty_folder_and_one_behind_a_link_may_be_named(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with new_folder(tmp_path / "link", "it") as partial:
        (partial / "a").write_text("x")
    assert held(tmp_path / "real") == {"a": b"x"}


def test_a_name_that_is_too_long_is_a_message(tmp_path: Path) -> None:
    for name in ("n" * 300, "ü" * 200):
        with pytest.raises(StoreError, match="File name too long"), new_folder(tmp_path / name, "it"):
            raise AssertionError
        with pytest.raises(StoreError, match="File name too long"):
            Run.create(tmp_path / name, {}, {})
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / ("n" * 255), "it"):
        pass


def test_a_killed_command_can_be_given_again_and_its_rest_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from picolm.store.folders import new_folder\n"
        "with new_folder(Path(sys.argv[1]), 'it') as partial:\n"
        "    (partial / 'a').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False)
    assert ended.returncode == -signal.SIGKILL
    rest = [path.name for path in tmp_path.iterdir()]
    assert len(rest) == 1
    with new_folder(tmp_path / "out", "it") as partial:
        (partial / "a").write_text("whole")
    assert (tmp_path / "out/a").read_text() == "whole"
    assert f"{rest[0]} was left by a command that was killed" in caplog.text


def test_what_lies_in_a_step_stays_when_the_step_is_thinned_or_replaced(run: Run, content: dict[str, Any]) -> None:
    run.commit(0, **content)
    (run.step_path(0) / "notes").mkdir()
    (run.step_path(0) / "notes/mine.txt").write_text("mine")
    run.thin(0, {"activations"})
    assert (run.step_path(0) / "notes/mine.txt").read_text() == "mine"
    run.commit(0, {Address("weights", "", "a"): torch.ones(2)}, meta={"step": 0}, replace=True)
    assert (run.step_path(0) / "notes/mine.txt").read_text() == "mine"
    assert held(run.step_path(0)).keys() - run[0].files.keys() == {"notes/mine.txt", "manifest.json"}


def test_a_step_that_holds_something_else_is_not_deleted(
    run: Run, content: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    keep = Retention(run, {"weights": "last 1", "optimizer": "last 1", "dynamics": "last 1"}, lambda checkpoint: True)
    run.commit(0, **content)
    (run.step_path(0) / "mine.txt").write_text("mine")
    run.commit(1, **content)
    keep.apply(1)
    assert (run.step_path(0) / "mine.txt").read_text() == "mine"
    assert "mine.txt is no part of the step; move it away first" in caplog.text
    with pytest.raises(StoreError, match=r"mine.txt is no part of the step"):
        run.remove(0)


def test_only_what_a_writer_left_is_swept(run: Run, content: dict[str, Any]) -> None:
    ours, theirs = ".step_3.partial-0123abcd", [".step_plan", ".step_3.partial-notes", ".step_1.replaced.bak", ".steps"]
    for name in (ours, *theirs):
        (run.checkpoints_path / name).mkdir()
        (run.checkpoints_path / name / "file").write_text("x")
    run.commit(0, **content)
    assert sorted(path.name for path in run.checkpoints_path.iterdir() if path.name[0] == ".") == sorted(theirs)
    assert not os.path.lexists(run.checkpoints_path / ours)
