"""Train members on this machine, each in its own process, so that one that fails does not stop the others.

It uses subprocess instead of submitit's local executor, which hides GPUs that were not requested, ends every job after
a time limit, and after Ctrl-C kills within a second a process that is still saving.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from picolm.registry import CodePolicy, code_policy
from picolm.trusted import make_folder, open_to_append

log = logging.getLogger("picolm")

POLL_S = 0.1


class Failure(NamedTuple):
    """A member whose training did not finish, and why."""

    name: str
    reason: str


class Process(NamedTuple):
    """A member that is being trained, and the file of its output."""

    name: str
    output: Path
    running: "subprocess.Popen[bytes]"


def train_locally(files: dict[str, Path], logs: Path, jobs: int) -> tuple[list[Failure], int | None]:
    """Train members, `jobs` at a time. Return those that failed, and the first signal that asked to stop, or None.

    files: the configuration of each member, by name, as `pico train` reads it. logs: the folder for the output of each
    process. Ctrl-C and SIGTERM are passed on to every process, which saves and ends.
    """
    make_folder(logs)
    waiting, processes, failures = list(files.items()), list[Process](), list[Failure]()
    with _recorded_signals() as signals:
        passed_on = 0
        while processes or (waiting and not signals):
            while waiting and len(processes) < jobs and not signals:
                processes.append(_start(*waiting.pop(0), logs, jobs))
            for number in signals[passed_on:]:
                passed_on += 1
                for process in processes:
                    process.running.send_signal(number)
            for process in [process for process in processes if process.running.poll() is not None]:
                processes.remove(process)
                if process.running.returncode == 0:
                    log.info("%s: trained; %d to go.", process.name, len(waiting) + len(processes))
                elif not signals:
                    failures.append(_failure(process))
            time.sleep(POLL_S)
    return failures, signals[0] if signals else None


@contextmanager
def _recorded_signals() -> Iterator[list[int]]:
    """Yield a list that collects the numbers of the signals that ask to stop."""
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, frame: received.append(number)) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(name: str, file: Path, logs: Path, jobs: int) -> Process:
    output = logs / f"{name}.log"
    command = [sys.executable, "-P", "-m", "picolm", "train", str(file), *options_for(code_policy())]
    # Processes that run at the same time share the cores.
    share = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} if jobs > 1 else {}
    with open(open_to_append(output, logs.parent, os.O_WRONLY | os.O_TRUNC), "wb") as stream:
        # Its own session: Ctrl-C reaches it once, from this process, and not also from the terminal.
        running = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=share | os.environ, start_new_session=True
        )  # fmt: skip
    log.info("%s: training; what it says is in %s.", name, output)
    return Process(name, output, running)


def options_for(policy: CodePolicy) -> Iterator[str]:
    """Yield the options of `pico train` that pass on this process's policy about the user's own code."""
    if policy.trusted:
        yield "--trust-remote-code"
    for folder in policy.folders:
        yield from ("--code-folder", folder)


def _failure(process: Process) -> Failure:
    lines = process.output.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
    code = process.running.returncode
    ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    failure = Failure(process.name, f"{ended}: {lines[-1]} ({process.output})")
    log.warning("%s failed: %s", *failure)
    return failure
