"""The name of one tensor: kind / split / module. It is the same from the hook that recorded it to the axis of a plot."""

import re
from typing import NamedTuple

# The names that families of models give to their list of blocks: `layers.3` (Pico, Llama, GPT-NeoX), `transformer.h.3` (GPT-2),
# `blocks.3`, `encoder.layer.3` (BERT), `decoder.block.3` (T5). The first such list in a name counts.
_LAYER = re.compile(r"(?:^|\.)(?:layers?|blocks?|h)\.([0-9]{1,9})(?:\.(.+))?$")


class Address(NamedTuple):
    """Identity of one tensor of a step, e.g. `gradients/train/layers.3.attention.o_proj`.

    kind: `weights`, `gradients`, `activations`, or the name of an optimizer moment such as `exp_avg`.
    split: `train` or `val`; empty for what belongs to no batch (weights, moments).
    module: the dotted name of the module, without `.weight`; other parameters keep their last part (`….bias`).
    """

    kind: str
    split: str
    module: str

    def __str__(self) -> str:
        return "/".join(self)

    @classmethod
    def parse(cls, text: str) -> "Address":
        """The inverse of `str`. Raises ValueError when `text` is not kind/split/module."""
        parts = text.split("/")
        if len(parts) != 3:
            raise ValueError(f"{text!r} is not an address (kind/split/module)")
        return cls(*parts)

    @property
    def layer(self) -> int | None:
        """The index of the block that the module is, or lies in; None outside of the blocks."""
        match = _LAYER.search(self.module)
        return int(match[1]) if match else None

    @property
    def suffix(self) -> str:
        """The name of the module inside its block (`attention.o_proj`): empty for a block itself, the whole name outside."""
        match = _LAYER.search(self.module)
        return (match[2] or "") if match else self.module

    @property
    def stack(self) -> str:
        """The name of the list of blocks that the module lies in (`layers`, `encoder.layers`), empty outside of the blocks."""
        match = _LAYER.search(self.module)
        return self.module[: match.start(1) - 1] if match else ""


def has_suffix(module: str, suffix: str) -> bool:
    """Whether `suffix` names the end of `module` in whole words: `o_proj` and `attention.o_proj`, not `proj`."""
    return module == suffix or module.endswith("." + suffix)
