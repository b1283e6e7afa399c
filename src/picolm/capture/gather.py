"""Gather the parts that each process holds into one full tensor, in data order, and distribute it again.

With FSDP2, parameters, gradients and moments are DTensors: each process holds a shard. All processes must call these
functions in the same order. Gathered tensors are returned on the first process only.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


def world_size() -> int:
    """Return the number of processes (1 without a process group)."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Return whether this is the first process: the one that gets gathered tensors and writes files."""
    return world_size() == 1 or dist.get_rank() == 0


def full_tensor(tensor: Tensor) -> Tensor | None:
    """Return a copy of the full tensor on the CPU, gathered if it is a DTensor; None on all processes but the first."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().to(device="cpu", copy=True) if is_first() else None


def whole_tensors(tensors: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    """Return `tensors` with each DTensor gathered to the CPU, one at a time; other processes get no DTensors."""
    gathered = {key: full_tensor(t) if isinstance(t, DTensor) else t for key, t in tensors.items()}
    return {key: tensor for key, tensor in gathered.items() if tensor is not None}


def summed(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the sum of a CPU tensor over all processes, on every process; the all-reduce runs on `device`."""
    if world_size() == 1:
        return tensor
    on_device = tensor.to(device)
    dist.all_reduce(on_device)
    return on_device.cpu()


def on_every_process(tensor: Tensor) -> Tensor:
    """Return the full tensor on every process, on its own device."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def laid_out_like(whole: Tensor, like: Tensor) -> Tensor:
    """Return `whole`, which every process has, with the placement of `like`. No communication."""
    if not isinstance(like, DTensor):
        return whole
    mesh = like.device_mesh
    replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(mesh, like.placements)


def gather_rows(rows: Tensor, places: Sequence[int]) -> Tensor | None:
    """Return the rows of all processes, sorted by place in the global batch; None on all processes but the first."""
    if world_size() > 1:
        pieces: list[tuple[Tensor, Sequence[int]]] | None = [(rows, places)] * world_size() if is_first() else None
        dist.gather_object((rows, places), pieces)
        if pieces is None:
            return None
        rows = torch.cat([piece for piece, _ in pieces])
        places = [place for _, some in pieces for place in some]
    if list(places) == sorted(places):
        return rows
    return rows[torch.tensor(places).argsort()]
