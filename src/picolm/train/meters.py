"""Measurements during training: loss spikes, the gradient noise scale, sizes of updates, and time by phase."""

import math
import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from picolm.address import Address
from picolm.capture.gather import on_every_process

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
