"""What waits for the Hub: a queue in the folder of the run, and the thread that works it off beside the training.

    .hub/outbox.json     where to, and the steps that wait, ascending
    .hub/step_N/         a second name (hard links) for the files of such a step, so that `checkpointing.keep` may delete it

The queue only remembers; what is sent already is asked of the Hub. So it may be killed at any moment, and losing it costs
nothing but a look at each step of the run.
"""

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

from picolm.errors import FileError, PicoError, StoreError
from picolm.network import asked_wait_s
from picolm.store.files import disk_errors, write_atomically
from picolm.store.forms import Queue
from picolm.store.layout import MANIFEST, inside, step_directory
from picolm.store.lock import RunLock
from picolm.store.run import Run
from picolm.store.sealed import SealedCheckpoint
from picolm.store.upload import FOLDER, Damaged, Sender
from picolm.trusted import read_json, refuse_links, require_regular

log = logging.getLogger("picolm")

_FILE = "outbox.json"
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 300.0
_PATIENCE_S, _SHORT_PATIENCE_S = 60.0, 5.0
_GLANCE_S = 0.2


class Outbox:
    """The steps of a run that wait to be sent."""

    def __init__(self, run: Run):
        self.run, self.path = run, inside(run.path, FOLDER)
        self._guard = threading.Lock()
        file = inside(run.path, f"{FOLDER}/{_FILE}")
        if os.path.lexists(file):
            require_regular(file)
        try:
            content = read_json(file, Queue)
            self.place: str = content.place
            self.steps: list[int] = sorted(set(content.steps))
        except FileError:
            self.place, self.steps = "", []  # what it held is found by comparing the run with the Hub

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Hold this while sending. Raises StoreError when another process does."""
        with disk_errors("what waits for the Hub", self.path):
            self.path.mkdir(exist_ok=True)
        lock = RunLock(inside(self.run.path, f"{FOLDER}/lock")).held()
        with ExitStack() as stack:
            try:
                stack.enter_context(lock)
            except FileError:
                raise
            except StoreError as error:
                raise StoreError(
                    f"{self.run.path}: another process is sending its steps to the Hub; wait for it to end"
                ) from error
            yield

    def address(self, place: str) -> None:
        """Say where to, for the next who sends."""
        with self._guard:
            self.place = place
            self._write()

    def add(self, steps: Iterable[int]) -> None:
        """Remember steps."""
        with self._guard:
            self.steps = sorted({*self.steps, *steps})
            self._write()

    def hold(self, step: int) -> None:
        """Give the files of a step a second name, whatever is deleted of the run.

        Where space is short nothing is held: the run needs it more.
        """
        checkpoint = SealedCheckpoint(self.run.step_path(step))
        needed = 2 * sum(record.bytes for record in checkpoint.files.values())
        if shutil.disk_usage(self.run.path).free < needed:
            for held in self.path.glob("step_*"):
                shutil.rmtree(held, ignore_errors=True)
            log.warning("Little space is left: steps wait for the Hub only until checkpointing.keep deletes them.")
            return
        target, aside = self.path / step_directory(step), self.path / f".{step_directory(step)}"
        shutil.rmtree(aside, ignore_errors=True)
        try:
            for name in (*checkpoint.files, MANIFEST):
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                os.link(checkpoint.locate(name), aside / name)
            shutil.rmtree(target, ignore_errors=True)
            os.rename(aside, target)
        except OSError:  # a file system without hard links: a copy would cost what the run may need
            shutil.rmtree(aside, ignore_errors=True)

    def remove(self, step: int) -> None:
        with self._guard:
            self.steps = [other for other in self.steps if other != step]
            self._write()
        shutil.rmtree(self.path / step_directory(step), ignore_errors=True)

    def checkpoint(self, step: int) -> SealedCheckpoint | None:
        """A step that waits, from what was held of it or else from the run; None when it is gone. Raises Damaged."""
        for path in (self.path / step_directory(step), self.run.step_path(step)):
            if os.path.lexists(path / MANIFEST):
                try:
                    refuse_links(path, self.run.path)
                    return SealedCheckpoint(path)
                except StoreError as error:
                    raise Damaged(f"step {step} is not sent: {error}") from error
        return None

    def _write(self) -> None:
        with disk_errors("what waits for the Hub", self.path):
            self.path.mkdir(exist_ok=True)
            content = {"place": self.place, "steps": self.steps}
            write_atomically(self.path / _FILE, json.dumps(content).encode() + b"\n")


class Uploader:
    """Sends the steps of a run, in order, from a thread of its own, for as long as it takes; the run never waits for it.

    impatient: asked at the end; true cuts the wait for what is left short.
    """

    def __init__(
        self,
        sender: Sender,
        steps: Iterable[int],
        impatient: Callable[[], bool] = lambda: False,
        patience_s: float = _PATIENCE_S,
        first_wait_s: float = _FIRST_WAIT_S,
    ):
        self._sender, self._outbox = sender, Outbox(sender.run)
        self._impatient, self._patience_s, self._first_wait_s = impatient, patience_s, first_wait_s
        self._news, self._closing, self._given_up = threading.Event(), threading.Event(), threading.Event()
        self._trouble, self._delivered = "", 0
        try:
            self._outbox.add(steps)
            self._outbox.address(sender.branch.place)
        except PicoError as error:
            log.warning("What waits for the Hub is kept in memory only: %s", error)
        self._thread = threading.Thread(target=self._work, name="hub-uploader", daemon=True)
        self._thread.start()

    def add(self, step: int) -> None:
        """Take a step that is whole on the disk. Does not wait, and does not fail: the run is worth more than its copy."""
        try:
            self._outbox.hold(step)
        except Exception as error:
            log.warning("Step %d waits for the Hub only as long as it is in the run: %s", step, error)
        try:
            self._outbox.add([step])
        except Exception as error:
            log.warning("That step %d waits for the Hub is not written down: %s", step, error)
        self._news.set()

    def close(self) -> None:
        """Wait a little for what is left, and say what was not sent and how to send it."""
        self._closing.set()
        self._news.set()
        end, short = time.monotonic() + self._patience_s, time.monotonic() + _SHORT_PATIENCE_S
        if self._outbox.steps:
            log.info("Sending %s to the Hub …", _listed(self._outbox.steps))
        while self._thread.is_alive() and time.monotonic() < (short if self._impatient() else end):
            self._thread.join(_GLANCE_S)
        self._given_up.set()
        left = self._outbox.steps
        if self._delivered and not left:
            log.info("Every step is on the Hub: %s", self._sender.branch.place)
        if left:
            log.warning(
                "Not on the Hub yet: %s%s. To send the rest:  pico push %s",
                _listed(left), f" ({self._trouble})" if self._trouble else "", self._sender.run.path,
            )  # fmt: skip

    def _work(self) -> None:
        """Session after session, each until something goes wrong; after that, growing waits."""
        wait_s = self._first_wait_s
        while not self._given_up.is_set():
            before = self._delivered
            try:
                with self._outbox.sending():
                    self._session()
                return
            except Exception as error:  # whatever it is, it must not end the run
                self._stumble(error)
                wait_s = self._first_wait_s if self._delivered > before else min(2 * wait_s, _LONGEST_WAIT_S)
                asked_s = asked_wait_s(error.__cause__)
            pause = self._given_up if self._closing.is_set() else self._closing
            pause.wait(max(wait_s, asked_s))

    def _session(self) -> None:
        """Send what comes until the training ends and nothing is left."""
        self._sender.open()
        described = 0
        while not self._given_up.is_set():
            self._news.clear()
            step = next(iter(self._outbox.steps), None)
            if step is not None:
                self._deliver(step)
            if self._delivered > described and (not described or (step is None and self._closing.is_set())):
                self._sender.send_card()
                described = self._delivered
            if step is None and self._closing.is_set():
                return
            if step is None:
                self._news.wait()

    def _deliver(self, step: int) -> None:
        try:
            checkpoint = self._outbox.checkpoint(step)
            if checkpoint is None:
                log.warning("Step %d was deleted before it could be sent to the Hub.", step)
            elif self._sender.send(checkpoint):
                self._delivered += 1
                self._recover(step)
        except Damaged as error:
            log.warning("%s", error)
        self._outbox.remove(step)

    def _recover(self, step: int) -> None:
        if self._trouble:
            log.info("The Hub takes steps again: step %d is there.", step)
            self._trouble = ""

    def _stumble(self, error: Exception) -> None:
        """Say that something goes wrong: once, until a step is sent again."""
        if not self._trouble:
            log.warning(
                "Steps cannot be sent to the Hub now; they are kept and tried again beside the training: %s", error
            )
        self._trouble = str(error) if isinstance(error, PicoError) else f"{type(error).__name__}: {error}"


def _listed(steps: list[int]) -> str:
    shown = [str(step) for step in steps[:8]] + (["…"] if len(steps) > 8 else [])
    return f"step {shown[0]}" if len(steps) == 1 else f"{len(steps)} steps ({', '.join(shown)})"
