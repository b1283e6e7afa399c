"""Training loops as other people write them, with a place for a Recorder: that of nanoGPT, in one process or several.

As a script, `torchrun loops.py OUT WAY` saves the final weights in OUT: with a recorder if there is a third argument.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))  # as a script
from examples.nanogpt import GPT

VOCABULARY, LENGTH = 61, 12


def gpt(dropout: float = 0.0) -> GPT:
    return GPT(VOCABULARY, LENGTH, width=32, dropout=dropout)


@dataclass
class Way:
    """How a loop trains. dropout, wrapped: of the model; accumulation: micro-batches; clip: to this norm, after the block."""

    dropout: float = 0.0
    accumulation: int = 1
    momentum: float = 0.0
    autocast: bool = False
    clip: float | None = None
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD
    steps: int = 7


def batches(way: Way, rank: int = 0, world: int = 1) -> Iterator[list[Tensor]]:
    generator = torch.Generator().manual_seed(3)
    while True:
        rows = torch.randint(VOCABULARY, (way.accumulation, world, 4, LENGTH + 1), generator=generator)
        yield list(rows[:, rank])


def train(way: Way, recorder: Callable[[nn.Module, torch.optim.Optimizer], Any] | None = None) -> nn.Module:
    """Train as nanoGPT does, recorded if asked; returns the model, not wrapped."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(5)
    raw = gpt(way.dropout)
    model = way.wrap(raw)
    optimizer = way.optimizer(model.parameters(), lr=0.1)
    watched = recorder(model, optimizer) if recorder else None
    data = batches(way, rank, world)
    for n in range(way.steps):
        micro_batches = next(data)
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 + math.cos(math.pi * n / way.steps)) / 2
        block: AbstractContextManager[Any] = watched.step(n, micro_batches) if watched else nullcontext()
        with block:
            loss = _forward_backward(model, micro_batches, way)
        if watched:
            watched.log(n, {"train/loss": loss})
        if way.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), way.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if watched:
        watched.close()
    return raw


def _forward_backward(model: nn.Module, micro_batches: Sequence[Tensor], way: Way) -> Tensor:
    total = torch.zeros(())
    for index, rows in enumerate(micro_batches):
        last = index == len(micro_batches) - 1
        waiting = model.no_sync() if hasattr(model, "no_sync") and not last else nullcontext()
        with waiting:
            with torch.autocast("cpu", torch.bfloat16, enabled=way.autocast):
                _, loss = model(rows[:, :-1], rows[:, 1:])
            (loss / len(micro_batches)).backward()
        total += loss.detach() / len(micro_batches)
    return total


def _ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def _fsdp2(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for block in model.h:
        fully_shard(block)
    return fully_shard(model)


def main() -> None:
    from picolm import Recorder
    from picolm.capture.taps import whole_tensors

    out, wrap, *place = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    way = Way(accumulation=2, wrap=_ddp if wrap == "ddp" else _fsdp2)
    recorder = (lambda model, optimizer: Recorder(place[0], model, optimizer, save_every_n_steps=2)) if place else None
    weights = whole_tensors(train(way, recorder).state_dict())
    if dist.get_rank() == 0:
        torch.save(weights, Path(out))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
