"""What happens at which step: a pure function of the configuration and the step."""

from typing import NamedTuple, Protocol

from picolm.train.config import Cadence, TrainConfig


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
