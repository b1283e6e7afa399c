"""What is known of the optimizer at one step: its learning rate, and the second moments of Adam.

Pico's own runs store moments by address and state the rest in their configuration. Beside a model of transformers there may be a
file optimizer.safetensors with entries `exp_avg_sq.PARAMETER`, as in Pico's own steps.
"""

import hashlib
from collections.abc import Mapping

from torch import Tensor

from picolm.errors import StoreError
from picolm.readers.series import Series
from picolm.store import Checkpoint, Run
from picolm.store.manifest import OPTIMIZER
from picolm.train.config import Optimization
from picolm.train.optim import learning_rate
from picolm.train.sample import config_of

SECOND = "exp_avg_sq"


def stated_optimizer(run: Run, step: int) -> tuple[Optimization, float] | None:
    """Return what the configuration of a run says of its optimizer, and the learning rate of the update from `step` to the next
    one. None for a run that was trained by other code than Pico's.
    """
    if isinstance(run, Series) or "recorded" in run.config:
        return None
    training = config_of(run).training
    return training.optimization, learning_rate(step, training.optimization, training.max_steps)


def has_moments(checkpoint: Checkpoint) -> bool:
    """Return whether a step holds second moments of Adam."""
    return bool(checkpoint.select(kind=SECOND) or _of_file(checkpoint))


def second_moments(checkpoint: Checkpoint) -> dict[str, tuple[Tensor, int]]:
    """Return the second moment of each parameter with the number of updates in it, by the module of its address."""
    addresses = checkpoint.select(kind=SECOND)
    checkpoint.fetch(addresses)
    scalars: Mapping[str, float] = checkpoint.meta.get("optimizer_scalars", {})

    def updates(module: str) -> int:
        stated = (scalars.get(f"step.{name}") for name in (f"{module}.weight", module))
        return next((int(number) for number in stated if number is not None), checkpoint.step)

    found = {address.module: (checkpoint[address], updates(address.module)) for address in addresses}
    return found or {module: (tensor, checkpoint.step) for module, tensor in _of_file(checkpoint).items()}


def moments_identity(checkpoint: Checkpoint) -> list[str]:
    """Return digests that change with the moments of a step."""
    addresses = checkpoint.select(kind="exp_avg*")
    if addresses or OPTIMIZER not in checkpoint.files:
        return [checkpoint.digest(address) for address in addresses]
    return [hashlib.sha256(checkpoint.read(OPTIMIZER)).hexdigest()]


def _of_file(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the second moments in optimizer.safetensors by module; nothing without that file."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    if OPTIMIZER not in checkpoint.files:
        return {}
    try:
        entries = load(checkpoint.read(OPTIMIZER))
    except SafetensorError as error:
        raise StoreError(f"{checkpoint.path}/{OPTIMIZER}: cannot be read ({error})") from error
    prefix = f"{SECOND}."
    return {
        name.removeprefix(prefix).removesuffix(".weight"): tensor
        for name, tensor in entries.items()
        if name.startswith(prefix)
    }
