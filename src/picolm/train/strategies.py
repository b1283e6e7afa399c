"""Strategies: how a model is distributed over processes. Each takes `training.fabric` and returns what Fabric needs.

`auto` is one process, or DDP for several. DDP keeps the complete model on each process. FSDP2 keeps a shard of each
tensor, as a DTensor from which the complete tensor can be gathered to read gradients and moments (capture/gather.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from picolm.errors import PicoError
from picolm.registry import Registry

if TYPE_CHECKING:
    from lightning_fabric import Fabric as Launched
    from lightning_fabric.strategies import Strategy
    from torch.distributed.device_mesh import DeviceMesh

    from picolm.train.config import Fabric

STRATEGIES: Registry[Callable[[Fabric], Strategy | str]] = Registry("training.fabric.strategy")

NO_MODULES = (
    "it hides parameters in flat buffers, in which the gradients and the optimizer state of one module cannot be found"
)
NO_LAUNCH = "its processes cannot be started from the command line"
REFUSED = {
    "fsdp": f"{NO_MODULES}; use fsdp2",
    "fsdp_cpu_offload": f"{NO_MODULES}; use fsdp2",
    "dp": "it splits batches inside of one process, where their order is lost; use ddp",
    "ddp_spawn": f"{NO_LAUNCH}; use ddp",
    "ddp_fork": f"{NO_LAUNCH}; use ddp",
    "ddp_notebook": f"{NO_LAUNCH}; use ddp",
    "deepspeed": "its engine owns the optimizer step and the gradients, which this loop reads and checks; use fsdp2",
}


def make_strategy(fabric: Fabric) -> Strategy | str:
    """Return the strategy to pass to Fabric. Raises PicoError if it is unknown or not supported (see `REFUSED`)."""
    name = fabric.strategy
    reason = REFUSED.get("deepspeed" if name.startswith("deepspeed") else name)
    if reason is not None:
        raise PicoError(f"training.fabric.strategy: {name} is not supported: {reason}")
    return STRATEGIES.get(name)(fabric)


@STRATEGIES.add("auto")
def auto(fabric: Fabric) -> str:
    """Return Fabric's choice: one process, or DDP if there are several."""
    return "auto"


@STRATEGIES.add("ddp")
def ddp(fabric: Fabric) -> str:
    """Return DDP (Li et al. 2020): each process keeps the complete model, and gradients are averaged over processes
    in the backward pass of the last micro-batch.
    """
    return "ddp"


@STRATEGIES.add("ddp_find_unused_parameters_true")
def ddp_unused(fabric: Fabric) -> str:
    """Return DDP for models whose loss does not depend on all of their parameters at every step."""
    return "ddp_find_unused_parameters_true"


@STRATEGIES.add("fsdp2")
@STRATEGIES.add("model_parallel")
def fsdp2(fabric: Fabric) -> Strategy:
    """Return FSDP2 (Zhao et al. 2023): each process keeps a shard of each tensor, and gathers the weights of a block
    while the block computes.
    """
    from lightning_fabric.strategies import ModelParallelStrategy

    processes = fabric.num_nodes * fabric.num_devices
    return ModelParallelStrategy(shard, data_parallel_size=processes, tensor_parallel_size=1)


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shard each block (each member of a module list) as one group, then the rest as another. Returns the model."""
    from torch.distributed.fsdp import fully_shard

    data_parallel: Any = mesh["data_parallel"]
    for blocks in outermost_lists(model):
        for block in blocks:
            fully_shard(block, mesh=data_parallel)
    fully_shard(model, mesh=data_parallel)
    return model


def mark_forward(wrapped: Any, model: nn.Module, method: str) -> None:
    """Make the strategy treat a method of `model` like `forward`. wrapped: `model`, as wrapped by Fabric."""
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    if isinstance(model, FSDPModule):
        register_fsdp_forward_method(model, method)
    else:
        wrapped.mark_forward_method(method)


def outermost_lists(module: nn.Module) -> list[nn.ModuleList]:
    """Return the module lists inside `module` that are not inside another module list."""
    if isinstance(module, nn.ModuleList):
        return [module]
    return [found for child in module.children() for found in outermost_lists(child)]


def reshard(model: nn.Module) -> None:
    """Free the gathered weights that remain after a forward pass without a backward pass; parameters are shards again."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def keeps_shards(fabric: Launched) -> bool:
    """Return whether each process holds only a shard of each tensor.

    Gradients are then averaged after every micro-batch: keeping complete gradients until the last one would take the
    memory that sharding saves.
    """
    from lightning_fabric.strategies import ModelParallelStrategy

    return isinstance(fabric.strategy, ModelParallelStrategy)
