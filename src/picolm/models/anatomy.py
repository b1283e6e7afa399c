"""What the parts of a model are called and how heads are cut from them: one description, made by the architecture.

It is stored with each step as anatomy.json, so that whoever reads the tensors needs no code of the model. This file travels
with checkpoints: it imports nothing of this package.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

CAPTURED = (
    "attention.value",
    "attention.output",
    "mlp.output",
    "ssm.value",
    "ssm.output",
)  # what is captured and measured unless something is asked for


class Part(NamedTuple):
    """A module of every block, by its name in there, or one outside of the blocks, by its whole name.

    cut: whether the heads of its weight are as many as the query heads or the key-value heads, None where it has none.
    by: whether a head is some rows of the weight or some columns.
    """

    module: str
    cut: Literal["heads", "kv_heads"] | None = None
    by: Literal["rows", "columns"] = "rows"


@dataclass(frozen=True)
class Anatomy:
    """The parts of a model by their roles, and its numbers; None for what is not known.

    block: the name of a block, with braces for its number (`layers.{}`). parts: by role (embedding, final_norm, unembedding;
    attention.norm, .query, .key, .value, .output; mlp.output; ssm.norm, .gate, .value, .write, .read, .step, .output). keys: the
    configuration's names of the numbers, for messages. notes: sentences on what a measurement of the parts has to know.
    """

    layers: int | None = None
    width: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_size: int | None = None
    block: str = "layers.{}"
    parts: Mapping[str, Part] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise ValueError for a number that is none, or a block without a place for its number."""
        for number in ("layers", "width", "heads", "kv_heads", "head_size"):
            count(getattr(self, number), number)
        if self.block.count("{}") != 1 or self.block.count("{") != 1:
            raise ValueError(f"block: {self.block!r}; expected a name with {{}} for the number of the block")

    def captured(self) -> list[str]:
        """Return the roles that are captured and measured unless something is asked for: those of CAPTURED that it has."""
        return [role for role in CAPTURED if role in self.parts]

    def suffixes(self, asked: tuple[str, ...]) -> tuple[str, ...]:
        """Return the roles and names that are asked for: of CAPTURED, the default, those that this model has."""
        return tuple(self.captured()) or asked if asked == CAPTURED else asked

    def module(self, name: str) -> str:
        """Return the module that a role stands for; any other name as it is."""
        return self.parts[name].module if name in self.parts else name

    def key(self, number: str) -> str:
        """Return what the configuration calls a number."""
        return self.keys.get(number, number)

    def to_json(self) -> str:
        """Return the content of anatomy.json."""
        return json.dumps(asdict(self), indent=2) + "\n"


def count(value: Any, name: str) -> int | None:
    """Return a number that is stated, None where it is not. Raises ValueError for what is no positive integer."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"{name}: {value!r}; expected a number of 1 or more")
    return value
