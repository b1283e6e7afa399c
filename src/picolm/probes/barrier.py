"""The loss on the straight line between two models, also after the units of one are put into the order of the other.

Units of an MLP, groups of key-value heads with their query heads, and query heads of a group may change places without changing
the function of a model. Legend: D parameters, U units, E entries of a unit, G groups.
"""

import math
from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from picolm.errors import PicoError
from picolm.observe.rows import Rows
from picolm.observe.subject import Subject
from picolm.observe.surface import Surface
from picolm.probes.probe import Found, Quantity, Reading, probe

SAME = 1e-4  # nats per token: what a permutation of units may change in a loss by rounding


class Units(NamedTuple):
    """What may change places in one block, as numbers of entries of the vector of all parameters.

    mlp_UE: of each hidden unit. groups: for each group of key-value heads, its own entries, and those of its query heads.
    """

    mlp_UE: Tensor | None
    groups_GE: Tensor | None
    heads_GUE: Tensor | None


def assignment(gain_UU: Tensor) -> list[int]:
    """Return for each row the column of its own with the largest sum of gains, by shortest augmenting paths (Jonker and
    Volgenant 1987), in O(U³).
    """
    cost, count = -gain_UU.double().numpy(), len(gain_UU)
    of_row, of_column = np.zeros(count + 1), np.zeros(count + 1)
    row_of = np.zeros(count + 1, dtype=int)  # of each column, counted from 1; column 0 is where a path starts
    for row in range(1, count + 1):
        row_of[0], column = row, 0
        least, came_from, used = np.full(count + 1, np.inf), np.zeros(count + 1, dtype=int), np.zeros(count + 1, bool)
        while row_of[column]:
            used[column] = True
            reduced = np.append(np.inf, cost[row_of[column] - 1]) - of_row[row_of[column]] - of_column
            better = ~used & (reduced < least)
            least[better], came_from[better] = reduced[better], column
            following = int(np.argmin(np.where(used, np.inf, least)))
            step = least[following]
            of_row[row_of[used]] += step
            of_column[used] -= step
            least[~used] -= step
            column = following
        while column:
            row_of[column] = row_of[came_from[column]]
            column = came_from[column]
    found = [0] * count
    for place in range(1, count + 1):
        found[row_of[place] - 1] = place - 1
    return found


def units_of(subject: Subject, surface: Surface) -> list[Units]:
    """Return what may change places in each block, as far as the anatomy of the model says where it is."""
    places = torch.arange(len(surface.start_D))
    numbers = {
        name: part.view(parameter.shape) for (name, part), parameter in zip(surface.parts(places), surface.parameters)
    }

    def entries(module: str) -> list[Tensor]:
        """Return the numbers of the entries of a module's weight and bias, rows first, as in a checkpoint."""
        architecture, holder = subject.architecture, subject.architecture.holder(module)[0]
        found = [numbers[name] for name in (f"{holder}.weight", f"{holder}.bias") if name in numbers]
        return [architecture.gradient_part(module, each) for each in found]

    anatomy, blocks = subject.anatomy, range(subject.anatomy.layers or 0)
    found = list[Units]()
    for block in (anatomy.block.format(layer) for layer in blocks):
        modules = {role: f"{block}.{part.module}" for role, part in anatomy.parts.items()}
        mlp_UE = groups_GE = heads_GUE = None
        if "mlp.output" in modules and (output := entries(modules["mlp.output"])):
            columns_UE = output[0].T
            inner = modules["mlp.output"].rpartition(".")[0]
            others = {name.rpartition(".")[0] for name in numbers if name.startswith(f"{inner}.")} - {*modules.values()}
            into = [each for name in sorted(others) for each in entries(name) if len(each) % len(columns_UE) == 0]
            rows = [each.view(-1, len(columns_UE), *each.shape[1:]).transpose(0, 1).flatten(1) for each in into]
            mlp_UE = torch.cat([columns_UE, *rows], 1) if rows else None
        roles = [f"attention.{part}" for part in ("query", "key", "value", "output")]
        if anatomy.heads and anatomy.kv_heads and all(role in modules for role in roles):
            query, key, value, output = (entries(modules[role]) for role in roles)
            kv, per = anatomy.kv_heads, anatomy.heads // anatomy.kv_heads
            groups_GE = torch.cat([each.reshape(kv, -1) for each in (*key, *value)], 1)
            heads_GUE = torch.cat([each.reshape(kv, per, -1) for each in (*query, output[0].T)], 2)
        found.append(Units(mlp_UE, groups_GE, heads_GUE))
    if not any(each is not None for units in found for each in units):
        raise PicoError(f"where the units and heads of the model of {subject.run.name} are is not known")
    return found


def aligned(units: list[Units], one_D: Tensor, other_D: Tensor) -> tuple[Tensor, dict[str, tuple[int, int]]]:
    """Return a model with its units and heads in the order that is nearest to another model's, and how many changed places, of
    how many.

    Weight matching (Ainsworth et al. 2022). Nothing outside of a block moves, so the blocks are independent and the match is the
    best one.
    """
    moved_D, counts = other_D.clone(), {"units": (0, 0), "heads": (0, 0)}

    def move(kind: str, numbers_UE: Tensor, order: list[int]) -> None:
        moved_D[numbers_UE] = other_D[numbers_UE[order]]
        changed, of = counts[kind]
        counts[kind] = changed + sum(i != place for i, place in enumerate(order)), of + len(order)

    for mlp_UE, groups_GE, heads_GUE in units:
        if mlp_UE is not None:
            move("units", mlp_UE, assignment(one_D[mlp_UE] @ other_D[mlp_UE].T))
        if groups_GE is not None and heads_GUE is not None:
            gains_GG = one_D[groups_GE] @ other_D[groups_GE].T
            inside = dict[tuple[int, int], list[int]]()
            for i, heads_UE in enumerate(heads_GUE):
                for j, others_UE in enumerate(heads_GUE):
                    gain_UU = one_D[heads_UE] @ other_D[others_UE].T
                    inside[i, j] = order = assignment(gain_UU)
                    gains_GG[i, j] += gain_UU[range(len(order)), order].sum()
            groups = assignment(gains_GG)
            moved_D[groups_GE] = other_D[groups_GE[groups]]
            per = heads_GUE.shape[1]
            order = [j * per + place for i, j in enumerate(groups) for place in inside[i, j]]
            move("heads", heads_GUE.flatten(0, 1), order)
    return moved_D, counts


def _line(surface: Surface, one_D: Tensor, other_D: Tensor, points: int) -> list[tuple[float, float]]:
    """Return the loss at equal distances from one model to another: (share of the other, loss)."""
    found = []
    for share in (number / (points - 1) for number in range(points)):
        surface.move(torch.lerp(one_D, other_D, share))
        found.append((share, surface.loss()))
    return found


def _readings(line: list[tuple[float, float]], prefix: str = "") -> Iterator[Reading]:
    first, last = line[0][1], line[-1][1]
    heights = [(loss - ((1 - share) * first + share * last), share) for share, loss in line]
    broken = next((share for share, loss in line if not math.isfinite(loss)), None)
    reason = "" if broken is None else f"the loss at {broken:.3g} of the way is not finite"
    height, at = (None, None) if reason else max(heights, key=lambda each: each[0])
    yield Reading(f"{prefix}barrier", height, reason=reason)
    yield Reading(f"{prefix}at", at, reason=reason)
    for share, loss in line:
        yield Reading(f"{prefix}interpolated_loss", loss, bin=f"{share:.3g}")


def _quantities(prefix: str, what: str) -> dict[str, Quantity]:
    return {
        f"{prefix}barrier": Quantity(
            "nats", f"the most by which the loss between the models{what} exceeds the line between their losses"
        ),
        f"{prefix}at": Quantity("share of the way", f"where that is: 0 is this model, 1 the other one{what}"),
        f"{prefix}interpolated_loss": Quantity(
            "nats", f"mean loss of (1 - a) this + a other model{what}; bin: a"
        ),
        f"{prefix}distance": Quantity("weight", f"norm of the difference of all parameters{what}"),
    }  # fmt: skip


@probe(
    "barrier",
    needs=["logits"],
    family="landscape",
    gives={
        **_quantities("", ""),
        **_quantities("aligned_", ", whose units and heads are in the order of this one"),
        "moved_units": Quantity("share of units", "units of MLPs of the other model that change places"),
        "moved_heads": Quantity("share of heads", "query heads of the other model that change places"),
    },
)
def barrier(
    subject: Subject,
    other: Subject,
    rows: Rows,
    *,
    points: Annotated[int, Field(ge=3, le=1001)] = 11,
    align: bool = False,
    precision: Literal["float32", "float64"] = "float32",
) -> Found:
    """Measure the loss at equal distances on the straight line from this model to another one (Frankle et al. 2020).

    align: also after the hidden units and heads of the other model are permuted to be nearest to those of this one.
    """
    surface = Surface(subject, rows, getattr(torch, precision))
    beside = Surface(other, rows, getattr(torch, precision))
    if (surface.names, surface.sizes) != (beside.names, beside.sizes):
        raise PicoError(
            f"the models of {subject.run.name} and {other.run.name} have other parameters, so there is no line between them"
        )
    for each in (surface, beside):
        each.finite_loss()
    one_D, other_D = surface.start_D, beside.start_D
    del beside
    line = _line(surface, one_D, other_D, points)
    yield from _readings(line)
    yield Reading("distance", float((one_D - other_D).double().norm()))
    if not align:
        return
    moved_D, counts = aligned(units_of(subject, surface), one_D, other_D)
    surface.move(moved_D)
    changed = abs(surface.loss() - line[-1][1])
    if not changed <= SAME * max(1.0, line[-1][1]):
        reason = f"a permutation of units and heads changes the loss of this model by {changed:.2g}: they are not alike"
        yield Reading("aligned_barrier", None, reason=reason)
        return
    yield from _readings(_line(surface, one_D, moved_D, points), "aligned_")
    yield Reading("aligned_distance", float((one_D - moved_D).double().norm()))
    for kind, (number, of) in counts.items():
        yield Reading(f"moved_{kind}", number / of if of else None, reason="" if of else f"its {kind} are not known")
