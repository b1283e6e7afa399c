"""The machine: device, precision, threads, deterministic algorithms, and the peak speed of matrix products."""

import ctypes
import functools
import importlib.metadata
import logging
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

from picolm.errors import PicoError
from picolm.train.config import Fabric, Training
from picolm.train.processors import threads_for, usable_cpus

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
    cuBLAS workspace and no algorithm search in cuDNN; an operation without a deterministic kernel runs with a warning.
    """
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # would fill every new buffer; no kernel here reads one
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


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
    x, y = (torch.randn(size, size, dtype=torch.float32).to(device, dtype) for _ in range(2))
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
