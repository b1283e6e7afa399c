"""Optimizers and learning rate schedules.

An optimizer is a function from named parameters to the torch optimizers that update them. A schedule is a function from
the step to a fraction of the peak learning rate. The model states which parameters are matrices, embeddings and norms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from picolm.capture.taps import laid_out_like, on_every_process
from picolm.errors import PicoError
from picolm.registry import Registry

if TYPE_CHECKING:
    from picolm.train.config import Optimization

Shape = Callable[[int, int, int, int], float]  # (step, warm-up steps, total steps, decay steps) -> fraction of the peak


class Named(NamedTuple):
    """A parameter, its name, and its role: `matrix` (of a block), `embedding`, `norm` or `dynamics` (never decayed)."""

    name: str
    parameter: nn.Parameter
    role: str


OPTIMIZERS: Registry[Callable[[list[Named], Optimization], list[torch.optim.Optimizer]]] = Registry("optimizer")
SCHEDULES: Registry[Shape] = Registry("schedule")


def learning_rate(step: int, optimization: Optimization, max_steps: int, peak: float | None = None) -> float:
    """Return the learning rate of the update from `step` to `step + 1`: the factor of the schedule times `peak`.

    In the warm-up the rate is peak (step + 1) / warm-up steps: not 0 at the first update, the peak at the last one.
    peak: the peak rate of a parameter group (default: `lr` of the configuration).
    """
    if peak is None:
        peak = optimization.lr
    warmup = optimization.lr_warmup_steps
    decay = optimization.lr_decay_steps or max(1, max_steps // 10)
    warm = min(1.0, (step + 1) / warmup) if warmup else 1.0
    shape = SCHEDULES.get(optimization.lr_scheduler)(step, warmup, max_steps, decay) if step >= warmup else 1.0
    floor = optimization.lr_min_ratio
    return peak * warm * (floor + (1 - floor) * shape)


def schedule_remarks(optimization: Optimization, max_steps: int) -> list[str]:
    """Return warnings about a schedule that does not fit a run of `max_steps` steps, with the values to set instead."""
    key, warmup, decay = "training.optimization.", optimization.lr_warmup_steps, optimization.lr_decay_steps
    if max_steps and warmup >= max_steps:
        last = learning_rate(max_steps - 1, optimization, max_steps)
        return [
            f"{key}lr_warmup_steps is {warmup} and training.max_steps {max_steps}: the warm-up does not end before the run, "
            f"so nothing follows it, and the last update has a learning rate of {last:.3g} (lr is {optimization.lr:.3g}). "
            f"Set {key}lr_warmup_steps to {max_steps // 10} or so."
        ]
    if optimization.lr_scheduler != "wsd":
        ignored = (
            f"{key}lr_decay_steps is {decay}, which only the schedule wsd reads; {optimization.lr_scheduler} does not."
        )
        return [ignored] if decay is not None and optimization.lr_scheduler in SCHEDULES else []
    decay = decay or max(1, max_steps // 10)
    if max_steps and warmup + decay > max_steps:
        return [
            f"{key}lr_warmup_steps ({warmup}) and the decay of wsd (lr_decay_steps, {decay}) overlap in a run of {max_steps} "
            f"steps: after the warm-up the learning rate falls from {optimization.lr:.3g} to "
            f"{learning_rate(warmup, optimization, max_steps):.3g} at once. Let them be {max_steps} together at most."
        ]
    return []


@SCHEDULES.add("linear_with_warmup")
def linear_with_warmup(step: int, warmup: int, total: int, decay: int) -> float:
    """Return a fraction of the peak that falls linearly from 1 at the end of the warm-up to 0 at the last step."""
    return max(0.0, (total - step) / max(1, total - warmup))


@SCHEDULES.add("cosine")
def cosine(step: int, warmup: int, total: int, decay: int) -> float:
    """Return a fraction of the peak that falls from 1 after the warm-up to 0 at the last step, along half a cosine.

    Loshchilov and Hutter 2017.
    """
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


@SCHEDULES.add("wsd")
def wsd(step: int, warmup: int, total: int, decay: int) -> float:
    """Return a fraction of the peak that is 1 until `decay` steps before the end and then falls linearly to 0.

    Warm-up, stable, decay (Hu et al. 2024).
    """
    return min(1.0, max(0.0, (total - step) / decay))


@SCHEDULES.add("constant")
def constant(step: int, warmup: int, total: int, decay: int) -> float:
    """Return 1: the learning rate stays at the peak after the warm-up."""
    return 1.0


def build_optimizers(
    model: nn.Module, roles: dict[str, str], optimization: Optimization
) -> list[torch.optim.Optimizer]:
    """Build the configured optimizers for the parameters of `model`. Returns a list of torch optimizers.

    roles: the role of each parameter, by name. Raises PicoError if the optimizer function returns anything else, or
    gives a parameter to two optimizers.
    """
    parameters = [Named(name, parameter, roles[name]) for name, parameter in model.named_parameters()]
    optimizers = OPTIMIZERS.get(optimization.optimizer)(parameters, optimization)
    where = f"training.optimization.optimizer: {optimization.optimizer}"
    if not isinstance(optimizers, list) or not all(isinstance(each, torch.optim.Optimizer) for each in optimizers):
        raise PicoError(f"{where} returned {_type_names(optimizers)}; return a list of torch optimizers")
    owned = [id(parameter) for optimizer in optimizers for parameter in _parameters(optimizer)]
    twice = [named.name for named in parameters if owned.count(id(named.parameter)) > 1]
    if twice:
        raise PicoError(f"{where} gives {twice[0]} to two optimizers; give each parameter to one")
    return optimizers


def left_out(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> list[str]:
    """Return the names of the parameters that belong to no optimizer and so keep their values."""
    owned = {id(parameter) for optimizer in optimizers for parameter in _parameters(optimizer)}
    return [name for name, parameter in model.named_parameters() if id(parameter) not in owned]


class OwnRates:
    """The peak learning rates of the parameter groups, as set by the optimizers; the schedule multiplies them.

    names: the `name` of each group if all groups have different names, else their numbers. A group without `lr` gets
    `default`. Groups whose `lr` is None are not included: their optimizer chooses the rate.
    """

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer], default: float):
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self._groups = [group for group in groups if group.setdefault("lr", default) is not None]
        given = [str(group.get("name", "")) for group in self._groups]
        unique = all(given) and len(set(given)) == len(given)
        self.names = given if unique else [str(number) for number in range(len(given))]
        self.peaks = [float(group["lr"]) for group in self._groups]

    def set(self, rates: Iterable[float]) -> None:
        """Set the learning rates for the next update, one per group."""
        for group, rate in zip(self._groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):  # in place, because a compiled or CUDA-graph step reads this tensor
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _type_names(value: Any) -> str:
    inside = f" of {', '.join(type(each).__name__ for each in value)}" if isinstance(value, list | tuple) else ""
    return type(value).__name__ + inside


def decay_groups(parameters: Iterable[Named], optimization: Optimization) -> list[dict[str, Any]]:
    """Return up to two parameter groups: parameters with weight decay, and parameters without."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for named in parameters:
        everything = optimization.decay_norms_and_embeddings and named.role != "dynamics"
        groups[named.role == "matrix" or everything].append(named.parameter)
    decays = ((groups[True], optimization.weight_decay), (groups[False], 0.0))
    return [{"params": parameters, "weight_decay": decay} for parameters, decay in decays if parameters]


