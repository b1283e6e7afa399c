"""Ctrl-C and SIGTERM ask for a stop; the loop finishes its step, saves, and leaves. A second Ctrl-C leaves at once.

Before the first step there is nothing to finish, and fetching data may take minutes: until then they end the process as ever.
"""

import logging
import signal
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import distributed

log = logging.getLogger("picolm")


class StopSignal:
    """From the first question with `agreed` to the end of the `with` block, `received` is the first signal that asked for a
    stop, else None. With several processes, `agreed` tells each what any of them received.
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
        """Whether any process was asked to stop: all leave at the same step."""
        self._listen()
        if not (distributed.is_available() and distributed.is_initialized()):
            return self.received is not None
        number = torch.tensor(self.received or 0, dtype=torch.float32, device=device)
        distributed.all_reduce(number, distributed.ReduceOp.MAX)
        agreed = int(number.item())  # what this process receives from now on counts at the next step
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
            except ValueError:  # not in the main thread: whoever owns it decides about signals
                log.debug("Signals are left to the main thread.")

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGTERM:  # torchrun and SLURM may both pass on the same one
            return
        if self.received is not None:  # the second is dealt with as if nobody had listened
            signal.signal(number, self._previous[number])
            signal.raise_signal(number)
            return
        self.received = signal.Signals(number)
        log.warning("%s: finishing this step and saving; a second Ctrl-C leaves at once.", self.received.name)
