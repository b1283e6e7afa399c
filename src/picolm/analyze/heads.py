"""The numbers of layers and heads of a model, and how its projections are split into heads.

The numbers come from the anatomy of the step and are checked against the shapes of its tensors. A number that the
anatomy does not have is derived from the shapes or is an error; no default of any architecture is assumed.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from picolm.address import Address
from picolm.errors import PicoError
from picolm.models.anatomy import Anatomy, Part
from picolm.models.decoder import anatomy_of
from picolm.trusted import parse_json

FILE = "anatomy.json"


class Cut(NamedTuple):
    """How attention projections are split: number of query heads, of key-value heads, features of each head."""

    heads: int
    kv_heads: int
    size: int


def read_anatomy(checkpoint: Any, section: Mapping[str, Any], where: str) -> Anatomy:
    """Return the anatomy that is stored with a step; without one, the anatomy that the run's configuration states.

    section: the `model` section of the configuration; config.json of the step supplies what it leaves out. Raises
    PicoError.
    """
    if FILE in checkpoint.files:
        return parse_json(checkpoint.read(FILE), f"{FILE} of {where}", Anatomy)
    known = stated_anatomy(section, where)
    if None not in (known.layers, known.heads, known.kv_heads):
        return known
    try:
        stored = parse_json(checkpoint.read("config.json"), f"config.json of {where}", dict[str, Any])
    except PicoError:
        return known  # components that need what is missing raise an error
    return stated_anatomy({**stored, **section}, where)


def stated_anatomy(section: Mapping[str, Any], where: str) -> Anatomy:
    """Return the anatomy that the `model` section of a configuration states. Raises PicoError for an invalid number."""
    try:
        return anatomy_of(section)
    except ValueError as error:
        raise PicoError(f"{where}: {error}") from error


def part_of(anatomy: Anatomy, module: str) -> Part | None:
    """Return the part with heads that `module` is, by the last word of its name; None if it has no heads."""
    last = module.rpartition(".")[2]
    return next((part for part in anatomy.parts.values() if part.cut and part.module.rpartition(".")[2] == last), None)


def layers_of(addresses: Iterable[Address], anatomy: Anatomy) -> tuple[list[int], str]:
    """Return (the layers that occur in `addresses`, the names of further layers that the anatomy states, as text)."""
    there = sorted({address.layer for address in addresses if address.layer is not None})
    beyond, promised = (there[-1] + 1 if there else 0), anatomy.layers or 0
    first, last = anatomy.block.format(beyond), anatomy.block.format(promised - 1)
    words = first if promised == beyond + 1 else f"{first} to {last}"
    return there, f"{words} ({anatomy.key('layers')} is {promised})" if promised > beyond else ""


def extent(checkpoint: Any, address: Address, part: Part) -> int:
    """Return heads x head size of a projection: rows or columns of its weight, or columns of its activations."""
    by_column = address.kind == "activations" or part.by == "columns"
    return int(checkpoint.shape(address)[-1 if by_column else 0])


def size_of(anatomy: Anatomy, extents: Mapping[Address, tuple[str, int]], where: str) -> int:
    """Return the number of features of one head, from all that is known.

    extents: for each projection, the field of the anatomy that counts its heads, and its extent. Raises PicoError that
    names the keys, if nothing states the number of heads, or if the anatomy and the shapes contradict each other.
    """
    found: dict[int, str] = {}
    if anatomy.head_size is not None:
        found[anatomy.head_size] = anatomy.key("head_size")
    for address, (number, features) in extents.items():
        count, key = getattr(anatomy, number), anatomy.key(number)
        if count is not None and features % count:
            raise PicoError(f"{where}: {key} is {count}, but {address} has {features} features, no multiple of it")
        if count is not None:
            found.setdefault(features // count, f"{key} = {count} and the {features} features of {address}")
    if not found:
        keys = " or ".join(dict.fromkeys(anatomy.key(number) for number, _ in extents.values()))
        raise PicoError(
            f"{where}: how many heads there are is not known: its configuration has neither {keys} nor "
            f"{anatomy.key('head_size')}. Add the key to training_config.yaml of the run, or leave components of heads out"
        )
    if len(found) > 1:
        said = "; ".join(f"{size} by {why}" for size, why in found.items())
        raise PicoError(f"{where}: the size of a head is ambiguous: {said}. Correct the configuration of the run")
    return next(iter(found))


def count_of(anatomy: Anatomy, extents: Mapping[Address, tuple[str, int]], address: Address, where: str) -> int:
    """Return the number of heads of one of the projections in `extents`. Raises PicoError as `size_of` does, and if the
    features are not a multiple of the head size.
    """
    size, features = size_of(anatomy, extents, where), extents[address][1]
    if features % size:
        raise PicoError(f"{where}: {address} has {features} features, no multiple of the size of a head ({size})")
    return features // size
