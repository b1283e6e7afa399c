"""Show the progress of training: a progress bar on a terminal, plain log lines elsewhere."""

import logging
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from picolm.console import can_redraw, screen

log = logging.getLogger("picolm")


class Progress:
    """The progress display of a run. shown: whether this process prints anything; True only on the first process."""

    def __init__(self, tokens_per_step: int, shown: bool = True):
        self.tokens_per_step = tokens_per_step
        console = screen(error=True)
        self.bar = _bar(console) if shown and can_redraw(console) else None
        self.shown = shown
        self.task: Any = None

    def start(self, first: int, last: int) -> None:
        """Start the bar at step `first` of `last`."""
        if self.bar is not None:
            self.bar.start()
            self.task = self.bar.add_task("training", total=last, completed=first, loss="", lr="", speed="")

    def advance(self, step: int, loss: float, rate: float) -> None:
        """Move the bar to `step`, with its loss and learning rate."""
        if self.bar is None or self.task is None:
            return
        steps_per_s = self.bar.tasks[self.task].speed
        speed = f"{steps_per_s * self.tokens_per_step:,.0f} tokens/s" if steps_per_s else ""
        self.bar.update(self.task, completed=step, loss=f"loss {loss:.3f}", lr=f"lr {rate:.1e}", speed=speed)

    def line(self, step: int, last: int, metrics: Mapping[str, Any]) -> None:
        """Log one line with the metrics of a step, if there is no bar."""
        if self.bar is None:
            speed = metrics["tokens_per_s"]
            left = (last - step) * self.tokens_per_step / speed
            self.say(
                f"step {step}/{last}  loss {metrics['train/loss']:.4f}  lr {metrics['lr']:.2e}  "
                f"grad norm {metrics['grad_norm']:.3f}  {speed:,.0f} tokens/s  {_duration(left)} left"
            )

    def say(self, text: str) -> None:
        """Log one plain line, above the bar if there is one."""
        if not self.shown:
            return
        log.info(text)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()


def _bar(console: Console) -> Bar:
    return Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        *(TextColumn(f"{{task.fields[{name}]}}") for name in ("loss", "lr", "speed")),
        TimeRemainingColumn(),
        console=console,
    )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
