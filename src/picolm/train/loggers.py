"""Loggers of the metrics of a run. metrics.jsonl is always written; the configuration adds others.

A logger takes (step, metrics). Loggers of external services never stop a run, because the service may be unreachable.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from picolm.errors import PicoError
from picolm.registry import Registry
from picolm.schema import plain
from picolm.store.files import disk_errors
from picolm.store.layout import inside
from picolm.tracking import Session
from picolm.trusted import open_to_append, refuse_links

if TYPE_CHECKING:
    from picolm.store import Run
    from picolm.train.config import TrainConfig

log = logging.getLogger("picolm")

_TRACKIO_SERVERS = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")  # if set, trackio would log to another machine


class Logger(Protocol):
    """A destination of metrics, which receives the logged steps in ascending order."""

    def log(self, step: int, metrics: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


LOGGERS: Registry[Callable[[TrainConfig, Run], Logger]] = Registry("logger")


def build_loggers(config: TrainConfig, run: Run) -> list[Logger]:
    """Return the loggers of the configuration. Raises PicoError if the package of one is not installed."""
    monitoring = config.monitoring
    wanted = {
        "jsonl": True,
        "tensorboard": monitoring.save_to_tensorboard,
        "wandb": monitoring.save_to_wandb,
        "trackio": monitoring.save_to_trackio,
    }
    return [LOGGERS.get(name)(config, run) for name, asked in wanted.items() if asked]


@LOGGERS.add("jsonl")
class JsonLines:
    """A logger that appends one line per logged step to metrics.jsonl."""

    def __init__(self, config: TrainConfig, run: Run):
        self.run = run

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        self.run.append_metrics({"step": step, **metrics})

    def close(self) -> None:
        pass


@LOGGERS.add("tensorboard")
class TensorBoard:
    """A logger that writes TensorBoard event files to the log folder of the run."""

    def __init__(self, config: TrainConfig, run: Run):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise PicoError("monitoring.save_to_tensorboard needs: pip install 'picolm[tensorboard]'") from error
        logged = max(
            (entry["step"] for entry in run.read_metrics(("step",))), default=-1
        )  # events of later steps are purged: a resumed run logs them again
        folder = log_folder(config, run) / "tensorboard"
        refuse_links(folder, run.path)
        self.writer = SummaryWriter(str(folder), purge_step=logged + 1)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        for name, value in metrics.items():
            if isinstance(value, int | float):
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


@LOGGERS.add("wandb")
class WeightsAndBiases:
    """Weights & Biases adapter. Without account or connection it writes an offline run, to upload with `wandb sync`."""

    def __init__(self, config: TrainConfig, run: Run):
        chosen, name = config.monitoring.wandb, str(config.checkpointing.run_name)
        self.session = Session(chosen.project, chosen.entity, name, log_folder(config, run), plain(config))

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        self.session.log(metrics, step)

    def close(self) -> None:
        self.session.close()


@LOGGERS.add("trackio")
class Trackio:
    """trackio adapter: log to a database on this machine, which `trackio show` opens. Nothing is sent anywhere.

    The database is in $TRACKIO_DIR, by default next to the Hub's cache; monitoring.wandb.project names the project.
    """

    def __init__(self, config: TrainConfig, run: Run):
        try:
            import trackio
        except ImportError as error:
            raise PicoError("monitoring.save_to_trackio needs: pip install 'picolm[trackio]'") from error
        begun = log_folder(config, run) / "trackio_begun"
        elsewhere = {name: os.environ.pop(name) for name in _TRACKIO_SERVERS if name in os.environ}
        with contextlib.redirect_stdout(None):
            self.session = trackio.init(
                project=config.monitoring.wandb.project or "pico",
                name=str(config.checkpointing.run_name),
                config=plain(config),
                resume="allow" if begun.exists() else "never",  # a new run never joins an old one of the same name
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        os.environ.update(elsewhere)
        os.close(open_to_append(begun))
        self.finish = trackio.finish  # session.finish would be called again at exit and print again

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        try:
            self.session.log(
                {name: value for name, value in metrics.items() if isinstance(value, int | float)}, step=step
            )
        except Exception as error:
            log.warning("trackio took nothing at step %d: %s", step, error)

    def close(self) -> None:
        try:
            with contextlib.redirect_stdout(None):
                self.finish()
        except Exception as error:
            log.warning("trackio did not close: %s", error)


def log_folder(config: TrainConfig, run: Run) -> Path:
    """Return the log folder of the run; create it if it is missing. Raises StoreError if it is a link."""
    folder = inside(run.path, run.directories.logs_dir)
    with disk_errors("the logs", folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder
