"""One digest for all weights of a step, from the digests of its tensors: with a manifest, no weight is read."""

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from picolm.address import Address
from picolm.store.checkpoint import Checkpoint
from picolm.store.tensors import tensor_bytes

if TYPE_CHECKING:
    from torch import Tensor


def weights_digest(tensors: Mapping[Address, "Tensor"]) -> str:
    """Return the sha-256 over the name and sha-256 of each tensor, sorted by name."""
    return _joint({address: hashlib.sha256(tensor_bytes(tensor)).hexdigest() for address, tensor in tensors.items()})


def stored_weights_digest(checkpoint: Checkpoint) -> str | None:
    """Return `weights_digest` of the weights in a checkpoint, from its records; None when it holds none."""
    addresses = checkpoint.select(kind="weights")
    return _joint({address: checkpoint.digest(address) for address in addresses}) if addresses else None


def _joint(digests: Mapping[Address, str]) -> str:
    lines = sorted(f"{address} {digest}\n" for address, digest in digests.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()
