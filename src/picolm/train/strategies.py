"""How a model is spread over processes: strategies by name, each a function from `training.fabric` to what Fabric takes.

`auto` is one process, or DDP for several. DDP keeps the whole model on each process; FSDP2 keeps a shard of each tensor there,
as DTensors that know the whole they are part of, so that a gradient or a moment can still be looked at (see capture/gather.py).
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
    """What to hand to Fabric. Raises PicoError for a strategy that there is not, or that cannot do what a run promises."""
    name = fabric.strategy
    reason = REFUSED.get("deepspeed" if name.startswith("deepspeed") else name)
    if reason is not None:
        raise PicoError(f"training.fabric.strategy: {name} is not supported: {reason}")
    return STRATEGIES.get(name)(fabric)


@STRATEGIES.add("auto")
def auto(fabric: Fabric) -> str:
    """One process, or DDP where there are several."""
    return "auto"


@STRATEGIES.add("ddp")
def ddp(fabric: Fabric) -> str:
    """Each process has the whole model; gradients are averaged while the last micro-batch goes backward (Li et al. 2020)."""
    return "ddp"


@STRATEGIES.add("ddp_find_unused_parameters_true")
def ddp_unused(fabric: Fabric) -> str:
    """DDP for a model whose loss does not depend on all of its parameters at every step."""
    return "ddp_find_unused_parameters_true"


@STRATEGIES.add("fsdp2")
@STRATEGIES.add("model_parallel")
def fsdp2(fabric: Fabric) -> Strategy:
    """Each process has a shard of each tensor, and gathers a block's weights while it computes with them (Zhao et al. 2023)."""
    from lightning_fabric.strategies import ModelParallelStrategy

    processes = fabric.num_nodes * fabric.num_devices
    return ModelParallelStrategy(shard, data_parallel_size=processes, tensor_parallel_size=1)


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shard each block (each member of a list of modules), then what is left, as one group each."""
    from torch.distributed.fsdp import fully_shard

    data_parallel: Any = mesh["data_parallel"]
    for blocks in outermost_lists(model):
        for block in blocks:
            fully_shard(block, mesh=data_parallel)
    fully_shard(model, mesh=data_parallel)
    return model


def mark_forward(wrapped: Any, model: nn.Module, method: str) -> None:
    """Let `wrapped.method`, of `model` as Fabric wrapped it, do what a strategy does around `forward`."""
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    if isinstance(model, FSDPModule):
        register_fsdp_forward_method(model, method)
    else:
        wrapped.mark_forward_method(method)


def outermost_lists(module: nn.Module) -> list[nn.ModuleList]:
    """The lists of modules inside of `module` that are not inside of another one."""
    if isinstance(module, nn.ModuleList):
        return [module]
    return [found for child in module.children() for found in outermost_lists(child)]


def reshard(model: nn.Module) -> None:
    """Free the gathered weights that a forward pass without a backward pass leaves behind, so that shards are seen again."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def keeps_shards(fabric: Launched) -> bool:
    """Whether each process has a part of each tensor. Then gradients are averaged after every micro-batch: to keep whole
    ones until the last would take the memory that shards are to save.
    """
    from lightning_fabric.strategies import ModelParallelStrategy

    return isinstance(fabric.strategy, ModelParallelStrategy)
