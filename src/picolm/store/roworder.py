"""The order of the rows of captured activations in the files of a pico-train run.

pico-train gathers the activations of each sub-batch with a transpose that is meant for several devices. On one device
it mixes rows and columns: the stored block S [b, H] holds the true block A [b, H] as A = S.reshape(H, b).T, so nothing
is lost. On several devices the rows are correct. So the configuration of a run is needed to read its activations.

Shapes: N rows, H width of an activation, b rows of a sub-batch.
"""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from picolm.errors import StoreError
from picolm.store.manifest import CONFIG

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("picolm")


class RowOrder:
    """The row order that a configuration implies. where: the run, for messages. Raises StoreError for wrong values."""

    def __init__(self, config: Mapping[str, Any], where: str):
        self.where = where
        self._known = bool(config)
        self._told = False
        devices = self._number(config, "training.fabric.num_nodes", 1) * self._number(
            config, "training.fabric.num_devices", 1
        )
        sub_batch = self._number(config, "checkpointing.learning_dynamics.batch_size", 8)
        self._sub_batch = sub_batch if devices == 1 else None

    @property
    def tag(self) -> str:
        """A name for the order. Raises StoreError when the order cannot be known."""
        if not self._known:
            raise StoreError(
                f"{self.where}: without {CONFIG} it is not known on how many devices the run was trained, and so not in "
                "which order its activations are stored; put that file there, with training.fabric.num_nodes and "
                "num_devices and checkpointing.learning_dynamics.batch_size in it"
            )
        return "in order" if self._sub_batch is None else f"mixed by {self._sub_batch}"

    def restore(self, stored_NH: "Tensor") -> "Tensor":
        """Return the rows [N, H] in their true order; log a warning the first time that they are reordered."""
        import torch

        if self.tag == "in order" or self._sub_batch is None:
            return stored_NH
        if stored_NH.ndim != 2:
            raise StoreError(f"{self.where}: activations of shape {list(stored_NH.shape)}; expected [rows, width]")
        if not self._told:
            log.warning(
                "%s was trained on one device, where pico-train mixes up the activations in sub-batches of %d rows; they are "
                "put in order while reading.", self.where, self._sub_batch,
            )  # fmt: skip
            self._told = True
        blocks = stored_NH.split(min(self._sub_batch, max(len(stored_NH), 1)))
        return torch.cat([block.reshape(block.shape[1], block.shape[0]).T for block in blocks])

    def _number(self, config: Mapping[str, Any], key: str, default: int) -> int:
        value = lookup(config, key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise StoreError(f"{self.where}: {key} is {value!r} in {CONFIG}; expected a whole number of at least 1")
        return value


def lookup(config: Mapping[str, Any], key: str, default: Any) -> Any:
    """Return the value of a dotted key of a configuration; `default` when it or a section above it is missing."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return default if value is None else value
