"""End all processes of a training together: on a signal after the step and its save, after a failure within a bounded time.

A collective operation waits for every process, so after a failure the others would wait, for half an hour by default.
Here a failing process shows its error, writes it to a shared store and exits. In each process a thread polls the store
for failures and writes a heartbeat. The other processes usually fail too, because their connection breaks: they find
the first error in the store and report nothing of their own. Processes that hang are made to exit.

The timeout of the strategy cannot do this. If it is short enough to end a run that hangs, it also ends a healthy run
whose first process saves or evaluates while the others wait, and it reports the broken connection instead of the cause.
"""

import json
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from subprocess import Popen
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import torch
from lightning_fabric import Fabric
from torch import distributed
from torch.distributed import DistError, TCPStore

from picolm.console import say
from picolm.errors import PicoError

log = logging.getLogger("picolm")

PERIOD_S = 0.5
FIRST_WORD_S = 3.0  # after a lost connection, how long to wait for the process that caused it to report its error
FAILURE = "failure"


class Failure(NamedTuple):
    """The cause of the end of a run: the rank of the process that failed, and its message."""

    rank: int
    message: str


GONE = Failure(0, "the first process is gone")


class Together:
    """A `with` block that ends on all processes when it fails on one. Does nothing if there is only one process.

    Raises PicoError on the first process if another process failed; after a failure, the other processes exit here.
    limit_s: half of it is the longest time until a lost process is noticed, half until hanging processes must exit.
    """

    def __init__(self, fabric: Fabric, limit_s: float):
        self.rank, self.world, self.half_s = fabric.global_rank, fabric.world_size, limit_s / 2
        self._over, self._heard_of = threading.Event(), GONE
        self._heard = {rank: (0, time.monotonic()) for rank in range(1, self.world)}
        if self.world > 1:
            self._children = _take_children(fabric)
            self.store = _open_store(fabric, limit_s)
            self._thread = threading.Thread(target=self._watch, daemon=True, name="failure-watch")

    def __enter__(self) -> "Together":
        if self.world > 1:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.world == 1:
            return
        if error is None:
            self._leave()
            return
        first = self._claim(error)
        self._over.set()
        own = first.rank == self.rank
        if (own or (first == GONE and self.rank == 1)) and not isinstance(error, KeyboardInterrupt):
            self._show(error, first)
        if self.rank > 0:
            _exit_now(1)
        self._end_children(0 if own else FIRST_WORD_S, first.rank)
        self._end_children(0)
        if not own:
            raise PicoError(_told(first)) from None
        if lost_connection(error):
            raise PicoError(first.message) from None

    def _leave(self) -> None:
        """Leave the block without an error. The other processes wait until the first process has written everything,
        because torchrun and srun kill all processes at the first exit code that is not 0, even that of a stop.
        """
        self._over.set()
        try:
            self.store.set(f"left {self.rank}", "")
            if self.rank > 0:
                self._await("left 0")
                self.store.set(f"gone {self.rank}", "")
            else:
                self._await(*(f"gone {rank}" for rank in range(1, self.world)), until=time.monotonic() + self.half_s)
        except DistError:
            log.debug("The first process has left already.")
        self._end_children(self.half_s)

    def _await(self, *words: str, until: float = math.inf) -> None:
        while not self.store.check(list(words)) and time.monotonic() < until:
            if self.rank > 0 and self._said():
                _exit_now(1)
            time.sleep(PERIOD_S / 10)

    def _claim(self, error: BaseException) -> Failure:
        """Report this error to the store. Returns the first failure there, which may be that of another process.

        Waits a moment first: after a lost connection for its cause, else on other ranks for an error of the first
        process.
        """
        broken = lost_connection(error)
        until = time.monotonic() + (FIRST_WORD_S if broken else PERIOD_S if self.rank > 0 else 0.0)
        try:
            while not (said := self._said()) and time.monotonic() < until:
                self._miss_children()
                time.sleep(0.05)
            message = f"lost the connection to another process ({_line(error)})" if broken else _line(error)
            return said or self._say(Failure(self.rank, message))
        except DistError:
            return self._heard_of

    def _show(self, error: BaseException, first: Failure) -> None:
        """Print the error of this process; for the first process, the command line prints it."""
        if self.rank == 0:
            return
        known = isinstance(error, PicoError) or lost_connection(error)
        text = first.message if known else "".join(traceback.format_exception(error)).rstrip()
        say(f"[process {self.rank} on {socket.gethostname()}] {text}", error=True)

    def _said(self) -> Failure | None:
        return Failure(*json.loads(self.store.get(FAILURE))) if self.store.check([FAILURE]) else None

    def _say(self, failure: Failure) -> Failure:
        """Write a failure to the store unless it holds one already. Returns the failure in the store."""
        return Failure(*json.loads(self.store.compare_set(FAILURE, "", json.dumps(failure))))

    def _watch(self) -> None:
        while not self._over.wait(PERIOD_S):
            try:
                self.store.add(f"alive {self.rank}", 1)
                self._miss_children()
                if self.rank == 0:
                    self._miss_others()
                failure = self._said()
            except DistError:
                failure = GONE
            if failure is not None:
                self._heard_of = failure
                self._end(failure)
                return

    def _miss_children(self) -> None:
        """Report a failure if a child process has exited with an error without leaving the block."""
        for rank, child in self._children:
            code = child.poll()
            if code and not self.store.check([f"left {rank}"]):
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                self._say(Failure(rank, how + (" (out of memory?)" if code == -signal.SIGKILL else "")))

    def _miss_others(self) -> None:
        """Report a failure if a process has sent no heartbeat for `half_s` seconds."""
        now = time.monotonic()
        for rank, (beats, since) in self._heard.items():
            new = self.store.add(f"alive {rank}", 0)
            if new != beats or self.store.check([f"left {rank}"]):
                self._heard[rank] = (new, now)
            elif now - since > self.half_s:
                self._say(Failure(rank, f"has given no sign of life for {self.half_s:.0f} s"))

    def _end(self, failure: Failure) -> None:
        """Wait `half_s` seconds for this process to end by itself, on its broken connection; then exit."""
        if self._over.wait(self.half_s):
            return
        if self.rank == 0:
            say(_told(failure), error=True)
            self._end_children(0)
        _exit_now(1)

    def _end_children(self, patience_s: float, only: int | None = None) -> None:
        """Wait up to `patience_s` seconds for all child processes, or for rank `only`; then kill what still runs."""
        until = time.monotonic() + patience_s
        for child in [child for rank, child in self._children if only in (rank, None)]:
            while child.poll() is None and time.monotonic() < until:
                time.sleep(0.02)
            if child.poll() is None:
                child.kill()
            child.wait()


