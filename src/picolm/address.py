"""The address of a tensor: kind / split / module. Capture, storage and plots all use the same address."""

import re
from typing import NamedTuple

# Names of the list of blocks in different models: `layers.3` (Pico, Llama, GPT-NeoX), `transformer.h.3` (GPT-2),
# `blocks.3`, `encoder.layer.3` (BERT), `decoder.block.3` (T5). The first such list in a name counts.
_LAYER = re.compile(r"(?:^|\.)(?:layers?|blocks?|h)\.([0-9]{1,9})(?:\.(.+))?$")


class Address(NamedTuple):
    """The identity of a tensor within a step, for example `gradients/train/layers.3.attention.out`.

    kind: `weights`, `gradients`, `activations`, or the name of an optimizer moment such as `exp_avg`.
    split: `train` or `val`; empty for tensors that belong to no batch (weights, moments).
    module: the dotted name of the module, without `.weight`; other parameters keep their last part (`….bias`).
    """

    kind: str
    split: str
    module: str

    def __str__(self) -> str:
        return "/".join(self)

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Return the address with this text, the inverse of `str`. Raises ValueError if it is not kind/split/module."""
        parts = text.split("/")
        if len(parts) != 3:
            raise ValueError(f"{text!r} is not an address (kind/split/module)")
        return cls(*parts)

    @property
    def layer(self) -> int | None:
        """The index of the block that the module is, or is in; None outside the blocks."""
        match = _LAYER.search(self.module)
        return int(match[1]) if match else None

    @property
    def suffix(self) -> str:
        """The name of the module in its block (`attention.out`): empty for a block; the full name outside blocks."""
        match = _LAYER.search(self.module)
        return (match[2] or "") if match else self.module

    @property
    def stack(self) -> str:
        """The name of the list of blocks that contains the module (`layers`, `encoder.layers`); empty outside."""
        match = _LAYER.search(self.module)
        return self.module[: match.start(1) - 1] if match else ""


def has_suffix(module: str, suffix: str) -> bool:
    """Return whether `module` ends in `suffix` in whole words: `out` and `attention.out`, but not `t.out`."""
    return module == suffix or module.endswith("." + suffix)
