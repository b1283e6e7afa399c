"""A laboratory's own parts, for runs of several processes: a model with noise, and data on which one process comes to grief."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch.nn.functional import cross_entropy

from picolm.data import open_source
from picolm.errors import DataError
from picolm.models import Decoder, DecoderConfig, Loss, Noise

CALLS = 8  # of `rows` before it happens: the first checkpoint is on disk by then


@dataclass(frozen=True)
class NoisyConfig(DecoderConfig):
    model_type: str = "lab:Noisy"  # type: ignore[assignment]


class Noisy(Decoder):
    """A decoder that reads some of its tokens wrongly."""

    Config: ClassVar[type] = NoisyConfig

    def loss(self, tokens_BS: Any, noise: object = None) -> Loss:
        assert isinstance(noise, Noise)
        wrong_BS = noise.uniform(tokens_BS.shape[1]) < 0.2
        noisy_BS = noise.integers(self.config.vocab_size, tokens_BS.shape[1]).where(wrong_BS, tokens_BS)
        return super().loss(noisy_BS)


class Source:
    """The rows of a folder, until on process $BAD_RANK something happens: $HOW."""

    def __init__(self, inner: Any):
        self.inner, self.calls = inner, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __len__(self) -> int:
        return len(self.inner)

    def rows(self, indices: np.ndarray) -> np.ndarray:
        self.calls += 1
        rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
        if self.calls == CALLS and rank == os.environ["BAD_RANK"]:
            happen(os.environ["HOW"])
        return self.inner.rows(indices)


def source(place: str, *, split: str, row_length: int | None, vocab_size: int, cache_dir: Path) -> Source:
    name = os.environ["LAB_DATA"]
    return Source(open_source(name, split=split, row_length=row_length, vocab_size=vocab_size, cache_dir=cache_dir))


def happen(how: str) -> None:
    if how == "unreadable":
        raise DataError("shard 7, row 3: cannot be read")
    if how == "bug":
        raise KeyError("no such thing")
    if how == "hang":
        time.sleep(1000)
    os.kill(os.getpid(), signal.Signals[how])


@dataclass(frozen=True)
class SomeConfig(DecoderConfig):
    model_type: str = "lab:Some"  # type: ignore[assignment]


class Some(Decoder):
    """A decoder that predicts some tokens: another number of them in each row, and none in some rows."""

    Config: ClassVar[type] = SomeConfig

    def _some(self, tokens_BS: Any) -> Any:
        return (tokens_BS[:, 1:] % 5 < 2) & (tokens_BS.sum(1, keepdim=True) % 3 != 0)

    def loss(self, tokens_BS: Any, noise: object = None) -> Loss:
        nats_BT = cross_entropy(self(tokens_BS[:, :-1]).mT, tokens_BS[:, 1:], reduction="none")
        some_BT = self._some(tokens_BS)
        return Loss((nats_BT * some_BT).sum(), int(some_BT.sum()))
