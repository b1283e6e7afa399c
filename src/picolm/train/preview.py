"""Describe the run of a configuration without training, for `pico train --dry-run`. Needs no data and no accelerator."""

import weakref
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from picolm.capture import Taps
from picolm.data import open_source
from picolm.errors import DataError, PicoError
from picolm.models import find_model
from picolm.schema import dump, plain
from picolm.store.writer import surplus
from picolm.train import devices, noise
from picolm.train.build import make_taps
from picolm.train.config import TrainConfig
from picolm.train.job import Plan
from picolm.train.optim import build_optimizers, schedule_remarks
from picolm.train.resources import over_blocks, require_blocks
from picolm.train.state import State

PROGRAM_BYTES = 640_000_000  # resident before the first pass: Python, torch, Lightning, data, a tokenizer
UnknownShapes = (DataDependentOutputException, DynamicOutputShapeException)
SLACK = 1.15  # what the allocator holds, over what is alive at once


class Estimate(NamedTuple):
    """The estimated size of a run.

    tokens: in all steps. flops: floating point operations of all steps. disk_bytes: on disk when the run has ended.
    """

    parameters: int
    tokens: int
    flops: int
    disk_bytes: int


class Imagined(NamedTuple):
    """A run without values. config: resolved for this machine. model: on no device. In bytes: moments of the optimizer;
    captured: one capture. held_out: its rows of the `val` split.
    """

    config: TrainConfig
    model: Any
    moments: int
    captured: int
    held_out: int


def preview(config: TrainConfig) -> str:
    """Return the resolved configuration, the estimates of its run and warnings, as text.

    Raises PicoError if the model is too large to be built.
    """
    run = _imagined(config)
    figures = _sizes(run) | _saving(run)
    width = max(map(len, figures))
    lines = [f"{name:{width}}  {value}" for name, value in figures.items()]
    return dump(run.config) + "\n" + "\n".join(lines) + "\n" + "\n".join(_remarks(run.config))


def estimate(config: TrainConfig) -> Estimate:
    """Return the estimates of the run of `config` as numbers. Raises PicoError if the model is too large to be built."""
    run, tokens = _imagined(config), tokens_in_all(config)
    return Estimate(
        parameters=sum(p.numel() for p in run.model.parameters()),
        tokens=tokens,
        flops=run.model.flops_per_token(config.model.max_seq_len) * tokens,
        disk_bytes=sum(_disk(run).values()),
    )


def tokens_in_all(config: TrainConfig) -> int:
    """Return the number of target tokens in all steps of a run."""
    return config.data.dataloader.batch_size * config.model.max_seq_len * config.training.max_steps


def parameter_count(config: TrainConfig) -> int:
    """Return the number of parameters of a model, which takes no memory. Raises PicoError if it is too large to be built."""
    require_blocks(config.model)
    with torch.device("meta"):
        model = find_model(config.model.model_type)(config.model)
    return sum(parameter.numel() for parameter in model.parameters())


def _imagined(config: TrainConfig) -> Imagined:
    fabric = devices.resolve(config.training.fabric)
    config = config.model_copy(update={"training": config.training.model_copy(update={"fabric": fabric})})
    require_blocks(config.model)
    with FakeTensorMode():  # shapes and element types without values: no memory, no time
        model = find_model(config.model.model_type)(config.model)
        taps = make_taps(config, model)
        moments, outputs = _moments(config, model), _outputs(config, model, taps)
    held_out = _held_out_rows(config)
    return Imagined(config, model, moments, _captured(config, taps, outputs, held_out), held_out)


def _sizes(run: Imagined) -> dict[str, str]:
    config, model = run.config, run.model
    weights = _bytes(config, model.parameters())
    # weights, gradients, moments, the snapshot that is being saved, and the captures
    kept = 2 * weights + run.moments + (weights + run.moments) + run.captured
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
        "memory": _memory(run, kept),
    }


def _memory(run: Imagined, kept: float) -> str:
    passes = _of_a_pass(run)
    if passes is None:
        return f"more than {rounded_bytes(kept)}: what a pass takes depends on values"
    needed = kept + passes
    if run.config.training.fabric.accelerator != "cpu":
        return f"about {rounded_bytes(needed)} per device"
    of_all = f"about {rounded_bytes(needed + PROGRAM_BYTES)} per process"
    return f"{of_all}, {rounded_bytes(PROGRAM_BYTES)} of them for Python and its libraries"


