"""The devices of a training: precision, threads, deterministic algorithms, the peak speed of matrix products, and strategies.

A strategy says how a model is distributed over processes. Each takes `training.fabric` and returns what Fabric needs.
`auto` is one process, or DDP for several. DDP keeps the complete model on each process. FSDP2 keeps a shard of each
tensor, as a DTensor from which the complete tensor can be gathered to read gradients and moments (capture/taps.py).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import logging
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from picolm.errors import PicoError
from picolm.registry import Registry
from picolm.train.resources import threads_for, usable_cpus

if TYPE_CHECKING:
    from lightning_fabric import Fabric as Launched
    from lightning_fabric.strategies import Strategy
    from torch.distributed.device_mesh import DeviceMesh

    from picolm.train.config import Fabric, Training


log = logging.getLogger("picolm")


def tune_allocator() -> bool:
    """Make glibc keep freed memory instead of returning it to the system. Returns whether this took effect.

    With the defaults, every large tensor is mapped and unmapped again, and page faults take up to half of a step on a
    CPU. Does nothing if the user has set MALLOC_* variables, or on another system or C library.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has no mallopt
        return False
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
    return all((mallopt(trim_threshold, 2**31 - 1), mallopt(top_pad, 2**26), mallopt(mmap_max, 0)))


def set_determinism(deterministic: bool) -> None:
    """Use only algorithms that give the same bits each time, or, if `deterministic` is false, any.

    CPU kernels are deterministic for a fixed number of threads. On CUDA this selects deterministic kernels, a fixed
    cuBLAS workspace and no algorithm search in cuDNN; an operation without a deterministic kernel runs with a warning
    (an error within `only_deterministic`).
    """
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # would fill every new buffer; no kernel here reads one
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def only_deterministic(enabled: bool) -> Iterator[None]:
    """Raise PicoError for operations without a deterministic kernel inside the block, instead of a warning.

    Attention needs this for its kernels to be deterministic at all: where torch only warns, it takes those that add in
    any order, in the forward pass (where the kernel is chosen) and in the backward pass.
    """
    if not enabled:
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        operation, found, _ = str(error).partition(" does not have a deterministic implementation")
        if not found:
            raise
        raise PicoError(
            f"training.deterministic is true, but {operation.splitlines()[-1]} has no deterministic kernel on this "
            "device; set training.deterministic=warn to compute with it (steps will not repeat bit for bit)"
        ) from error
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


def set_compiler(training: Training) -> None:
    """Prepare torch.compile for a run."""
    from torch._inductor import config

    # Timing would choose otherwise in another process, and the run would go on with other bits.
    if hasattr(config, "deterministic"):  # since torch 2.9
        config.deterministic = bool(training.deterministic)
    # Advice on how to round float32 products, which nobody asked for who asked for float32.
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")


def choose_threads(fabric: Fabric) -> None:
    """Limit the number of threads to the CPUs that this process may use, unless the user has set a number."""
    launched = "LOCAL_RANK" in os.environ or "SLURM_PROCID" in os.environ  # each process already has its own CPUs
    usable, default = usable_cpus(), torch.get_num_threads()
    threads = threads_for(usable, 1 if launched else fabric.num_devices, default)
    if threads == default:
        return
    torch.set_num_threads(threads)
    if fabric.num_devices > 1:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # the processes that Fabric starts inherit it
    log.info(
        "Computing with %d thread(s) per process, not %d: this process may use %.3g CPUs. OMP_NUM_THREADS sets another number.",
        threads, default, usable,
    )  # fmt: skip


def resolve(fabric: Fabric) -> Fabric:
    """Return `fabric` with `auto` for accelerator and precision replaced by the best choice on this machine."""
    accelerator = fabric.accelerator
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    precision = fabric.precision
    if precision == "auto":
        precision = "bf16-mixed" if _native_bfloat16(accelerator) else "32-true"
    return fabric.model_copy(update={"accelerator": accelerator, "precision": precision})


def check_available(fabric: Fabric) -> None:
    """Raise PicoError if this machine does not have the accelerator, or the number of devices, that `fabric` names."""
    name = "cuda" if fabric.accelerator == "gpu" and not torch.backends.mps.is_available() else fabric.accelerator
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if name not in counts:
        return
    if counts[name] == 0:
        raise PicoError(
            f"training.fabric.accelerator is {fabric.accelerator}, but this machine has no {name.upper()} device; "
            "set training.fabric.accelerator=auto (or cpu)"
        )
    if fabric.num_devices > counts[name]:
        raise PicoError(
            f"training.fabric.num_devices is {fabric.num_devices}, but this machine has {counts[name]} {name} device(s)"
        )


def _native_bfloat16(accelerator: str) -> bool:
    if accelerator in ("cuda", "gpu"):
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if accelerator != "cpu" or not Path("/proc/cpuinfo").exists():
        return False
    flags = set(Path("/proc/cpuinfo").read_text().split())
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


@functools.cache
def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measure a large matrix product. Returns its FLOP/s, to compare the speed of models with; cached.

    Takes about 0.1 s on a CPU.
    """
    size = 1024 if device.type == "cpu" else 8192
    x, y = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = [_timed_product(x, y) for _ in range(6)]
    return 2 * size**3 / statistics.median(seconds[1:])


def _timed_product(x: torch.Tensor, y: torch.Tensor) -> float:
    synchronize(x.device)
    start = time.perf_counter()
    x @ y
    synchronize(x.device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work (on a CPU there is none)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def compute_dtype(precision: str) -> torch.dtype:
    """Return the data type in which `precision` multiplies matrices."""
    named = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
    return next((dtype for prefix, dtype in named.items() if precision.startswith(prefix)), torch.float32)


def weight_dtype(precision: str) -> torch.dtype:
    """Return the data type in which `precision` stores weights, gradients and optimizer moments."""
    return torch.float32 if precision.endswith("-mixed") else compute_dtype(precision)


def hardware() -> dict[str, object]:
    """Return the description of this machine for environment.json: platform, CPU, number of threads, GPUs."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"platform": platform.platform(), "cpu": cpu, "threads": torch.get_num_threads(), "gpus": gpus}


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that affect the results, by name."""
    names = ("picolm", "torch", "lightning-fabric", "tokenizers", "safetensors", "pyarrow", "numpy")
    return {name: importlib.metadata.version(name) for name in names}


def want_compile(training: Training, device: torch.device) -> bool:
    """Return whether to compile the loss. `auto` means on CUDA only, where compiling saves time even in a short run."""
    return device.type == "cuda" if training.compile == "auto" else training.compile


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
