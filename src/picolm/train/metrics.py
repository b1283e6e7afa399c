"""What is measured during training, and where it goes: metrics.jsonl always, the screen, loggers of the configuration.

A logger takes (step, metrics). Loggers of external services never stop a run, because the service may be unreachable.
The screen has a progress bar on a terminal, plain log lines elsewhere.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import Tensor, nn

from picolm.address import Address
from picolm.capture.taps import on_every_process
from picolm.console import can_redraw, screen
from picolm.errors import PicoError
from picolm.registry import Registry
from picolm.schema import plain
from picolm.store.files import disk_errors
from picolm.store.listing import BOUND
from picolm.store.manifest import inside
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
            speed, loss = metrics["tokens_per_s"], "bound" if BOUND in metrics else "loss"
            left = (last - step) * self.tokens_per_step / speed
            self.say(
                f"step {step}/{last}  {loss} {metrics['train/loss']:.4f}  lr {metrics['lr']:.2e}  "
                f"grad norm {metrics['grad_norm']:.3f}  {speed:,.0f} tokens/s  {_duration(left)} left"
            )

    def say(self, text: str) -> None:
        """Log one plain line, above the bar if there is one."""
        if not self.shown:
            return
        log.info(text)

    def __enter__(self) -> Progress:
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


WINDOW = 128  # number of recent steps that a loss is compared with to detect a spike
DECAY = 0.95  # decay of the weights in the averages of the noise scale, per logged step
SAMPLES = 128  # samples of the noise scale to keep: older ones would have weights below 0.95^128 = 0.0014
NEIGHBOURS = 10  # samples before and after a sample that decide whether it is an outlier
OUTLIER = 5.0  # limit in robust standard deviations (1.4826 median absolute deviations) from the median


class Meters:
    """The measurements that keep a history; `meta` and `restore` save it in a checkpoint and load it."""

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.spikes = 0
        self.noises: deque[float] = deque(maxlen=SAMPLES)  # S, the trace of the gradient's covariance per sequence
        self.signals: deque[float] = deque(maxlen=SAMPLES)  # G2, the squared norm of the true gradient

    def meta(self) -> dict[str, Any]:
        """Return the history as JSON values."""
        return {
            "losses": list(self.losses),
            "spikes": self.spikes,
            "noises": list(self.noises),
            "signals": list(self.signals),
        }

    def restore(self, meta: Mapping[str, Any]) -> None:
        """Load what `meta` returned. Checkpoints of earlier versions hold no noise samples; their averages start again."""
        self.losses, self.spikes = deque(meta["losses"], maxlen=WINDOW), meta["spikes"]
        self.noises = deque(meta.get("noises", ()), maxlen=SAMPLES)
        self.signals = deque(meta.get("signals", ()), maxlen=SAMPLES)

    def observe_loss(self, loss: float) -> bool:
        """Record a loss. Returns whether it is a spike: above mean + 6 standard deviations of the last WINDOW losses."""
        spike = False
        if len(self.losses) == WINDOW:
            mean = sum(self.losses) / WINDOW
            deviation = math.sqrt(sum((x - mean) * (x - mean) for x in self.losses) / WINDOW)
            spike = loss > mean + 6 * deviation
        if math.isfinite(loss):
            self.losses.append(loss)
        self.spikes += spike
        return spike

    def observe_noise(self, small_rows: int, small_norm: float, large_rows: int, large_norm: float) -> None:
        """Record the gradient norms of one micro-batch and of the complete batch, with their numbers of sequences.

        McCandlish et al. 2018, appendix A.1: unbiased estimates of G2 and S, averaged separately before the division.
        """
        small, large = small_norm * small_norm, large_norm * large_norm  # gives inf, where ** would raise an error
        signal = (large_rows * large - small_rows * small) / (large_rows - small_rows)
        noise = (small - large) / (1 / small_rows - 1 / large_rows)
        if math.isfinite(signal) and math.isfinite(noise):
            self.signals.append(signal)
            self.noises.append(noise)

    @property
    def noise(self) -> float | None:
        """The average of S; None before the first sample."""
        return recent_mean(self.noises)

    @property
    def signal(self) -> float | None:
        """The average of G2; None before the first sample. It may be below 0 if the noise hides the signal."""
        return recent_mean(self.signals)

    def noise_scale(self) -> float | None:
        """Return S / G2, the batch size in sequences at which noise and signal are equal; None unless both are above 0."""
        noise, signal = self.noise, self.signal
        return noise / signal if noise is not None and signal is not None and noise > 0 and signal > 0 else None


def recent_mean(samples: Sequence[float]) -> float | None:
    """Return the mean of the samples weighted by DECAY^age, divided by the sum of the weights; None without samples.

    The division is the bias correction of Adam (Kingma and Ba 2015): the first sample has no special weight. Outliers
    are clipped to a bound given by their neighbours (the filter of Hampel 1974, with clipping).
    """
    values = clip_outliers(list(samples))
    weights = [DECAY**age for age in range(len(values) - 1, -1, -1)]
    return sum(w * x for w, x in zip(weights, values)) / sum(weights) if values else None


def clip_outliers(samples: Sequence[float]) -> list[float]:
    """Return the samples, each clipped to OUTLIER robust standard deviations around the median of its neighbourhood.

    The neighbourhood is the sample itself and NEIGHBOURS samples on each side.
    """
    clipped = []
    for place, sample in enumerate(samples):
        near = samples[max(0, place - NEIGHBOURS) : place + NEIGHBOURS + 1]
        if len(near) > 4:  # with fewer, outliers cannot be identified
            middle = statistics.median(near)
            bound = OUTLIER * 1.4826 * statistics.median([abs(other - middle) for other in near])
            sample = min(max(sample, middle - bound), middle + bound)
        clipped.append(sample)
    return clipped


class Stopwatch:
    """A stopwatch that sums the seconds of each phase since the last report."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.started, self.cpu_started = time.perf_counter(), time.process_time()
        self.steps = 0
        self.cpus = 0.0  # CPU seconds of this process per second, in the last reported interval
        self.predicted = 0.0  # predicted tokens of the latest step, over all processes
        self.small: tuple[int, float] | None = None  # rows and gradient norm of one micro-batch of a logged step

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """Add the duration of the block to `phase`, without phases timed inside it, so that no time counts twice.

        GPU work is queued, so a phase includes time spent waiting for the work of earlier phases.
        """
        start, before = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            inside = sum(self.seconds.values()) - before
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start - inside

    def report(self) -> tuple[float, int, dict[str, float]]:
        """Return (seconds, steps, {phase: seconds per step}) since the last report. Sets `cpus` and resets the rest."""
        elapsed, steps, phases = time.perf_counter() - self.started, self.steps, self.seconds
        cpu = time.process_time()
        self.cpus, self.cpu_started = (cpu - self.cpu_started) / elapsed, cpu
        self.started, self.steps, self.seconds = time.perf_counter(), 0, {}
        return elapsed, steps, {phase: seconds / max(1, steps) for phase, seconds in phases.items()}


def norm(tensors: Iterable[Tensor]) -> float:
    """Return the Euclidean norm of all entries of all tensors together.

    Includes shards on other processes, so all processes must call it.
    """
    return float(on_every_process(torch.nn.utils.get_total_norm(list(tensors))))


def group_of(parameter_name: str) -> str:
    """Return the tensor group of a parameter: `attention` for `layers.3.attention.query.weight`; outside of the blocks,
    the first part of its name.
    """
    suffix = Address("", "", parameter_name).suffix  # the name inside its block
    return suffix.split(".")[0] if "." in suffix else parameter_name.split(".")[0]


class UpdateSize:
    """The size of one update by tensor group: norm(W_after - W_before) / norm(W_before). Copies all parameters."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def ratios(self) -> dict[str, float]:
        """Return the ratio by group, for the change of the parameters since construction."""
        groups: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for name, parameter in self.model.named_parameters():
            old = self.before[name]
            groups.setdefault(group_of(name), []).append((parameter.detach() - old, old))
        ratios = {}
        for group, pairs in groups.items():
            change, size = norm(c for c, _ in pairs), norm(w for _, w in pairs)
            ratios[group] = change / size if size else math.inf
        return ratios