def _of_a_pass(run: Imagined) -> float | None:
    """Return the bytes that the forward and backward passes of the largest micro-batch have allocated at once.

    The largest is one of the training on one device, or of a capture of held-out rows. Of more than three blocks they are
    extrapolated. None for a model whose loss cannot be computed without values.
    """
    config = run.config
    optimization, fabric = config.training.optimization, config.training.fabric
    parts = optimization.gradient_accumulation_steps * fabric.num_devices * fabric.num_nodes
    captured = min(config.checkpointing.learning_dynamics.batch_size, run.held_out)
    rows = max(config.data.dataloader.batch_size // parts, captured, 1)
    try:
        found = over_blocks(config.model, lambda shape: _counted(config, shape, rows), most=3)
    except UnknownShapes:
        return None
    return None if found is None else SLACK * found


def _counted(config: TrainConfig, shape: Any, rows: int) -> int:
    """Return the most bytes that the passes of so many rows have allocated at once, beside weights and gradients."""
    precision, length = config.training.fabric.precision, config.model.max_seq_len
    dtype, mixed = devices.compute_dtype(precision), precision.endswith("-mixed")
    with FakeTensorMode():
        model: Any = find_model(shape.model_type)(shape)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        with Alive() as alive, torch.autocast("cpu", dtype, enabled=mixed):
            drawn = noise.of_training(0, 0, range(rows), rows)
            model.loss(torch.zeros(rows, model.row_length(length), dtype=torch.long), drawn).nats.backward()
    return alive.most if mixed else alive.most * devices.weight_dtype(precision).itemsize // 4


def _forward(config: TrainConfig, model: nn.Module, tokens: int) -> Any:
    """Return the output of the model without values for a row of so many tokens, in the precision of the run."""
    precision = config.training.fabric.precision
    mixed = precision.endswith("-mixed")
    with AnyValue(), torch.autocast("cpu", devices.compute_dtype(precision), enabled=mixed):
        return model(torch.zeros(1, tokens, dtype=torch.long))


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


def _saving(run: Imagined) -> dict[str, str]:
    steps, totals = Plan(run.config).saved_steps(), _disk(run)
    shown = steps if len(steps) <= 20 else [*steps[:12], "…", *steps[-5:]]
    return {
        "saved steps": f"{len(steps)}: {', '.join(map(str, shown))}",
        "disk": ", ".join(f"{kind} {rounded_bytes(value)}" for kind, value in totals.items())
        + f", in all about {rounded_bytes(sum(totals.values()))}",
    }


def _disk(run: Imagined) -> dict[str, int]:
    """Return the bytes on disk when the run has ended, by kind."""
    plan = Plan(run.config)
    kept = _kept(run.config, plan, plan.saved_steps())
    return {
        "weights": _bytes(run.config, run.model.parameters()) * kept["weights"],
        "optimizer": run.moments * kept["optimizer"],
        "learning dynamics": run.captured * kept["dynamics"],
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


def _captured(config: TrainConfig, taps: Taps, outputs: list[tuple[int, torch.dtype]], held_out: int) -> int:
    """Return the bytes of the captures of one step; usually an upper bound if the held-out rows cannot be counted."""
    positions = taps.positions_at(0, config.model.max_seq_len)
    count = config.model.max_seq_len if positions is None else len(positions)
    per_row = sum((taps.dtype or dtype).itemsize * count * width for width, dtype in outputs) * taps.activations
    weights = (p for module in taps.modules.values() for p in module.parameters(recurse=False))
    gradients = _bytes(config, weights) * taps.gradients
    split_rows = (_rows(config, config.data.dataloader.batch_size), held_out)
    return sum(rows * per_row + gradients for rows in split_rows if rows)


def _outputs(config: TrainConfig, model: nn.Module, taps: Taps) -> list[tuple[int, torch.dtype]]:
    """Return (width, data type) of the outputs of the captured modules."""
    seen: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda *arguments: seen.append(arguments[-1])) for module in taps.modules.values()
    ]
    precision = config.training.fabric.precision
    mixed = precision.endswith("-mixed")
    with torch.no_grad():
        _forward(config, model, 2)
    for hook in hooks:
        hook.remove()
    return [(output.shape[-1], output.dtype if mixed else devices.weight_dtype(precision)) for output in seen]


class AnyValue(TorchDispatchMode):
    """A dispatch mode that returns 0 for the value of any tensor, so that models that branch on values can run, and takes half of
    what a condition chooses among. The outputs have the same shapes in every branch.
    """

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        aten = torch.ops.aten
        if function is aten._local_scalar_dense.default:
            return 0
        if function in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            indices = [index for given in arguments[1] for index in _places(given)]
            arguments = (arguments[0], indices, *arguments[2:])
        return function(*arguments, **(options or {}))


def _places(index: Tensor | None) -> list[Tensor | None]:
    """Return indices in place of a condition, one for each of its dimensions, of half of its places."""
    if index is None or index.dtype != torch.bool:
        return [index]
    return [index.new_zeros(max(1, index.numel() // 2), dtype=torch.long) for _ in range(index.ndim)]


class Alive(AnyValue):
    """Counts the bytes of the tensors without values that are made inside the block. most: that were there at once."""

    def __init__(self) -> None:
        super().__init__()
        self._known, self._bytes, self.most = set[int](), 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        found = super().__torch_dispatch__(function, types, arguments, options)
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._known:
                self._known.add(storage._cdata)
                self._bytes += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.most = max(self.most, self._bytes)
        return found

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._bytes -= size


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