def lost_connection(error: BaseException) -> bool:
    """Return whether an error only says that the connection to another process was lost."""
    words = ("gloo", "Connection closed by peer", "Connection reset by peer")
    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def _told(failure: Failure) -> str:
    return f"process {failure.rank} ended the run: {failure.message}"


def _line(error: BaseException) -> str:
    text = str(error) if isinstance(error, PicoError) else f"{type(error).__name__}: {error}"
    return text if isinstance(error, PicoError) else text.partition("\n")[0]


def _take_children(fabric: Fabric) -> Sequence[tuple[int, Popen[Any]]]:
    """Return (rank, process) of the child processes, removed from the list that Fabric's own observer watches: the
    observer would kill this process too, perhaps during a save and before the error is shown.
    """
    processes: list[Popen[Any]] = getattr(fabric.strategy.launcher, "procs", [])
    children = [(fabric.global_rank + place, child) for place, child in enumerate(processes, 1)]
    processes.clear()
    return children


def _open_store(fabric: Fabric, limit_s: float) -> TCPStore:
    """Open and return a separate store, because calls to the store of the process group can block."""
    environment: Any = fabric.strategy
    host, timeout = environment.cluster_environment.main_address, timedelta(seconds=limit_s)
    mine = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout) if fabric.is_global_zero else None
    host, port = fabric.broadcast((host, mine.port if mine is not None else 0))
    return mine or TCPStore(host, port, is_master=False, timeout=timeout)


def _exit_now(code: int) -> None:
    """Leave without the clean-up of libraries, which may wait for processes that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class StopSignal:
    """A `with` block that records stop signals, from the first call of `agreed` to the end of the block.

    After Ctrl-C or SIGTERM the loop finishes its step, saves and stops; a second Ctrl-C ends the process at once. Before
    the first step there is nothing to save, and downloads may take minutes: until then signals end the process.

    received: the first SIGINT or SIGTERM, or None. With several processes, `agreed` shares it among all of them.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._listening = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(self, device: torch.device) -> bool:
        """Return whether any process has received a stop signal. All processes call this and so stop at the same step."""
        self._listen()
        if not (distributed.is_available() and distributed.is_initialized()):
            return self.received is not None
        number = torch.tensor(self.received or 0, dtype=torch.float32, device=device)
        distributed.all_reduce(number, distributed.ReduceOp.MAX)
        agreed = int(number.item())  # a signal that arrives from now on counts at the next step
        if agreed and self.received is None:
            self.received = signal.Signals(agreed)
            log.warning("%s at another process: finishing this step and saving.", self.received.name)
        return agreed > 0

    def _listen(self) -> None:
        if self._listening:
            return
        self._listening = True
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._receive)
            except ValueError:  # not in the main thread, which alone may set handlers
                log.debug("Signals are left to the main thread.")

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGTERM:  # torchrun and SLURM may both forward it
            return
        if self.received is not None:  # the second signal has its original effect
            signal.signal(number, self._previous[number])
            signal.raise_signal(number)
            return
        self.received = signal.Signals(number)
        log.warning("%s: finishing this step and saving; a second Ctrl-C leaves at once.", self.received.name)
