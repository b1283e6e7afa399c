"""What a configuration would do, without doing it: for `pico train --dry-run`. Needs no data and none of its devices."""

from typing import Any

import torch

from picolm.errors import PicoError
from picolm.models import MODELS
from picolm.schema import dump
from picolm.train import devices
from picolm.train.build import make_taps
from picolm.train.config import TrainConfig
from picolm.train.optim import OPTIMIZERS
from picolm.train.plan import Plan


def preview(config: TrainConfig) -> str:
    """The resolved configuration, and the figures of the run it describes, as text."""
    with torch.device("meta"):
        model = MODELS.get(config.model.model_type)(config.model)
    plan = Plan(config)
    figures = _sizes(config, model) | _saving(config, model, plan)
    width = max(map(len, figures))
    lines = [f"{name:{width}}  {value}" for name, value in figures.items()]
    return dump(config) + "\n" + "\n".join(lines) + "\n" + "\n".join(_remarks(config))


def _sizes(config: TrainConfig, model: Any) -> dict[str, str]:
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
        "memory": f"about {_gigabytes(_memory(config, model))} per device",
    }


def _memory(config: TrainConfig, model: Any) -> int:
    """Weights, gradients, moments, the snapshot that is being saved, and the activations of one micro-batch.

    An estimate: per token and layer, a block keeps about 10 vectors of width d_model and 4 of its hidden width for backward.
    """
    weights = 4 * sum(p.numel() for p in model.parameters())
    moments = _moments(config, model)
    optimization, fabric = config.training.optimization, config.training.fabric
    devices_in_all = fabric.num_devices * fabric.num_nodes
    rows = config.data.dataloader.batch_size // (optimization.gradient_accumulation_steps * devices_in_all)
    shape = config.model
    hidden = getattr(shape, "activation_hidden_dim", 4 * getattr(shape, "d_model", 0))
    per_token = getattr(shape, "n_layers", 0) * (10 * getattr(shape, "d_model", 0) + 4 * hidden)
    size = 2 if "16" in devices.resolve(fabric).precision else 4
    return 2 * weights + moments + (weights + moments) + size * rows * config.model.max_seq_len * per_token


def _moments(config: TrainConfig, model: Any) -> int:
    """Bytes of optimizer state: what the optimizer itself makes of parameters of these shapes."""
    name, momentum = config.training.optimization.optimizer, config.training.optimization.momentum
    roles = model.parameter_roles()
    per_role = {
        "adamw": {},
        "muon": {"matrix": 1},
        "sgd": dict.fromkeys(("matrix", "embedding", "norm"), int(bool(momentum))),
    }
    factors = per_role.get(name, {}) if name in OPTIMIZERS else {}
    return sum(4 * p.numel() * factors.get(roles[n], 2) for n, p in model.named_parameters())


def _saving(config: TrainConfig, model: Any, plan: Plan) -> dict[str, str]:
    steps = plan.saved_steps()
    captured = _captured(config, model)
    size = {"weights": 4 * sum(p.numel() for p in model.parameters()), "optimizer": _moments(config, model)}
    totals = {kind: size[kind] * sum(getattr(plan.due(step), kind) for step in steps) for kind in size}
    totals["learning dynamics"] = captured * sum(plan.due(step).dynamics for step in steps)
    shown = steps if len(steps) <= 20 else [*steps[:12], "…", *steps[-5:]]
    return {
        "saved steps": f"{len(steps)}: {', '.join(map(str, shown))}",
        "disk": ", ".join(f"{kind} {_gigabytes(value)}" for kind, value in totals.items())
        + f", in all about {_gigabytes(sum(totals.values()))}",
    }


def _captured(config: TrainConfig, model: Any) -> int:
    """Bytes of the captures of one step, at most: the `val` split may have fewer rows than max_rows."""
    taps, dynamics = make_taps(config, model), config.checkpointing.learning_dynamics
    splits = 1 + (dynamics.eval_data is not None)
    rows = min(dynamics.max_rows or config.data.dataloader.batch_size, config.data.dataloader.batch_size)
    positions = taps.positions_at(0, config.model.max_seq_len)
    count = config.model.max_seq_len if positions is None else len(positions)
    weights = [p for module in taps.modules.values() for p in module.parameters(recurse=False)]
    half = (
        "16" in devices.resolve(config.training.fabric).precision
        if dynamics.dtype == "auto"
        else "16" in dynamics.dtype
    )
    activations = sum(p.shape[0] for p in weights) * rows * count * (2 if half else 4) * taps.activations
    gradients = sum(4 * p.numel() for p in weights) * taps.gradients
    return splits * (activations + gradients)


def _remarks(config: TrainConfig) -> list[str]:
    try:
        devices.check_available(devices.resolve(config.training.fabric))
    except PicoError as error:
        return [f"Not on this machine: {error}."]
    return []


def _gigabytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
