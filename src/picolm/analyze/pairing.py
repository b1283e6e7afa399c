"""What a matrix is compared with: one idea for steps, layers, runs and sizes.

A pairing says where the partner of an operand is: at another step, in another run, in another layer, or at each of them. Two
matrices of activations may be compared only where their rows belong to the same inputs; that is checked by digest.
"""

import logging
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from picolm.address import Address
from picolm.analyze.components import Operand
from picolm.analyze.config import Target
from picolm.analyze.reading import Reader
from picolm.errors import PicoError

log = logging.getLogger("picolm")

Name = tuple[str, int | None]  # the name inside of a block, and the head


class Place(NamedTuple):
    """One step of one run."""

    run: str
    step: int


def partner_places(target: Target, at: Place, steps: list[int], symmetric: bool) -> list[Place]:
    """Where the partners of an operand at `at` are; nothing for the first step compared with the previous one.

    steps: all steps of the run that is compared with. With `all`, a symmetric metric meets each pair of steps once.
    """
    run = target.run or at.run
    if target.checkpoint == "all":
        return [Place(run, step) for step in steps if not (symmetric and run == at.run and step > at.step)]
    named = {
        "first": steps[:1],
        "last": steps[-1:],
        "same": [at.step],
        "previous": [s for s in steps if s < at.step][-1:],
    }
    chosen = named[target.checkpoint] if isinstance(target.checkpoint, str) else [target.checkpoint]
    itself = Place(run, at.step) == at and target.run is not None and target.layer == "same"
    return [Place(run, step) for step in chosen if not (itself and step == at.step)]


def by_name(candidates: list[Operand]) -> dict[Name, dict[str, dict[int | None, Operand]]]:
    """Operands of one name and head, by what stands before their blocks (`encoder`, `decoder`) and by their layers."""
    index: dict[Name, dict[str, dict[int | None, Operand]]] = {}
    for candidate in candidates:
        stacks = index.setdefault((candidate.address.suffix, candidate.head), {})
        stacks.setdefault(candidate.address.stack, {})[candidate.address.layer] = candidate
    return index


def partners(
    operand: Operand, index: Mapping[Name, Mapping[str, Mapping[int | None, Operand]]], target: Target
) -> Iterable[Operand]:
    """The operands that `target` pairs with `operand`: the same name, head, and layer as asked for.

    In another run the blocks may be called otherwise (`model.layers`): where there is only one stack of them, it is meant.
    """
    stacks = index.get((operand.address.suffix, operand.head), {})
    only = next(iter(stacks.values())) if len(stacks) == 1 else {}
    layers = stacks.get(operand.address.stack, only)
    if target.layer == "all":
        return layers.values()
    asked = operand.address.layer if target.layer == "same" else target.layer
    return [layers[asked]] if asked in layers else []


def check_same_rows(first: Reader, second: Reader, address: Address) -> None:
    """Refuse to compare activations of different inputs. Raises PicoError that says what to do."""
    if address.kind != "activations" or first is second:
        return
    ours, theirs = first.rows_digest(address.split), second.rows_digest(address.split)
    if ours is None or theirs is None:
        first.readers.say_once(
            f"The rows behind {address.kind}/{address.split} are not stored everywhere: taken for the same unchecked."
        )
    elif ours != theirs or first.positions(address.split) != second.positions(address.split):
        hint = "; compare the val split, whose rows are the same at each step" if address.split == "train" else ""
        raise PicoError(
            f"{address.kind}/{address.split} of {first.name} and of {second.name} belong to different inputs, or "
            f"positions of them, and cannot be compared{hint}"
        )
