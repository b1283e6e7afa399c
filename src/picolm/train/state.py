"""The training state at step n: weights, optimizer moments and a few counters. All else is a function of the step.

The state of random generators is not part of it: each step uses generators derived from (seed, step).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_parameter_registration_hook

from picolm.address import Address
from picolm.capture.gather import laid_out_like, whole_tensors
from picolm.errors import PicoError
from picolm.models import MODELS
from picolm.store import Checkpoint
from picolm.train.meters import Meters


@dataclass
class State:
    """The state after `step` updates. `model` and `optimizers` are not wrapped by Fabric.

    Methods return complete tensors, never shards, for any number of processes. All processes must call `weights` and
    `moments` together; if the model is sharded, only the first process receives the tensors.
    """

    model: Any
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    skipped_updates: int = 0
    skipped_in_a_row: int = 0
    meters: Meters = field(default_factory=Meters)
    own_rates: bool = True  # False for runs of earlier versions: every parameter group had the rate of the schedule

    def weights(self) -> dict[Address, Tensor]:
        """Return the parameters and persistent buffers by address."""
        return whole_tensors({weight_address(name): tensor for name, tensor in self.model.state_dict().items()})

    def moments(self) -> dict[Address, Tensor]:
        """Return the optimizer state of each parameter by address, except for scalars (see `meta`)."""
        held = {
            Address(kind, "", weight_address(name).module): value
            for name, kind, value in self._optimizer_entries()
            if value.ndim
        }
        return whole_tensors(held)

    def meta(self) -> dict[str, Any]:
        """Return the counters and the optimizer scalars as JSON values, for `restore`."""
        scalars = {f"{kind}.{name}": value.item() for name, kind, value in self._optimizer_entries() if not value.ndim}
        return {
            "step": self.step,
            "skipped_updates": self.skipped_updates,
            "skipped_in_a_row": self.skipped_in_a_row,
            "optimizer_scalars": scalars,
            "meters": self.meters.meta(),
            "own_rates": self.own_rates,
        }

    def restore(self, tensors: Mapping[Address, Tensor], meta: Mapping[str, Any]) -> None:
        """Load the state of a checkpoint. Raises PicoError if its tensors do not fit this model or its optimizers."""
        self.restore_weights(tensors)
        self._restore_moments(tensors, meta["optimizer_scalars"])
        self.step = meta["step"]
        self.skipped_updates = meta["skipped_updates"]
        self.skipped_in_a_row = meta["skipped_in_a_row"]
        self.meters.restore(meta["meters"])
        self.own_rates = meta.get("own_rates", False)

    def restore_weights(self, tensors: Mapping[Address, Tensor]) -> None:
        """Load only the weights of a checkpoint. Raises PicoError if they do not fit this model."""
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                whole = _fitting(tensors, weight_address(name), tensor.shape).to(tensor.device, tensor.dtype)
                tensor.copy_(laid_out_like(whole, tensor))

    def _restore_moments(self, tensors: Mapping[Address, Tensor], scalars: Mapping[str, float]) -> None:
        held: dict[str, dict[str, Tensor]] = {}
        for key, value in scalars.items():
            kind, _, name = key.partition(".")
            held.setdefault(name, {})[kind] = torch.tensor(value, dtype=torch.float32)
        names = {weight_address(name).module: name for name, _ in self.model.named_parameters()}
        for address in tensors:
            if address.kind != "weights" and not address.split and address.module in names:
                held.setdefault(names[address.module], {})[address.kind] = tensors[address]
        optimizer_of = {p: o for o in self.optimizers for group in o.param_groups for p in group["params"]}
        for name, parameter in self.model.named_parameters():
            if name in held:
                if parameter not in optimizer_of:
                    raise PicoError(
                        f"the checkpoint holds {', '.join(held[name])} of {name}, a parameter that no optimizer has now: "
                        "it was made with another optimizer; choose another checkpointing.run_name"
                    )
                state = {kind: value.to(parameter.device, copy=True) for kind, value in held[name].items()}
                optimizer_of[parameter].state[parameter] = {
                    kind: laid_out_like(value, parameter) if value.ndim else value for kind, value in state.items()
                }

    def _optimizer_entries(self) -> list[tuple[str, str, Tensor]]:
        """Return (parameter name, kind, value) of every tensor in the optimizer state, in the order of the parameters."""
        held = {parameter: state for optimizer in self.optimizers for parameter, state in optimizer.state.items()}
        return [
            (name, kind, value)
            for name, parameter in self.model.named_parameters()
            for kind, value in held.get(parameter, {}).items()
            if isinstance(value, Tensor)
        ]


def outline(config: Any, most: int, where: str) -> Any:
    """Return the model of `config` on the meta device, where it takes no memory for any size in the configuration.

    most: the number of stored tensors. where: the checkpoint, for messages. Raises PicoError if the model has clearly
    more tensors than `most`, or cannot be built.
    """
    registered = 0

    def count(module: torch.nn.Module, name: str, parameter: Any) -> None:
        nonlocal registered
        registered += 1
        if registered > 2 * most + 100:  # tied parameters are registered more than once
            raise PicoError(
                f"{where}: the configuration describes a model of more tensors than the {most} that there are"
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            return MODELS.get(config.model_type)(config)
    except (RuntimeError, ValueError, TypeError, OverflowError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PicoError(f"{where}: the model of the configuration cannot be built: {reason}") from error
    finally:
        hook.remove()


def check_sizes(config: Any, checkpoint: Checkpoint) -> list[str]:
    """Compare the shapes of the model of `config` with a checkpoint. Returns the names in the state_dict of the model.

    Reads no weights and takes no memory for the model. Raises PicoError if a stored tensor has another shape.
    """
    stored = checkpoint.select(kind="weights")
    entries = outline(config, len(stored), str(checkpoint.path)).state_dict()
    for name, shape in ((name, tuple(entry.shape)) for name, entry in entries.items()):
        address = weight_address(name)
        if address in stored and shape != checkpoint.shape(address):
            raise PicoError(
                f"{checkpoint.path}: {name} is stored as {list(checkpoint.shape(address))}; the model section of the "
                f"configuration describes {list(shape)}"
            )
    return list(entries)


def weight_address(parameter_name: str) -> Address:
    """Return the address of a parameter: the name of its module, plus the parameter's own name unless that is `weight`."""
    return Address("weights", "", parameter_name.removesuffix(".weight"))


def _fitting(tensors: Mapping[Address, Tensor], address: Address, shape: torch.Size) -> Tensor:
    if address not in tensors:
        raise PicoError(f"the checkpoint does not hold {address}: it was made by another model")
    if tensors[address].shape != shape:
        raise PicoError(
            f"{address} has shape {tuple(tensors[address].shape)} in the checkpoint and {tuple(shape)} in this model; "
            "use the model section of the run's training_config.yaml, or another checkpointing.run_name"
        )
    return tensors[address]
