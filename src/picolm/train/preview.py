"""Describe the run of a configuration without training, for `pico train --dry-run`. Needs no data and no accelerator."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from picolm.capture import Taps
from picolm.data import open_source
from picolm.errors import DataError, PicoError
from picolm.models import find_model
from picolm.schema import dump, plain
from picolm.store.writer import surplus
from picolm.train import devices
from picolm.train.build import make_taps
from picolm.train.config import TrainConfig
from picolm.train.job import Plan
from picolm.train.optim import build_optimizers, schedule_remarks
from picolm.train.resources import require_blocks
from picolm.train.state import State


class Estimate(NamedTuple):
    """The estimated size of a run.

    tokens: in all steps. flops: floating point operations of all steps. disk_bytes: on disk when the run has ended.
    """

    parameters: int
    tokens: int
    flops: int
    disk_bytes: int


def preview(config: TrainConfig) -> str:
    """Return the resolved configuration, the estimates of its run and warnings, as text.

    Raises PicoError if the model is too large to be built.
    """
    config, model, moments, captured = _imagined(config)
    figures = _sizes(config, model, moments) | _saving(config, model, moments, captured)
    width = max(map(len, figures))
    lines = [f"{name:{width}}  {value}" for name, value in figures.items()]
    return dump(config) + "\n" + "\n".join(lines) + "\n" + "\n".join(_remarks(config))


def estimate(config: TrainConfig) -> Estimate:
    """Return the estimates of the run of `config` as numbers. Raises PicoError if the model is too large to be built."""
    config, model, moments, captured = _imagined(config)
    length = config.model.max_seq_len
    tokens = config.data.dataloader.batch_size * length * config.training.max_steps
    return Estimate(
        parameters=sum(p.numel() for p in model.parameters()),
        tokens=tokens,
        flops=model.flops_per_token(length) * tokens,
        disk_bytes=sum(_disk(config, model, moments, captured).values()),
    )


def _imagined(config: TrainConfig) -> tuple[TrainConfig, Any, int, int]:
    """Return (configuration resolved for this machine, model without values, bytes of moments, bytes of one capture)."""
    fabric = devices.resolve(config.training.fabric)
    config = config.model_copy(update={"training": config.training.model_copy(update={"fabric": fabric})})
    require_blocks(config.model)
    with FakeTensorMode():  # shapes and element types without values: no memory, no time
        model = find_model(config.model.model_type)(config.model)
        taps = make_taps(config, model)
        moments, outputs = _moments(config, model), _outputs(config, model, taps)
    return config, model, moments, _captured(config, taps, outputs)


def _sizes(config: TrainConfig, model: Any, moments: int) -> dict[str, str]:
    parameters = sum(p.numel() for p in model.parameters())
    roles = model.parameter_roles()
    embeddings = sum(p.numel() for name, p in model.named_parameters() if roles[name] == "embedding")
    tokens = config.data.dataloader.batch_size * config.model.max_seq_len
    steps = config.training.max_steps
    flops = model.flops_per_token(config.model.max_seq_len)
    return {
        "parameters": f"{parameters:,} ({parameters - embeddings:,} without embeddings)",
        "tokens per step": f"{tokens:,}",
        "tokens in all": f"{tokens * steps:,} in {steps:,} steps",
        "compute": f"{flops:,} FLOP per token, {flops * tokens * steps:.3g} FLOP in all",
        "memory": _memory(config, model, moments),
    }


def _memory(config: TrainConfig, model: Any, moments: int) -> str:
    """Return the estimated memory per device, as text: weights, gradients, moments, the snapshot that is being saved,
    and the activations of one micro-batch.

    Assumes that per token, each block keeps about 10 vectors of width d_model and 4 of its hidden width for backward.
    """
    weights = _bytes(config, model.parameters())
    optimization, fabric = config.training.optimization, config.training.fabric
    devices_in_all = fabric.num_devices * fabric.num_nodes
    rows = config.data.dataloader.batch_size // (optimization.gradient_accumulation_steps * devices_in_all)
    shape, least = config.model, 2 * weights + moments + (weights + moments)
    layers, width = (getattr(shape, name, None) for name in ("n_layers", "d_model"))
    if layers is None or width is None:
        return f"at least {rounded_bytes(least)} per device, without activations: {shape.model_type} does not state its sizes"
    per_token = layers * (10 * width + 4 * getattr(shape, "activation_hidden_dim", 4 * width))
    size = devices.compute_dtype(fabric.precision).itemsize
    return f"about {rounded_bytes(least + size * rows * shape.max_seq_len * per_token)} per device"


def _bytes(config: TrainConfig, tensors: Iterable[Tensor]) -> int:
    """Return the bytes of weights, gradients or moments in the precision of the run."""
    return devices.weight_dtype(config.training.fabric.precision).itemsize * sum(tensor.numel() for tensor in tensors)


def _moments(config: TrainConfig, model: Any) -> int:
    """Return the bytes of the optimizer state, measured after one update of the model without values."""
    optimizers = build_optimizers(model, model.parameter_roles(), config.training.optimization)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    return _bytes(config, State(model, optimizers).moments().values())


def _saving(config: TrainConfig, model: Any, moments: int, captured: int) -> dict[str, str]:
    steps, totals = Plan(config).saved_steps(), _disk(config, model, moments, captured)
    shown = steps if len(steps) <= 20 else [*steps[:12], "…", *steps[-5:]]
    return {
        "saved steps": f"{len(steps)}: {', '.join(map(str, shown))}",
        "disk": ", ".join(f"{kind} {rounded_bytes(value)}" for kind, value in totals.items())
        + f", in all about {rounded_bytes(sum(totals.values()))}",
    }


def _disk(config: TrainConfig, model: Any, moments: int, captured: int) -> dict[str, int]:
    """Return the bytes on disk when the run has ended, by kind."""
    plan = Plan(config)
    kept = _kept(config, plan, plan.saved_steps())
    return {
        "weights": _bytes(config, model.parameters()) * kept["weights"],
        "optimizer": moments * kept["optimizer"],
        "learning dynamics": captured * kept["dynamics"],
    }


def _kept(config: TrainConfig, plan: Plan, steps: list[int]) -> Counter[str]:
    """Return, for each part, the number of steps that still have it on disk at the end, after `checkpointing.keep`."""
    due = {step: plan.due(step) for step in steps}
    held = {step: {part for part in ("weights", "optimizer", "dynamics") if getattr(due[step], part)} for step in steps}
    held.get(0, set()).discard("optimizer")  # an optimizer has no state before its first update
    going = surplus(
        held, plain(config.checkpointing.keep), [step for step in steps if due[step].weights and due[step].optimizer]
    )
    return Counter(part for step, parts in held.items() for part in parts - going.get(step, set()))


def _captured(config: TrainConfig, taps: Taps, outputs: list[tuple[int, torch.dtype]]) -> int:
    """Return the bytes of the captures of one step; usually an upper bound if the held-out rows cannot be counted."""
    positions = taps.positions_at(0, config.model.max_seq_len)
    count = config.model.max_seq_len if positions is None else len(positions)
    per_row = sum((taps.dtype or dtype).itemsize * count * width for width, dtype in outputs) * taps.activations
    weights = (p for module in taps.modules.values() for p in module.parameters(recurse=False))
    gradients = _bytes(config, weights) * taps.gradients
    split_rows = (_rows(config, config.data.dataloader.batch_size), _held_out_rows(config))
    return sum(rows * per_row + gradients for rows in split_rows if rows)


def _outputs(config: TrainConfig, model: nn.Module, taps: Taps) -> list[tuple[int, torch.dtype]]:
    """Return (width, data type) of the outputs of the captured modules."""
    seen: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda *arguments: seen.append(arguments[-1])) for module in taps.modules.values()
    ]
    precision = config.training.fabric.precision
    mixed = precision.endswith("-mixed")
    with torch.no_grad(), AnyValue(), torch.autocast("cpu", devices.compute_dtype(precision), enabled=mixed):
        model(torch.zeros(1, 2, dtype=torch.long))
    for hook in hooks:
        hook.remove()
    return [(output.shape[-1], output.dtype if mixed else devices.weight_dtype(precision)) for output in seen]


class AnyValue(TorchDispatchMode):
    """A dispatch mode that returns 0 for the value of any tensor, so that models that branch on values can run.

    The outputs have the same shapes in every branch.
    """

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            return 0
        return function(*arguments, **(options or {}))


def _rows(config: TrainConfig, available: int) -> int:
    limit = config.checkpointing.learning_dynamics.max_rows
    return available if limit is None else min(available, limit)


def _held_out_rows(config: TrainConfig) -> int:
    """Return the number of rows of the `val` captures: counted if they are on disk, else max_rows or the batch size."""
    dynamics, own = config.checkpointing.learning_dynamics, config.data.dataset.name
    if dynamics.eval_data is None:
        return 0
    place = own if dynamics.eval_data == "auto" else dynamics.eval_data
    if not Path(place).expanduser().exists():
        return dynamics.max_rows or config.data.dataloader.batch_size
    try:
        return _rows(config, len(open_source(place, split="val")))
    except DataError:
        return 0


def _remarks(config: TrainConfig) -> list[str]:
    remarks = schedule_remarks(config.training.optimization, config.training.max_steps)
    try:
        devices.check_available(config.training.fabric)
    except PicoError as error:
        remarks.append(f"Not on this machine: {error}.")
    return remarks


def rounded_bytes(size: float) -> str:
    """Return a size as text such as `12.3 MB`, with three digits, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
