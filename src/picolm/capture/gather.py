"""From the pieces that each process holds to one whole tensor, in data order."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes that take part (1 without a process group)."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def full_tensor(tensor: Tensor) -> Tensor:
    """A copy on the CPU of the whole of `tensor`, also where it is a shard of a distributed one."""
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().to(device="cpu", copy=True)


def gather_rows(rows: Tensor, places: Sequence[int]) -> Tensor:
    """The rows of all processes, sorted by their places in the global batch. Every process gets the result."""
    if world_size() > 1:
        pieces: list[tuple[Tensor, Sequence[int]] | None] = [None] * world_size()
        dist.all_gather_object(pieces, (rows, places))
        rows = torch.cat([piece[0] for piece in pieces if piece is not None])
        places = [place for piece in pieces if piece is not None for place in piece[1]]
    if list(places) == sorted(places):
        return rows
    return rows[torch.tensor(places).argsort()]
