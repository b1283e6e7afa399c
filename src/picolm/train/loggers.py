"""Where the numbers of a run go. metrics.jsonl is always written; others are added by configuration.

A logger takes (step, metrics) and never stops a run: what lies outside of this machine may be out of reach.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from picolm.errors import PicoError
from picolm.registry import Registry
from picolm.schema import plain
from picolm.store.files import disk_errors
from picolm.tracking import Session

if TYPE_CHECKING:
    from picolm.store import Run
    from picolm.train.config import TrainConfig

log = logging.getLogger("picolm")


class Logger(Protocol):
    """Takes the metrics of logged steps, in order."""

    def log(self, step: int, metrics: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


LOGGERS: Registry[Callable[[TrainConfig, Run], Logger]] = Registry("logger")


def build_loggers(config: TrainConfig, run: Run) -> list[Logger]:
    """The loggers that the configuration asks for. Raises PicoError where their package is not installed."""
    monitoring = config.monitoring
    wanted = {"jsonl": True, "tensorboard": monitoring.save_to_tensorboard, "wandb": monitoring.save_to_wandb}
    return [LOGGERS.get(name)(config, run) for name, asked in wanted.items() if asked]


@LOGGERS.add("jsonl")
class JsonLines:
    """One line per logged step in metrics.jsonl."""

    def __init__(self, config: TrainConfig, run: Run):
        self.run = run

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        self.run.append_metrics({"step": step, **metrics})

    def close(self) -> None:
        pass


@LOGGERS.add("tensorboard")
class TensorBoard:
    """TensorBoard event files in the run's log folder."""

    def __init__(self, config: TrainConfig, run: Run):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise PicoError("monitoring.save_to_tensorboard needs: pip install 'picolm[tensorboard]'") from error
        logged = max((entry["step"] for entry in run.metrics()), default=-1)  # a continued run makes later ones again
        self.writer = SummaryWriter(str(log_folder(config, run) / "tensorboard"), purge_step=logged + 1)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        for name, value in metrics.items():
            if isinstance(value, int | float):
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


@LOGGERS.add("wandb")
class WeightsAndBiases:
    """Weights & Biases; without an account or a connection it writes an offline run, to be sent with `wandb sync`."""

    def __init__(self, config: TrainConfig, run: Run):
        chosen, name = config.monitoring.wandb, str(config.checkpointing.run_name)
        self.session = Session(chosen.project, chosen.entity, name, log_folder(config, run), plain(config))

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        self.session.log(metrics, step)

    def close(self) -> None:
        self.session.close()


def log_folder(config: TrainConfig, run: Run) -> Path:
    """The run's folder for logs, made where it is missing."""
    folder = Path(run.path) / config.checkpointing.logs_dir
    with disk_errors("the logs", folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder
