"""The way of the weights through their space: how far each update goes, and whether updates keep their direction.

An update is the difference between the weights of two analyzed steps that follow each other. Only weights are read, in float64.
Legend: M, N rows and columns of a matrix, K directions.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from picolm.address import Address
from picolm.observe.subject import Subject
from picolm.probes.probe import Found, Quantity, Reading, Steps, probe
from picolm.store import Checkpoint


class Squares(NamedTuple):
    """Sums of squares and of products, of one tensor or of all: they add."""

    weight: float
    previous: float
    update: float
    first: float
    update_before: float
    product: float

    def plus(self, other: "Squares") -> "Squares":
        return Squares(*(one + another for one, another in zip(self, other)))


def _readings(found: Squares, updates: int, prefix: str = "", **where: object) -> Iterator[Reading]:
    """Yield what sums of squares say. updates: how many there are up to this step."""

    def reading(name: str, above: float, below: float = 1.0, reason: str = "") -> Reading:
        value = above / below if below else None
        return Reading(f"{prefix}{name}", value, reason="" if below else reason, **where)  # type: ignore[arg-type]

    yield reading("weight_norm", found.weight**0.5)
    if updates:
        yield reading("update_norm", found.update**0.5)
        yield reading("relative_update", found.update**0.5, found.previous**0.5, "the weights before are 0")
        yield reading("from_first", found.first**0.5)
    if updates > 1:
        both = (found.update * found.update_before) ** 0.5
        yield reading("cosine_with_previous", found.product, both, "one of the two updates is 0")


def _quantities(prefix: str, what: str) -> dict[str, Quantity]:
    return {
        f"{prefix}weight_norm": Quantity("weight", f"norm of {what}"),
        f"{prefix}update_norm": Quantity("weight", f"norm of the change of {what} since the analyzed step before"),
        f"{prefix}relative_update": Quantity("", f"norm of this change over the norm of {what} before it"),
        f"{prefix}from_first": Quantity("weight", f"norm of the change of {what} since the first analyzed step"),
        f"{prefix}cosine_with_previous": Quantity("", f"cosine between this change of {what} and the one before it"),
    }


def _length(steps: Steps) -> Iterator[tuple[int, Reading]]:
    """Yield the length of the path up to each step, and how straight it is."""
    length, gap = 0.0, ""
    for number, (step, readings) in enumerate(steps):
        values = {reading.name: reading.value for reading in readings if not reading.bin}
        if number == 0:
            continue
        update, away = values.get("update_norm"), values.get("from_first")
        if update is None or away is None:
            gap = gap or f"the update that ends at step {step} is not known"
        length += update or 0.0
        yield step, Reading("path_length", None if gap else length, reason=gap)
        straight = away / length if away is not None and length and not gap else None
        yield step, Reading("straightness", straight, reason=gap or ("" if length else "the weights did not move"))


@probe(
    "path",
    family="landscape",
    afterwards=_length,
    gives={
        **_quantities("", "all weights"),
        **_quantities("part_", "one tensor"),
        "left_cosines": Quantity(
            "",
            "cosines of the principal angles between the spaces of the first left singular vectors of this update of a matrix "
            "and of the one before it",
        ),
        "right_cosines": Quantity("", "the same of the right singular vectors"),
        "left_overlap": Quantity(
            "", "mean square of left_cosines; by chance the number of directions over that of rows"
        ),
        "right_overlap": Quantity("", "mean square of right_cosines; by chance directions over columns"),
        "path_length": Quantity("weight", "sum of the norms of all updates up to this step"),
        "straightness": Quantity("", "from_first over path_length: 1 on a straight line"),
    },
)
def path(
    subject: Subject, earlier: Sequence[int], *, subspace: Annotated[int, Field(ge=0, le=64)] = 4, parts: bool = True
) -> Found:
    """Follow the weights of a run: length and direction of each update, whole and by tensor, and how straight the path is.

    subspace: how many singular vectors of the updates of each matrix are compared with those of the update before (0: none).
    parts: also by tensor.
    """
    here, steps = subject.checkpoint, [*earlier[:1], *earlier[-2:][::-1]]  # first, previous, the one before that
    others = [subject.run[step] for step in steps]
    for checkpoint in others:
        checkpoint.fetch([Address("weights", "", "*")])
    total = Squares(*[0.0] * 6)
    for address in here.select(kind="weights"):
        if subject.architecture.holder(address.module)[1] is not None:
            continue  # a part of a tensor that comes by itself
        found, updates = _moved(here, others, address)
        total = total.plus(found)
        if parts:
            yield from _readings(found, len(earlier), "part_", layer=address.layer, bin=address.suffix)
        if subspace and len(updates) == 2 and updates[0].ndim == 2:
            yield from _turned(address, updates, subspace)
    yield from _readings(total, len(earlier))


def _moved(here: Checkpoint, others: Sequence[Checkpoint], address: Address) -> tuple[Squares, list[Tensor]]:
    """Return the sums of squares of a tensor, and its last updates, the latest one first."""
    weight, zero = here[address].double(), torch.zeros(())
    first, *before = [each[address].double() for each in others] or [weight]
    updates = [after - previous for after, previous in pairwise([weight, *before])]
    update, update_before = [*updates, zero, zero][:2]

    def square(tensor: Tensor) -> float:
        return float(tensor.square().sum())

    found = Squares(
        weight=square(weight),
        previous=square(before[0] if before else zero),
        update=square(update),
        first=square(weight - first),
        update_before=square(update_before),
        product=float((update * update_before).sum()) if len(updates) == 2 else 0.0,
    )
    return found, updates


def _turned(address: Address, updates: Sequence[Tensor], directions: int) -> Iterator[Reading]:
    """Yield the angles between the spaces of the first singular vectors of two updates of a matrix."""
    count = min(directions, *updates[0].shape)
    spaces = [_directions(update, count) for update in updates]
    for place, side in enumerate(("left", "right")):
        if any(space is None for space in spaces):
            reason = f"an update has fewer than {count} directions"
            yield Reading(f"{side}_overlap", None, layer=address.layer, bin=address.suffix, reason=reason)
            continue
        one, other = (space[place] for space in spaces if space is not None)
        cosines_K = torch.linalg.svdvals(one.T @ other).clamp(max=1.0)
        chance = count / len(one)
        overlap = float(cosines_K.square().mean())
        yield Reading(f"{side}_overlap", overlap, layer=address.layer, bin=address.suffix, chance=chance)
        for number, cosine in enumerate(cosines_K.tolist(), 1):
            yield Reading(f"{side}_cosines", cosine, layer=address.layer, bin=f"{address.suffix} {number}")


def _directions(update_MN: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """Return the first left and right singular vectors, [M, K] and [N, K], by the eigenvectors of the smaller product of the
    matrix with itself; None for a matrix of lower rank, or with numbers that are not finite.
    """
    wide = update_MN.shape[0] <= update_MN.shape[1]
    matrix = update_MN if wide else update_MN.T
    if not matrix.isfinite().all():
        return None
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)
    if values[-count] <= 1e-14 * values[-1]:
        return None
    small = vectors[:, -count:]
    large = torch.linalg.qr(matrix.T @ small)[0]
    return (small, large) if wide else (large, small)
