"""What this process may use of the machine: CPUs, threads and memory; and when other processes slow it down.

A container or a batch system often gives a process fewer CPUs than the machine has: by its affinity, or by a quota of
its control group (cgroup). Threads beyond that number wait for each other, and while they wait they use up the quota.
"""

import dataclasses
import math
import os
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from picolm.errors import PicoError
from picolm.models import MODELS, block_count

SET_BY_USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
SLOW = 3.0  # a step is slow if it takes more than this many times the usual duration
LEAST_INTERVALS = 5  # logged intervals needed to know the usual duration
V1_CONTROLLERS = ("cpu,cpuacct", "cpu", "cpuacct,cpu")


def usable_cpus(root: Path = Path("/")) -> float:
    """Return the number of CPUs that this process may use: its affinity, or the quota of its cgroup if that is less."""
    return min([float(_affinity()), *_quotas(root)])


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1


def _quotas(root: Path) -> Iterator[float]:
    """Yield the quotas, in CPUs, of the cgroups of this process and of all cgroups above them; for cgroup v1 and v2."""
    mount = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", "", ""][:3]
        if not controllers:
            for folder in (*_upwards(mount, path), *_upwards(mount / "unified", path)):
                yield from _quota(*[*_text(folder / "cpu.max").split(), "", ""][:2])
        elif "cpu" in controllers.split(","):
            for controller in V1_CONTROLLERS:
                for folder in _upwards(mount / controller, path):
                    yield from _quota(_text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us"))


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    """Yield the folders of a cgroup and of all cgroups above it. In a container, only the last (the mount) may exist."""
    parts = [part for part in path.split("/") if part not in ("", "..", ".")]
    for end in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:end])


def _quota(quota: str, period: str) -> Iterator[float]:
    with suppress(ValueError):  # `max`, or no such file
        if int(quota) > 0 and int(period) > 0:
            yield int(quota) / int(period)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def threads_for(usable: float, processes: int, default: int, environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of threads for each of `processes`: `default`, or its share of the usable CPUs if that is less.

    Always `default` if the user has set OMP_NUM_THREADS or MKL_NUM_THREADS, because `default` follows them already.
    """
    if any(environment.get(name) for name in SET_BY_USER):
        return default
    return max(1, min(default, math.floor(usable / processes)))


class Pace:
    """A monitor of the step times of logged intervals, which notices slow steps caused by other users of the CPUs."""

    def __init__(self) -> None:
        self._durations: deque[float] = deque(maxlen=20)
        self._shares: deque[float] = deque(maxlen=20)

    def observe(self, step_s: float, cpus: float, load: float | None, usable: float) -> str | None:
        """Record an interval. Returns a warning if it was slow because the CPUs are shared, else None.

        step_s: computing time per step. cpus: CPU seconds of this process per second. load: average number of processes
        that want to run, over the last minute; None if unknown. usable: number of CPUs that this process may use.
        """
        message = None
        if len(self._durations) >= LEAST_INTERVALS:
            usual, share = statistics.median(self._durations), statistics.median(self._shares)
            crowded = load is not None and load > 1.5 * usable + 1
            if step_s > SLOW * usual and (crowded or cpus < 0.7 * share):
                message = _slow(step_s / usual, cpus, share, load, usable)
        if message is None:
            self._durations.append(step_s)
            self._shares.append(cpus)
        return message


def _slow(times: float, cpus: float, share: float, load: float | None, usable: float) -> str:
    busy = f", and {load:.0f} processes want to run" if load is not None else ""
    return (
        f"Steps take {times:.1f} times their usual time, because this machine is shared: the run gets {cpus:.1f} CPUs "
        f"(usually {share:.1f} of {usable:.3g}){busy}. If it stays so, stop (Ctrl-C), set OMP_NUM_THREADS=1 or less than "
        "now, and give the same command again: threads that wait for each other lose more than they bring."
    )


def load_average() -> float | None:
    """Return the average load of the last minute; None if the system does not report it."""
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):
        return None


COUNTED = 64  # up to this many blocks are built for counting; larger counts are extrapolated from two and three blocks
BLOCK_BYTES = 20_000  # lower bound of the Python objects of one block


def parameter_count(config: Any) -> float | None:
    """Return the number of parameters of a model, without allocating them; inf if it does not fit in 63 bits.

    For more than COUNTED blocks, the count is extrapolated linearly from models of two and three blocks. None if the
    model cannot be built on the meta device.
    """
    return over_blocks(config, _count, COUNTED)


def over_blocks(config: Any, count: Callable[[Any], float | None], most: int) -> float | None:
    """Return what `count` gives for a model; for one of more than `most` blocks, extrapolated linearly from two and three blocks.

    None if `count` gives None.
    """
    key, blocks = block_count(config) or ("", 0)
    if blocks <= most or not dataclasses.is_dataclass(config):
        return count(config)
    two, three = (count(dataclasses.replace(config, **{key: number})) for number in (2, 3))  # type: ignore[type-var]
    return None if two is None or three is None else two + (blocks - 2) * (three - two)


def _count(config: Any) -> float | None:
    try:
        with torch.device("meta"):
            return float(sum(p.numel() for p in MODELS.get(config.model_type)(config).parameters()))
    except (RuntimeError, OverflowError, TypeError, ValueError) as error:  # sizes that torch does not accept
        return math.inf if any(word in str(error).lower() for word in ("overflow", "too large", "long")) else None


def require_memory(config: Any) -> None:
    """Raise PicoError if the weights of a model alone need more than the memory of this machine."""
    count, memory = parameter_count(config), memory_bytes()
    if count is None or memory is None:
        return
    needed = 4 * count + BLOCK_BYTES * _blocks(config)
    if needed > memory:
        size = f"{count:.3g} parameters" if math.isfinite(count) else "more parameters than can be counted"
        raise PicoError(
            f"model: {size} need {_terabytes(needed)} for the weights alone, and this machine has {_terabytes(memory)} of "
            f"memory; make {', '.join(_large(config))} smaller"
        )


def require_blocks(config: Any) -> None:
    """Raise PicoError if a model has too many blocks to be built, even on the meta device."""
    memory = memory_bytes()
    if parameter_count(config) == math.inf or (memory is not None and BLOCK_BYTES * _blocks(config) > memory):
        raise PicoError(f"model: it is too large to be built; make {', '.join(_large(config))} smaller")


def _blocks(config: Any) -> int:
    found = block_count(config)
    return found[1] if found is not None else 0


def memory_bytes(root: Path = Path("/")) -> float | None:
    """Return the memory of this machine in bytes, or the limit of its cgroup if that is less; None if it is unknown."""
    found = []
    with suppress(ValueError, OSError, AttributeError):
        found.append(float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with suppress(ValueError, OSError):
            found.append(float(int((root / "sys/fs/cgroup" / name).read_text())))
    return min(found, default=None)


def _large(config: Any) -> list[str]:
    """Return the six largest integers of a configuration that affect its size, as `key=value`."""
    numbers = {key: value for key, value in vars(config).items() if type(value) is int}
    shaping = {key: value for key, value in numbers.items() if key not in ("batch_size", "max_seq_len")}
    return [f"{key}={value}" for key, value in sorted(shaping.items(), key=lambda pair: -pair[1])[:6]]


def _terabytes(size: float) -> str:
    unit, name = (1e12, "TB") if size >= 1e12 else (1e9, "GB")
    return f"{size / unit:,.3g} {name}"
