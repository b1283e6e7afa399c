"""One writer per run; the second is told who the first is."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from picolm.errors import StoreError
from picolm.store import Run

HOLD = "import sys, time; from picolm.store import Run; lock = Run.open(sys.argv[1]).lock(); lock.__enter__(); "
SAY = "print('held', flush=True); time.sleep(60)"
FORK = "import os; os.fork() or (print('held', flush=True), time.sleep(60))"


def holder(run: Run, code: str) -> subprocess.Popen[str]:
    """Another process that holds the lock now."""
    command = [sys.executable, "-c", HOLD + code, str(run.path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.slow
@pytest.mark.parametrize("code", [SAY, f"{FORK}; time.sleep(60)"])
def test_a_second_process_is_refused_with_the_holder_s_name_until_the_holder_dies(run: Run, code: str) -> None:
    """Also when a forked worker of the holder lives on."""
    with holder(run, code) as process:
        try:
            message = r"demo: another process is writing this run \(process \d+ on \S+ since .*\); wait for it"
            with pytest.raises(StoreError, match=message) as refused:
                run.commit(0, {}, meta={})
            assert code != SAY or f"process {process.pid} on" in str(refused.value)
            assert run.steps == []  # reading is free
            process.kill()
            process.wait()
            run.commit(0, {}, meta={})
            assert run.steps == [0]
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_run_is_live_while_a_living_process_writes_it(run: Run) -> None:
    assert not run.is_live
    with run.lock():
        assert run.is_live
        with run.lock():
            pass
        assert Run.open(run.path).is_live
    assert not run.is_live  # this process lives on
    with holder(run, SAY) as process:
        assert run.is_live
        process.kill()
        process.wait()
        assert not run.is_live


def test_a_second_writer_of_the_same_process_is_refused_too(run: Run) -> None:
    with run.lock(), pytest.raises(StoreError, match=f"process {os.getpid()} on"):
        Run.open(run.path).commit(0, {}, meta={})
    Run.open(run.path).commit(0, {}, meta={})


def test_the_holder_enters_again(run: Run) -> None:
    with run.lock(), run.lock():
        run.commit(0, {}, meta={})
    with Run.open(run.path).lock():
        pass


def test_a_file_system_without_locks_is_warned_of(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    run.commit(0, {}, meta={})
    assert "has no locks (Operation not supported)" in caplog.text


def test_two_processes_cannot_create_the_same_run(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "x", {}, {})
    (run.path / "run.json").unlink()  # as it is while another process is still creating it
    with run.lock(), pytest.raises(StoreError, match="another process is writing this run"):
        Run.create(run.path, {}, {})