@OPTIMIZERS.add("adamw")
def adamw(parameters: list[Named], optimization: Optimization) -> list[torch.optim.Optimizer]:
    """Return AdamW (Loshchilov and Hutter 2019), with a fused kernel on the CPU and on CUDA."""
    fused = all(named.parameter.device.type in ("cpu", "cuda") for named in parameters)
    groups = decay_groups(parameters, optimization)
    return [torch.optim.AdamW(groups, lr=optimization.lr, betas=optimization.betas, eps=optimization.eps, fused=fused)]


@OPTIMIZERS.add("sgd")
def sgd(parameters: list[Named], optimization: Optimization) -> list[torch.optim.Optimizer]:
    """Return stochastic gradient descent, with momentum if it is configured."""
    groups = decay_groups(parameters, optimization)
    return [torch.optim.SGD(groups, lr=optimization.lr, momentum=optimization.momentum or 0.0)]


@OPTIMIZERS.add("muon")
def muon(parameters: list[Named], optimization: Optimization) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the blocks, and AdamW for all other parameters."""
    matrices = [named.parameter for named in parameters if named.role == "matrix"]
    rest = [named for named in parameters if named.role != "matrix"]
    momentum = 0.95 if optimization.momentum is None else optimization.momentum
    first = Muon(matrices, lr=optimization.lr, momentum=momentum, weight_decay=optimization.weight_decay)
    return [first, *(adamw(rest, optimization) if rest else ())]


class Muon(torch.optim.Optimizer):
    """The Muon optimizer: Nesterov momentum with an orthogonalized update (Jordan et al. 2024), for matrices only.

    The update of an m x n matrix is scaled by 0.2 sqrt(max(m, n)). It then has the size of an AdamW update, so both can
    use the same learning rate (Liu et al. 2025, "Muon is scalable for LLM training").
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, lr: float, momentum: float, weight_decay: float):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient once. Returns the loss of `closure`, if one is given."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        nesterov = gradient.lerp(buffer, group["momentum"])
        # Every process computes the update of the complete matrix: single shards have other singular vectors.
        direction = laid_out_like(orthogonalize(on_every_process(nesterov)), parameter)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(direction, alpha=-group["lr"] * 0.2 * math.sqrt(max(parameter.shape)))


def orthogonalize(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Return `matrix` with singular values close to 1 (between 0.7 and 1.2), by a quintic Newton-Schulz iteration.

    The coefficients of Jordan et al. 2024 make small singular values grow fast, rather than converge to 1 exactly.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (wide.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T
