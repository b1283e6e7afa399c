"""How many layers and heads a model has, and how a projection is cut into heads.

The numbers are those that the configuration of the run states, checked against the shapes of its tensors. A number that the
configuration leaves out follows from the shapes or is an error; no default of any architecture takes its place.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from picolm.address import Address
from picolm.errors import PicoError

HEADS, KV_HEADS, SIZE, LAYERS = "attention_n_heads", "attention_n_kv_heads", "head_dim", "n_layers"
# The names of the same numbers in the configurations of transformers, which a checkpoint may carry as config.json.
ALSO = {HEADS: "num_attention_heads", KV_HEADS: "num_key_value_heads", LAYERS: "num_hidden_layers"}
COUNTS = {"q_proj": HEADS, "k_proj": KV_HEADS, "v_proj": KV_HEADS, "o_proj": HEADS}


class Cut(NamedTuple):
    """How the projections of an attention are cut: query heads, key-value heads, features of each head."""

    heads: int
    kv_heads: int
    size: int


def stated(model: Mapping[str, Any], key: str) -> int | None:
    """The number that a configuration states; None where it says nothing. Raises PicoError for what is no positive integer."""
    value = model.get(key)
    value = model.get(ALSO.get(key, key)) if value is None else value
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise PicoError(f"the configuration of the run says model.{key}: {value!r}; expected a number of 1 or more")
    return value


def layers_of(addresses: Iterable[Address], model: Mapping[str, Any]) -> tuple[list[int], str]:
    """(the layers that occur in `addresses`, in words those that the configuration promises beyond the last of them)."""
    there = sorted({address.layer for address in addresses if address.layer is not None})
    beyond, promised = (there[-1] + 1 if there else 0), stated(model, LAYERS) or 0
    first = f"layers.{beyond}" if promised == beyond + 1 else f"layers.{beyond} to layers.{promised - 1}"
    return there, f"{first} (model.{LAYERS} is {promised})" if promised > beyond else ""


def extent(checkpoint: Any, address: Address) -> int:
    """Heads x head size of a projection: rows of the weights of q, k and v, columns of o_proj and of activations."""
    by_column = address.kind == "activations" or address.module.endswith("o_proj")
    return int(checkpoint.shape(address)[-1 if by_column else 0])


def size_of(model: Mapping[str, Any], extents: Mapping[Address, tuple[str, int]], where: str) -> int:
    """The features of one head, from all that is known of it.

    extents: by projection, the key of its number of heads and its extent. Raises PicoError, naming keys, where nothing says how
    many heads there are, and where the configuration and the shapes contradict each other.
    """
    found: dict[int, str] = {}
    if (size := stated(model, SIZE)) is not None:
        found[size] = f"model.{SIZE}"
    for address, (key, features) in extents.items():
        count = stated(model, key)
        if count is not None and features % count:
            raise PicoError(
                f"{where}: model.{key} is {count}, but {address} has {features} features, no multiple of it"
            )
        if count is not None:
            found.setdefault(features // count, f"model.{key} = {count} and the {features} features of {address}")
    if not found:
        keys = " or ".join(dict.fromkeys(f"model.{key}" for key, _ in extents.values()))
        raise PicoError(
            f"{where}: how many heads there are is not known: its configuration has neither {keys} nor model.{SIZE}. "
            f"Add the key to training_config.yaml of the run, or leave components of heads out"
        )
    if len(found) > 1:
        said = "; ".join(f"{size} by {why}" for size, why in found.items())
        raise PicoError(f"{where}: the size of a head is ambiguous: {said}. Correct the configuration of the run")
    return next(iter(found))


def count_of(model: Mapping[str, Any], extents: Mapping[Address, tuple[str, int]], address: Address, where: str) -> int:
    """The number of heads of one of the projections in `extents`. Raises PicoError as `size_of` does."""
    size, features = size_of(model, extents, where), extents[address][1]
    if features % size:
        raise PicoError(f"{where}: {address} has {features} features, no multiple of the size of a head ({size})")
    return features // size
