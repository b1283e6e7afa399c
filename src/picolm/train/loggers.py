"""Where the numbers of a run go. metrics.jsonl is always written; others are added by configuration.

A logger takes (step, metrics) and never stops a run: what lies outside of this machine may be out of reach.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from picolm.errors import PicoError
from picolm.registry import Registry

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
        try:
            import wandb
        except ImportError as error:
            raise PicoError("monitoring.save_to_wandb needs: pip install 'picolm[wandb]'") from error
        from picolm.schema import plain

        folder = log_folder(config, run)
        arguments: dict[str, Any] = {
            "project": config.monitoring.wandb.project or "pico",
            "entity": config.monitoring.wandb.entity or None,
            "name": config.checkpointing.run_name,
            "id": _identity(folder / "wandb_id"),
            "resume": "allow",
            "dir": str(folder),
            "config": plain(config),
            "settings": wandb.Settings(init_timeout=20, finish_timeout=60, silent=True, console="off"),
        }
        try:
            self.session = wandb.init(**arguments)
        except Exception as error:  # no account, no network, a refused key: none of them may cost a run
            log.warning("Weights & Biases is out of reach (%s); writing an offline run instead.", error)
            offline = {
                "mode": "offline",
                "resume": None,
                "id": secrets.token_hex(8),
            }  # the other id may still be in use
            self.session = wandb.init(**arguments | offline)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        try:
            self.session.log(metrics, step=step)
        except Exception as error:
            log.warning("Weights & Biases took nothing at step %d: %s", step, error)

    def close(self) -> None:
        try:
            self.session.finish()
        except Exception as error:
            log.warning("Weights & Biases did not close: %s", error)


def _identity(file: Path) -> str:
    """What tells the run apart on the server: made once, so that a continued run goes on there, and a new one does not."""
    if not file.exists():
        file.write_text(secrets.token_hex(8))
    return file.read_text()


def log_folder(config: TrainConfig, run: Run) -> Path:
    """The run's folder for logs, made where it is missing."""
    folder = Path(run.path) / config.checkpointing.logs_dir
    folder.mkdir(parents=True, exist_ok=True)
    return folder
