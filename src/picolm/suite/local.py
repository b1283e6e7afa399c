"""Training members on this machine: each in a process of its own, so that one that fails does not take the rest."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from picolm.registry import CodePolicy, code_policy
from picolm.suite.config import Member
from picolm.trusted import open_to_append

log = logging.getLogger("picolm")

POLL_S = 0.1


class Failure(NamedTuple):
    """A member that was not trained to its end, and why."""

    name: str
    reason: str


class Process(NamedTuple):
    """A member that is being trained."""

    member: Member
    log: Path
    running: "subprocess.Popen[bytes]"
    since: float


class Stop:
    """Ctrl-C and SIGTERM, passed on to every process: each saves and ends. `received` is the first one."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.processes: list[Process] = []

    @contextmanager
    def listening(self) -> Iterator["Stop"]:
        before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)
        for process in self.processes:
            process.running.send_signal(number)


def train_locally(
    members: list[Member], files: list[Path], logs: Path, jobs: int, done: Callable[[Member, float], None]
) -> tuple[list[Failure], signal.Signals | None]:
    """Train members, `jobs` at a time; returns those that failed, and the signal that asked to stop.

    files: the configuration of each, as `pico train` reads it. logs: the folder for what each process says.
    done: called with each member that was trained to its end, and its seconds.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting, failures = list(zip(members, files, strict=True)), []
    with Stop().listening() as stop:
        while stop.processes or (waiting and stop.received is None):
            while waiting and len(stop.processes) < jobs and stop.received is None:
                stop.processes.append(_start(*waiting.pop(0), logs, jobs))
            for process in [process for process in stop.processes if process.running.poll() is not None]:
                stop.processes.remove(process)
                if process.running.returncode == 0:
                    done(process.member, time.monotonic() - process.since)
                elif stop.received is None:
                    failures.append(_failure(process))
            time.sleep(POLL_S)
    return failures, stop.received


def _start(member: Member, file: Path, logs: Path, jobs: int) -> Process:
    text = logs / f"{member.name}.log"
    command = [sys.executable, "-P", "-m", "picolm", "train", str(file), *options_for(code_policy())]
    with open(open_to_append(text, logs.parent, os.O_WRONLY | os.O_TRUNC), "wb") as output:
        # A session of its own: Ctrl-C reaches it once, from us, and not a second time from the terminal.
        running = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=_environment(jobs),
            start_new_session=True,
        )
    log.info("%s: training; what it says is in %s.", member.name, text)
    return Process(member, text, running, time.monotonic())


def options_for(policy: CodePolicy) -> Iterator[str]:
    """Yield the options of `pico train` that give it the policy of this process about code of the user's own."""
    if policy.trusted:
        yield "--trust-remote-code"
    for folder in policy.folders:
        yield from ("--code-folder", folder)


def _environment(jobs: int) -> dict[str, str]:
    """Processes that run at the same time share the cores."""
    share = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} if jobs > 1 else {}
    return share | os.environ


def _failure(process: Process) -> Failure:
    lines = process.log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
    code = process.running.returncode
    ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    failure = Failure(process.member.name, f"{ended}: {lines[-1]} ({process.log})")
    log.warning("%s failed: %s", *failure)
    return failure
