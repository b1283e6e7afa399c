"""Killed writers, full disks, lost permissions, deleted directories: what was stored stays, and the error says what to do."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from picolm.address import Address
from picolm.errors import StoreError
from picolm.store import Run
from picolm.store.files import DigestingFile

BIG = {Address("weights", "", "layers.0.w"): torch.ones(1_000_000)}


def hidden(run: Run) -> list[str]:
    return sorted(path.name for path in run.checkpoints_path.iterdir() if path.name.startswith("."))


@pytest.mark.parametrize("kills", [12, pytest.param(150, marks=pytest.mark.slow)])
def test_readers_never_see_a_torn_step_whenever_the_writer_is_killed(run: Run, kills: int) -> None:
    """A reader polls all the while and recomputes every digest of each step when it appears."""
    script = Path(__file__).with_name("writer_to_kill.py")
    command = [sys.executable, str(script), str(run.path), str(kills), "7"]
    seen: set[int] = set()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            for step in sorted(set(Run.open(run.path).steps) - seen):
                assert run.problems(step) == []
                seen.add(step)
        assert process.stdout is not None
        told = json.loads(process.stdout.read())
    assert told["damaged"] == ""
    assert told["steps"] == list(range(len(told["steps"])))
    assert len(told["steps"]) >= kills
    assert len(seen) > kills / 4
    assert seen <= set(told["steps"])
    assert {entry["step"] for entry in run.metrics()} <= set(told["steps"])
    run.commit(10**6, {}, meta={})
    assert hidden(run) == []
    assert all(run.problems(step) == [] for step in run.steps)


def test_what_a_killed_writer_left_is_cleaned_away(run: Run) -> None:
    run.commit(1, {}, meta={})
    (run.checkpoints_path / ".step_2.partial-0123abcd").mkdir()
    (run.checkpoints_path / ".step_2.partial-0123abcd" / "model.safetensors").write_bytes(b"half")
    shutil.copytree(run.step_path(1), run.checkpoints_path / ".step_1.replaced")
    run.step_path(1).rename(
        run.checkpoints_path / ".step_3.replaced"
    )  # killed between the two renames of a replacement
    assert run.steps == []
    run.commit(4, {}, meta={})
    assert hidden(run) == []
    assert set(run.step_directories()) == {1, 3, 4}


def failing(call: Callable[..., Any], countdown: list[int], number: int) -> Callable[..., Any]:
    def wrapped(*arguments: Any, **options: Any) -> Any:
        countdown[0] -= 1
        if countdown[0] == 0:
            raise OSError(number, os.strerror(number), "disk")
        return call(*arguments, **options)

    return wrapped


@pytest.mark.slow
def test_whichever_operation_fails_the_step_is_whole_or_absent(run: Run, content: dict[str, Any]) -> None:
    """The first, the second, … write, fsync, rename or link of a commit meets a full disk."""
    run.commit(0, **content)
    failures = 0
    while True:
        with pytest.MonkeyPatch.context() as patch:
            countdown = [failures + 1]
            patch.setattr(DigestingFile, "write", failing(DigestingFile.write, countdown, errno.ENOSPC))
            for name in ("fsync", "rename", "replace"):
                patch.setattr(os, name, failing(getattr(os, name), countdown, errno.ENOSPC))
            with suppress(StoreError):
                run.commit(1, **content)
            if countdown[0] > 0:
                break
        failures += 1
        assert run.problems(0) == []
        assert run.steps in ([0], [0, 1])
        assert all(run.problems(step) == [] for step in run.steps)
        assert hidden(run) in ([], [".latest"])
        shutil.rmtree(run.step_path(1), ignore_errors=True)
    assert failures > 30


def test_a_full_disk_leaves_the_previous_step(small_disk: Path, content: dict[str, Any]) -> None:
    run = Run.create(small_disk / "demo", {}, {})
    run.commit(0, **content)
    with pytest.raises(
        StoreError, match=r"step 1 cannot be written to .*demo: no space left; it needs 4\.0 MB, [23]\.. MB are"
    ):
        run.commit(1, BIG, meta={})
    assert hidden(run) == []
    assert run.latest_whole()[1] == []
    assert Run.open(run.path).steps == [0]
    run.commit(1, {}, meta={})
    assert run.steps == [0, 1]


def test_a_file_size_limit_leaves_the_previous_step(run: Run, content: dict[str, Any]) -> None:
    run.commit(0, **content)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, hard))
    try:
        with pytest.raises(StoreError, match=r"no space left; it needs 4\.0 MB"):
            run.commit(1, BIG, meta={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert run.steps == [0]
    assert run.problems(0) == []
    assert hidden(run) == []


@pytest.fixture
def without_rights() -> Iterator[Callable[[], None]]:
    """A call after which the process may write nowhere but in its own files; root gives up its rights for the test."""
    user = os.geteuid()

    def give_up() -> None:
        if user == 0:
            os.seteuid(65534)

    yield give_up
    os.seteuid(user)


def test_a_directory_without_permission_is_named(without_rights: Callable[[], None], content: dict[str, Any]) -> None:
    place = Path(tempfile.mkdtemp())
    try:
        place.chmod(0o755)
        run = Run.create(place / "demo", {}, {})
        run.commit(0, **content)
        for path in (place, run.path, run.checkpoints_path):
            path.chmod(0o555)
        (run.path / ".lock").chmod(0o444)
        without_rights()
        with pytest.raises(
            StoreError, match=r"the lock cannot be written to .*no permission .*\.lock\); check its owner"
        ):
            run.commit(1, **content)
        with pytest.raises(StoreError, match=r"a new run cannot be written to .*no permission"):
            Run.create(place / "other", {}, {})
        assert Run.open(run.path)[0].verify() == []  # reading takes no rights to write
    finally:
        os.seteuid(os.getuid())
        subprocess.run(["chmod", "-R", "u+w", str(place)], check=True)
        shutil.rmtree(place)


def test_a_run_deleted_while_it_is_written_is_an_error_and_does_not_come_back(
    run: Run, content: dict[str, Any]
) -> None:
    with run.lock():
        shutil.rmtree(run.path)
        with pytest.raises(StoreError, match=r"step 0 cannot be written to .* is gone; was it deleted or moved"):
            run.commit(0, **content)
        with pytest.raises(StoreError, match="is gone"):
            run.append_metrics({"step": 0})
        with pytest.raises(StoreError, match="is gone"):
            run.write_evaluation(0, {})
    assert not run.path.exists()
    assert run.steps == []


def test_a_step_whose_files_are_deleted_while_it_is_written_is_not_published(
    run: Run, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_and_lose(self: DigestingFile, data: bytes) -> None:
        for path in run.checkpoints_path.glob(".step_0.partial-*/model.safetensors"):
            path.unlink()
        write(self, data)

    write = DigestingFile.write
    monkeypatch.setattr(DigestingFile, "write", write_and_lose)
    with pytest.raises(StoreError, match=r"model\.safetensors is gone"):
        run.commit(0, **content)
    assert run.step_directories() == []
