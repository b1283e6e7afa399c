"""Everything the loop needs, in one place. `build` makes it from a configuration; `loop` runs it."""

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
    """One training run, ready to go on from `state.step`.

    model: what Fabric returned, around the bare model in `state`. texts: files that go into each checkpoint with weights.
    compiled: whether the model has a `compiled_loss` beside its `loss`, to train with.
    run, writer: None where nothing is kept, and on all processes but the first (no writer).
    about: what the manifests of its checkpoints say besides (replayed from, forked from).
    watchers: called with (job, step) when the gradient of a step is there and its weights are not yet updated.
    most_skipped: updates that may be skipped in a row before the run stops; None: as many as the configuration says.
    continued_from: the step whose checkpoint this run went on from; that one is on disk already.
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
        """Log a remark on the metrics the first time, where metrics are logged."""
        if self.loggers and text not in self._said:
            self._said.add(text)
            self.progress.say(text)

    @property
    def device(self) -> torch.device:
        return self.fabric.device

    @property
    def tokens_per_step(self) -> int:
        """Targets in the rows of one step, over all processes; a model may predict fewer."""
        return self.config.data.dataloader.batch_size * self.config.model.max_seq_len

    @property
    def tokens_read(self) -> int:
        """Tokens at the start of a row that are only read: row_length(n) of them predict n."""
        return int(self.state.model.row_length(0))

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of the update from `step` to `step + 1`."""
        return learning_rate(step, self.config.training.optimization, self.config.training.max_steps)

    def group_rates(self, step: int) -> dict[str, float]:
        """Return the rate of each parameter group in the update from `step` to `step + 1`, by its name."""
        chosen, total = self.config.training.optimization, self.config.training.max_steps
        rates = dict.fromkeys(self._own.names, self.learning_rate(step))
        if self.state.own_rates:
            own = {name: peak for name, peak in zip(self._own.names, self._own.peaks) if peak != chosen.lr}
            rates |= {name: learning_rate(step, chosen, total, peak) for name, peak in own.items()}
        return rates

    def set_rates(self, step: int) -> None:
        """Give each parameter group its rate of the update from `step` to `step + 1`."""
        self._own.set(self.group_rates(step).values())

    @property
    def rates_differ(self) -> bool:
        """Whether some parameter group has another peak than `training.optimization.lr`."""
        return any(peak != self.config.training.optimization.lr for peak in self._own.peaks)

    def gradients(self) -> list[Tensor]:
        """The gradients that the parameters hold now."""
        return [parameter.grad for parameter in self.state.model.parameters() if parameter.grad is not None]
