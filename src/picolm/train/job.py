"""Everything the training loop needs, in one object. `build` creates it from a configuration; `loop` trains it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from picolm.capture import Taps
from picolm.data.batches import Batches
from picolm.store import Run
from picolm.store.writer import BackgroundWriter
from picolm.train.config import TrainConfig
from picolm.train.evaluate import Rows
from picolm.train.loggers import Logger
from picolm.train.meters import Stopwatch
from picolm.train.optim import OwnRates, learning_rate
from picolm.train.plan import Schedule
from picolm.train.processors import Pace
from picolm.train.progress import Progress
from picolm.train.signals import StopSignal
from picolm.train.state import State
from picolm.train.text import Text


@dataclass
class Job:
    """One training run, ready to train from `state.step`.

    model: the Fabric wrapper of the model in `state`. texts: files that are written into each checkpoint with weights.
    compiled: whether the model has a `compiled_loss`, which training then uses instead of `loss`.
    run, writer: None if nothing is saved; `writer` is also None on all processes except the first.
    about: extra provenance written to each manifest (replayed, forked_from).
    watchers: callbacks, called with (job, step) after the gradients of a step are computed, before the update.
    most_skipped: how many updates in a row may be skipped before the run stops; None: the number in the configuration.
    continued_from: the step whose checkpoint the run resumed from, which is on disk already; None for a new start.
    """

    config: TrainConfig
    fabric: Fabric
    model: Any
    state: State
    batches: Batches
    taps: Taps
    plan: Schedule
    text: Text
    stop: StopSignal
    progress: Progress
    captured_rows: Rows | None
    evaluated_rows: Rows | None
    texts: dict[str, str | bytes]
    peak_flops: float
    compiled: bool = False
    run: Run | None = None
    writer: BackgroundWriter | None = None
    loggers: list[Logger] = field(default_factory=list)
    most_skipped: float | None = None
    continued_from: int | None = None
    about: dict[str, Any] = field(default_factory=dict)
    watchers: "Sequence[Callable[[Job, int], None]]" = ()
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    pace: Pace = field(default_factory=Pace)

    def __post_init__(self) -> None:
        self._own = OwnRates(self.state.optimizers, self.config.training.optimization.lr)
        self._said: set[str] = set()

    def say_once(self, text: str) -> None:
        """Log a message once, on processes that log metrics; further calls with the same text do nothing."""
        if self.loggers and text not in self._said:
            self._said.add(text)
            self.progress.say(text)

    @property
    def device(self) -> torch.device:
        return self.fabric.device

    @property
    def tokens_per_step(self) -> int:
        """Number of target tokens in the rows of one step, over all processes; a model may predict fewer."""
        return self.config.data.dataloader.batch_size * self.config.model.max_seq_len

    @property
    def tokens_read(self) -> int:
        """Number of tokens at the start of a row that are read but not predicted: row_length(0)."""
        return int(self.state.model.row_length(0))

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of the update from `step` to `step + 1`."""
        return learning_rate(step, self.config.training.optimization, self.config.training.max_steps)

    def group_rates(self, step: int) -> dict[str, float]:
        """Return the learning rate of each parameter group in the update from `step` to `step + 1`, by group name."""
        chosen, total = self.config.training.optimization, self.config.training.max_steps
        rates = dict.fromkeys(self._own.names, self.learning_rate(step))
        if self.state.own_rates:
            own = {name: peak for name, peak in zip(self._own.names, self._own.peaks) if peak != chosen.lr}
            rates |= {name: learning_rate(step, chosen, total, peak) for name, peak in own.items()}
        return rates

    def set_rates(self, step: int) -> None:
        """Set the learning rate of each parameter group for the update from `step` to `step + 1`."""
        self._own.set(self.group_rates(step).values())

    @property
    def rates_differ(self) -> bool:
        """Whether some parameter group has another peak learning rate than `training.optimization.lr`."""
        return any(peak != self.config.training.optimization.lr for peak in self._own.peaks)

    def gradients(self) -> list[Tensor]:
        """Return the current gradients of all parameters that have one."""
        return [parameter.grad for parameter in self.state.model.parameters() if parameter.grad is not None]
