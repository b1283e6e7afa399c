"""From the pieces that each process holds to one whole tensor, in data order, and back.

With FSDP2, parameters, gradients and moments are DTensors: each process holds a shard. Whoever looks at them whole asks here.
All processes call these functions, in the same order; what they gather is kept by the first process alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


def world_size() -> int:
    """Number of processes that take part (1 without a process group)."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that keeps what is gathered, and writes."""
    return world_size() == 1 or dist.get_rank() == 0


def full_tensor(tensor: Tensor) -> Tensor | None:
    """A copy on the CPU of the whole of `tensor`, also where it is a shard of a distributed one; None on other processes."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().to(device="cpu", copy=True) if is_first() else None


def whole_tensors(tensors: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    """`tensors` with every distributed one gathered to the CPU, one at a time; on other processes those are left out."""
    gathered = {key: full_tensor(t) if isinstance(t, DTensor) else t for key, t in tensors.items()}
    return {key: tensor for key, tensor in gathered.items() if tensor is not None}


def summed(tensor: Tensor, device: torch.device) -> Tensor:
    """The sum over all processes of a tensor on the CPU, which each of them gets; it travels by way of `device`."""
    if world_size() == 1:
        return tensor
    on_device = tensor.to(device)
    dist.all_reduce(on_device)
    return on_device.cpu()


def on_every_process(tensor: Tensor) -> Tensor:
    """The whole of `tensor`, on the device it is on."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def laid_out_like(whole: Tensor, like: Tensor) -> Tensor:
    """`whole`, which every process has, spread over the processes as `like` is. Nothing is sent."""
    if not isinstance(like, DTensor):
        return whole
    mesh = like.device_mesh
    replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(mesh, like.placements)


def gather_rows(rows: Tensor, places: Sequence[int]) -> Tensor | None:
    """The rows of all processes, sorted by their places in the global batch; None on all processes but the first."""
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
