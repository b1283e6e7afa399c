"""Check that a model fits into memory before any of it is allocated: a typing error may ask for terabytes."""

import dataclasses
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from picolm.errors import PicoError
from picolm.models import MODELS

COUNTED = 64  # up to this many blocks are built for counting; larger counts are extrapolated from two and three blocks
BLOCK_BYTES = 20_000  # lower bound of the Python objects of one block


def parameter_count(config: Any) -> float | None:
    """Return the number of parameters of a model, without allocating them; inf if it does not fit in 63 bits.

    For more than COUNTED blocks, the count is extrapolated linearly from models of two and three blocks. None if the
    model cannot be built on the meta device.
    """
    layers = getattr(config, "n_layers", 0)
    if not isinstance(layers, int) or layers <= COUNTED or not dataclasses.is_dataclass(config):
        return _count(config)
    two, three = (_count(dataclasses.replace(config, n_layers=number)) for number in (2, 3))  # type: ignore[type-var]
    return None if two is None or three is None else two + (layers - 2) * (three - two)


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
    needed = 4 * count + BLOCK_BYTES * getattr(config, "n_layers", 0)
    if needed > memory:
        size = f"{count:.3g} parameters" if math.isfinite(count) else "more parameters than can be counted"
        raise PicoError(
            f"model: {size} need {_terabytes(needed)} for the weights alone, and this machine has {_terabytes(memory)} of "
            f"memory; make {', '.join(_large(config))} smaller"
        )


def require_blocks(config: Any) -> None:
    """Raise PicoError if a model has too many blocks to be built, even on the meta device."""
    memory, blocks = memory_bytes(), getattr(config, "n_layers", 0)
    if parameter_count(config) == math.inf or (memory is not None and BLOCK_BYTES * blocks > memory):
        raise PicoError(f"model: it is too large to be built; make {', '.join(_large(config))} smaller")


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
