"""Background saving: a snapshot is taken at once, and one thread writes it. At most one step is being written."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from torch import Tensor

from picolm.address import Address
from picolm.store.checkpoint import Checkpoint
from picolm.store.retention import Retention
from picolm.store.run import Run


class BackgroundWriter:
    """A writer that commits steps to a run from its own thread. Use it as a context manager, or call `close`.

    retention: rules applied to older steps once a new one is complete. written: callback, called with each committed
    step before the rules are applied.
    snapshot_s, waiting_s, writing_s: seconds spent so far copying tensors, waiting for the previous step to be written
    (both hold up the training), and writing (which does not).
    """

    def __init__(
        self, run: Run, retention: Retention | None = None, written: Callable[[int], None] = lambda step: None
    ):
        self.run, self.retention, self.written = run, retention, written
        self.snapshot_s = self.waiting_s = self.writing_s = 0.0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint-writer")
        self._under_way: Future[Checkpoint] | None = None

    def submit(self, step: int, tensors: Mapping[Address, Tensor], **arguments: Any) -> None:
        """Copy the tensors as they are now and start to commit them; takes the arguments of `Run.commit`.

        Waits for the previous step first, and raises its error. One snapshot exists at a time: it costs as much main
        memory as the tensors.
        """
        self.wait()
        start = time.perf_counter()
        snapshot = {address: tensor.detach().to("cpu", copy=True) for address, tensor in tensors.items()}
        self.snapshot_s += time.perf_counter() - start
        self._under_way = self._thread.submit(self._commit, step, snapshot, arguments)

    def check(self) -> None:
        """Raise the error of the step that was being written, if it has ended with one. Does not wait."""
        if self._under_way is not None and self._under_way.done():
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being written. Raises the error of that step, once."""
        start = time.perf_counter()
        under_way, self._under_way = self._under_way, None
        try:
            if under_way is not None:
                under_way.result()
        finally:
            self.waiting_s += time.perf_counter() - start

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(
        self, failed: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception as late:
            if error is None:
                raise
            error.add_note(f"besides, saving failed: {late}")  # the first error is the one to show

    def _commit(self, step: int, snapshot: Mapping[Address, Tensor], arguments: Mapping[str, Any]) -> Checkpoint:
        start = time.perf_counter()
        try:
            checkpoint = self.run.commit(step, snapshot, **arguments)
            self.written(step)
            if self.retention is not None:
                self.retention.apply(step)
            return checkpoint
        finally:
            self.writing_s += time.perf_counter() - start
