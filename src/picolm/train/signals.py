"""Handle Ctrl-C and SIGTERM: the loop finishes its step, saves and stops. A second Ctrl-C ends the process at once.

Before the first step there is nothing to save, and downloads may take minutes: until then signals end the process.
"""

import logging
import signal
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import distributed

log = logging.getLogger("picolm")


class StopSignal:
    """A `with` block that records stop signals, from the first call of `agreed` to the end of the block.

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
