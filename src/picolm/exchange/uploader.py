"""Upload the steps of a training run as they are saved (`checkpointing.save_to_hf`).

One thread uploads, for as long as it takes. Training waits for it only at its end, for a bounded time, and no failure
of an upload ends the training.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack

from picolm.errors import PicoError
from picolm.exchange.outbox import Damaged, Outbox
from picolm.exchange.push import Sender
from picolm.network import asked_wait_s
from picolm.store.run import Run
from picolm.train.config import TrainConfig

log = logging.getLogger("picolm")

_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 300.0
_PATIENCE_S, _SHORT_PATIENCE_S = 60.0, 5.0
_GLANCE_S = 0.2


def start_uploads(
    config: TrainConfig, run: Run, last: int | None, stack: ExitStack, impatient: Callable[[], bool]
) -> Callable[[int], None]:
    """Start the uploader. Return a callback to invoke with each saved step.

    last: the step that this training resumes from, None for a new run; newer steps will be made again. Uploading ends
    with `stack`, after a bounded wait, which is short if `impatient()`.
    """
    place = config.checkpointing.hf_checkpoint
    saved = [step for step in run.steps if last is not None and step <= last]
    uploader = Uploader(Sender(run, place.repo_id, collection=place.collection_slug), saved, impatient)
    stack.callback(uploader.close)
    return uploader.add


class Uploader:
    """A thread that uploads steps of a run in order.

    These are `steps`, the steps queued by an earlier start, and those passed to `add`.
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
        self._waiting = {*steps, *self._outbox.held}
        self._changed, self._closing, self._given_up = threading.Event(), threading.Event(), threading.Event()
        self._problem, self._sent = "", 0
        try:
            self._outbox.remember(sender.branch.place)
        except PicoError as error:
            log.warning("%s", error)
        # A daemon thread: at exit, Python would wait for the threads of a pool, however long an upload takes.
        self._thread = threading.Thread(target=self._work, name="hub-uploader", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> list[int]:
        """Return the steps that are not on the Hub yet, ascending."""
        return sorted(self._waiting.copy())

    def add(self, step: int) -> None:
        """Queue a committed step. Never blocks or raises: upload problems must not stop training."""
        try:
            self._outbox.hold(step)
        except Exception as error:
            log.warning("Step %d waits for the Hub only as long as it is in the run: %s", step, error)
        self._waiting.add(step)
        self._changed.set()

    def close(self) -> None:
        """Wait for the queue, for a bounded time; then log what was not uploaded and how to upload it."""
        self._closing.set()
        self._changed.set()
        if left := self.waiting:
            log.info("Sending %s to the Hub …", _listed(left))
        start = time.monotonic()
        while self._thread.is_alive():
            patience_s = min(_SHORT_PATIENCE_S, self._patience_s) if self._impatient() else self._patience_s
            if time.monotonic() - start > patience_s:
                break
            self._thread.join(_GLANCE_S)
        self._given_up.set()
        if left := self.waiting:
            why = f" ({self._problem})" if self._problem else ""
            log.warning(
                "Not on the Hub yet: %s%s. To send the rest:  pico push %s", _listed(left), why, self._sender.run.path
            )
        elif self._sent:
            log.info("Every step is on the Hub: %s", self._sender.branch.place)

    def _work(self) -> None:
        """Upload until training has ended and the queue is empty; after a failure, retry after a growing wait."""
        wait_s = self._first_wait_s
        while not self._given_up.is_set():
            sent = self._sent
            try:
                with self._outbox.sending():
                    self._send_all()
                return
            except Exception as error:  # no error of any kind may end the training
                self._report(error)
                wait_s = self._first_wait_s if self._sent > sent else min(2 * wait_s, _LONGEST_WAIT_S)
                pause = self._given_up if self._closing.is_set() else self._closing
                pause.wait(max(wait_s, asked_wait_s(error.__cause__)))

    def _send_all(self) -> None:
        self._sender.open()
        described = 0
        while not self._given_up.is_set():
            self._changed.clear()
            step = min(self._waiting.copy(), default=None)
            if step is not None:
                self._send(step)
            ends = step is None and self._closing.is_set()
            if self._sent > described and (not described or ends):
                self._sender.send_card()
                described = self._sent
            if ends:
                return
            if step is None:
                self._changed.wait()

    def _send(self, step: int) -> None:
        try:
            checkpoint = self._outbox.checkpoint(step)
            if checkpoint is None:
                log.warning("Step %d was deleted before it could be sent to the Hub.", step)
            elif self._sender.send(checkpoint):
                self._sent += 1
                if self._problem:
                    log.info("The Hub takes steps again: step %d is there.", step)
                    self._problem = ""
        except Damaged as error:
            log.warning("%s", error)
        self._waiting.discard(step)
        self._outbox.release(step)

    def _report(self, error: Exception) -> None:
        """Log that uploading fails: once, until a step is uploaded again."""
        if not self._problem:
            log.warning(
                "Steps cannot be sent to the Hub now; they are kept and tried again beside the training: %s", error
            )
        self._problem = str(error) if isinstance(error, PicoError) else f"{type(error).__name__}: {error}"


def _listed(steps: list[int]) -> str:
    shown = [str(step) for step in steps[:8]] + (["…"] if len(steps) > 8 else [])
    return f"step {shown[0]}" if len(steps) == 1 else f"{len(steps)} steps ({', '.join(shown)})"
