"""The model of somebody else's loop: its own modules below wrappers, what its parts are called, and how to run it again."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from picolm import models
from picolm.address import Address
from picolm.capture.taps import matching
from picolm.errors import PicoError
from picolm.models import Anatomy
from picolm.readers.families import FAMILIES, QKV, anatomy_of

# What torch.compile, activation checkpointing and others put into the names of the modules that they wrap.
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module"}
_FLAT = {"FullyShardedDataParallel", "DeepSpeedEngine"}  # keep parameters in pieces that have no names of modules


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the user's own model inside DDP and torch.compile. Raises PicoError for wrappers that hide its parameters."""
    for module in model.modules():
        if type(module).__name__ in _FLAT:
            raise PicoError(
                f"{type(module).__name__} keeps parameters in pieces without names, and cannot be recorded; "
                "torch.distributed.fsdp.fully_shard (FSDP2) and DistributedDataParallel can"
            )
    inner: Any = model
    while hasattr(inner, "_orig_mod") or isinstance(inner, nn.parallel.DistributedDataParallel):
        inner = inner._orig_mod if hasattr(inner, "_orig_mod") else inner.module
    found: nn.Module = inner
    return found


def own_name(name: str) -> str:
    """Return the name of a module or parameter without those of wrappers: the name that it had before."""
    return ".".join(word for word in name.split(".") if word not in _WRAPPERS)


def anatomy(model: nn.Module) -> Anatomy:
    """Return what the parts of a model are called: from its own `anatomy()`, or from what is known of its family.

    Weights are recorded as the model holds them. So of a matrix of queries, keys and values in one (GPT-2, GPT-NeoX) the
    three are not parts, and what is stored as inputs x outputs (Conv1D) is not cut into heads.
    """
    if hasattr(model, "anatomy"):
        return models.anatomy_of(model)
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return Anatomy()
    stated = config.to_dict()
    family = FAMILIES.get(str(stated.get("model_type")))
    known = {own_name(name) for name, _ in model.named_modules()}
    if family is None or family.block.format(0) not in known:
        return anatomy_of(stated, None)
    found = anatomy_of(stated, family)
    kept = {role: part for role, part in found.parts.items() if not (family.fused and role in QKV)}
    cut = {role: part._replace(cut=None) if part.module in family.transposed else part for role, part in kept.items()}
    return replace(found, parts=cut)


def modules_to_capture(model: nn.Module, suffixes: Sequence[str] | None, layers: Any) -> dict[str, nn.Module]:
    """Return the modules to capture by name. suffixes: roles or ends of names; None for those that Pico captures in training.

    Where it is not known what those are called, all modules of the blocks that hold a matrix. Raises PicoError for a suffix that
    no module has, and for a model without any.
    """
    named = {own_name(name): module for name, module in model.named_modules() if name}
    known = anatomy(model)
    if suffixes is None:
        suffixes = known.captured()
    if not suffixes:
        inside = {name: module for name, module in named.items() if Address("", "", name).layer is not None}
        found = [name for name, module in inside.items() if _has_matrix(module)]
        suffixes = list(dict.fromkeys(str(Address("", "", name).suffix or name) for name in found))
    if not suffixes:
        raise PicoError("the model has no numbered blocks with matrices; say what to capture with layer_suffixes")
    chosen = matching(named, list(map(known.module, suffixes)), layers, "learning_dynamics.layer_suffixes")
    return {name: named[name] for name in chosen}


def _has_matrix(module: nn.Module) -> bool:
    own = module.parameters(recurse=False)
    return not isinstance(module, nn.Embedding) and any(parameter.ndim == 2 for parameter in own)


def is_compiled(model: nn.Module) -> bool:
    """Return whether a part of the model runs compiled: hooks inside of it would change what is compiled, or not be called."""
    return any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules())


class Call(NamedTuple):
    """One forward pass: its arguments, the states of the random generators before it, and its autocast."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]
    random: list[tuple[torch.device, Tensor]]
    autocast: Any

    @property
    def rows(self) -> Tensor | None:
        """The token ids that it was given: its first argument of integers in two dimensions."""
        given = (*self.arguments, *(self.options[key] for key in ("input_ids", "idx") if key in self.options))
        return token_ids(given)


def token_ids(given: Iterable[Any]) -> Tensor | None:
    """Return the first tensor of integers in two dimensions, None without one."""
    return next((x for x in given if isinstance(x, Tensor) and x.ndim == 2 and not x.is_floating_point()), None)


@contextmanager
def calls(model: nn.Module) -> Iterator[list[Call]]:
    """Yield a list that each forward pass of the model in the block is appended to. Nothing is computed or copied."""
    seen: list[Call] = []
    device = next(model.parameters()).device

    def before(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        seen.append(Call(arguments, options, _random(device), _autocast(device)))

    compiled = model._compiled_call_impl
    hook = None
    if compiled is None:
        hook = model.register_forward_pre_hook(before, with_kwargs=True)
    else:  # a hook would be compiled with it

        def call(*arguments: Any, **options: Any) -> Any:
            before(model, arguments, options)
            return compiled(*arguments, **options)

        model._compiled_call_impl = call
    try:
        yield seen
    finally:
        if hook is not None:
            hook.remove()
        else:
            model._compiled_call_impl = compiled


def _random(device: torch.device) -> list[tuple[torch.device, Tensor]]:
    states = [(torch.device("cpu"), torch.get_rng_state())]
    return states + ([(device, torch.cuda.get_rng_state(device))] if device.type == "cuda" else [])


def _autocast(device: torch.device) -> Any:
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, torch.get_autocast_dtype(device.type))


def again(model: nn.Module, seen: Sequence[Call]) -> None:
    """Run the forward passes again, not compiled and without gradients; random generators and buffers stay as they are."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = [device for call in seen[:1] for device, _ in call.random if device.type == "cuda"]
    with torch.random.fork_rng(devices), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for call in seen:
            for device, state in call.random:
                torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)
            with call.autocast:
                model(*call.arguments, **call.options)
        for buffer, held in buffers:
            buffer.copy_(held)
