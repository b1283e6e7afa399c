"""What happens at which step, and everything the training loop needs, in one object.

The schedule is a pure function of the configuration and the step. `build` creates the Job from a configuration; `loop`
trains it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from picolm.capture import Taps
from picolm.data.batches import Batches
from picolm.store import Run
from picolm.store.writer import BackgroundWriter
from picolm.train.config import Cadence, LearningDynamics, TrainConfig
from picolm.train.evaluate import Rows
from picolm.train.failure import StopSignal
from picolm.train.metrics import Logger, Progress, Stopwatch
from picolm.train.optim import OwnRates, learning_rate
from picolm.train.resources import Pace
from picolm.train.state import State
from picolm.train.text import Text

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class Due(NamedTuple):
    """The actions that are due at one step. weights, optimizer, dynamics: the parts to save."""

    weights: bool = False
    optimizer: bool = False
    dynamics: bool = False
    evaluation: bool = False
    log: bool = False
    digest: bool = False

    @property
    def checkpoint(self) -> bool:
        """Whether any part of the step is saved."""
        return self.weights or self.optimizer or self.dynamics


class Schedule(Protocol):
    """What the training loop needs to know: the last step, and what is due at each step."""

    last: int

    def due(self, step: int) -> Due: ...

    def when_stopping(self, step: int) -> Due: ...


class Plan:
    """The schedule given by a configuration."""

    def __init__(self, config: TrainConfig):
        self.checkpointing, self.evaluation = config.checkpointing, config.evaluation
        self.last = config.training.max_steps
        self.log_every = config.monitoring.logging.log_every_n_steps
        chosen = config.monitoring.logging.digest_every_n_steps
        self.digest_every = self.log_every if chosen is None else chosen

    def due(self, step: int) -> Due:
        """Return what is due at `step`."""
        chosen = self.checkpointing
        kept = self._saved(step)
        every = self.evaluation.every_n_steps
        return Due(
            weights=kept and self._matches(chosen.save_weights, step),
            optimizer=kept and self._matches(chosen.save_optimizer, step),
            dynamics=kept and self._matches(chosen.save_learning_dynamics, step),
            evaluation=bool(self.evaluation.metrics)
            and (kept if every is None else step % every == 0 or step == self.last),
            log=step % self.log_every == 0 or step == self.last,
            digest=self.digest_every > 0 and (step % self.digest_every == 0 or step == self.last),
        )

    def when_stopping(self, step: int) -> Due:
        """Return what is due if the run is interrupted at `step`: everything due anyway, and what is needed to resume."""
        return self.due(step)._replace(weights=True, optimizer=True, log=True)

    def saved_steps(self) -> list[int]:
        """Return the steps of which any part is saved, in ascending order."""
        every = range(0, self.last + 1, self.checkpointing.save_every_n_steps)
        powers = [2**i for i in range(10)] if self.checkpointing.save_schedule == "log" else []
        steps = {*every, *(step for step in powers if step <= self.last), self.last}
        return [step for step in sorted(steps) if self.due(step).checkpoint]

    def _saved(self, step: int) -> bool:
        log = self.checkpointing.save_schedule == "log" and step.bit_count() == 1 and step <= 512
        return log or step % self.checkpointing.save_every_n_steps == 0 or step == self.last

    def _matches(self, cadence: Cadence, step: int) -> bool:
        if cadence == "all":
            return True
        return step == self.last if cadence == "last" else step % cadence == 0


def taps_of(dynamics: LearningDynamics, modules: dict[str, nn.Module], seed: int) -> Taps:
    """Return the taps of a section `learning_dynamics`, for the modules that it means. seed: of random positions."""
    return Taps(
        modules=modules,
        activations="activations" in dynamics.what,
        gradients="gradients" in dynamics.what,
        positions=dynamics.positions if dynamics.positions is not None else [dynamics.sequence_idx],
        dtype=None if dynamics.dtype == "auto" else getattr(torch, dynamics.dtype),
        max_rows=dynamics.max_rows,
        seed=seed,
    )


@dataclass
class Job:
    """One training run, ready to train from `state.step`.

    model: the Fabric wrapper of the model in `state`. texts: files that are written into each checkpoint with weights.
    compiled: whether the model has a `compiled_loss`, which training then uses instead of `loss`.
    exact: whether an operation without a deterministic kernel is an error (on CPUs there are none in the models here).
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
    exact: bool = False
    run: Run | None = None
    writer: BackgroundWriter | None = None
    loggers: list[Logger] = field(default_factory=list)
    most_skipped: float | None = None
    continued_from: int | None = None
    about: dict[str, Any] = field(default_factory=dict)
    watchers: Sequence[Callable[[Job, int], None]] = ()
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

    @property
    def reads_without_noise(self) -> bool:
        """Whether the model hides tokens from itself in training, and captures are of a pass in which it does not."""
        return hasattr(self.state.model, "without_noise")

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
