"""Pairing: what a matrix is compared with, at other steps, in other layers, runs and model sizes.

A pairing says where the partner of an operand is: at another step, in another run, in another layer, or at each of
them. Activations may be compared only if their rows belong to the same inputs; this is checked by digest.
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

Name = tuple[str, int | None]  # the name within a block, and the head


class Place(NamedTuple):
    """One step of one run."""

    run: str
    step: int


def partner_places(target: Target, at: Place, steps: list[int], symmetric: bool) -> list[Place]:
    """Return where the partners of an operand at `at` are; nothing for the first step compared with the previous one.

    steps: the analyzed steps of the run that is compared with. With `all`, a symmetric metric gets each pair of steps
    once.
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
    """Index operands by name and head, then by stack (the name before the number of a block: `encoder`, `decoder`),
    then by layer.
    """
    index: dict[Name, dict[str, dict[int | None, Operand]]] = {}
    for candidate in candidates:
        stacks = index.setdefault((candidate.address.suffix, candidate.head), {})
        stacks.setdefault(candidate.address.stack, {})[candidate.address.layer] = candidate
    return index


def partners(
    operand: Operand, index: Mapping[Name, Mapping[str, Mapping[int | None, Operand]]], target: Target
) -> Iterable[Operand]:
    """Return the operands that `target` pairs with `operand`: the same name and head, and the layer of the target.

    Another run may name its blocks differently (`model.layers`): if it has only one stack of blocks, that stack is
    used.
    """
    stacks = index.get((operand.address.suffix, operand.head), {})
    only = next(iter(stacks.values())) if len(stacks) == 1 else {}
    layers = stacks.get(operand.address.stack, only)
    if target.layer == "all":
        return layers.values()
    asked = operand.address.layer if target.layer == "same" else target.layer
    return [layers[asked]] if asked in layers else []


def check_same_rows(first: Reader, second: Reader, address: Address) -> None:
    """Check that activations of two steps belong to the same inputs. Raises PicoError that says what to do."""
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
