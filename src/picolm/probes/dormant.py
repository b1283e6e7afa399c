"""Units of the MLPs that do nothing or do most, outliers of the residual stream, and how many directions it fills.

Legend: B rows of a pass, T positions, Q of them that are sampled, K = L + 1 places of the residual stream, R rows, N sampled
positions of all rows, H width of the residual stream, F units of an MLP.
"""

import math
from collections.abc import Iterator
from functools import cache
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from picolm.errors import PicoError
from picolm.observe.passes import Answer, Ask, Pass
from picolm.observe.rows import Rows
from picolm.observe.subject import Subject
from picolm.probes.means import mean_of
from picolm.probes.probe import Found, Quantity, Reading, probe
from picolm.probes.stream import of_the_stream, place
from picolm.seeds import derive

_ROUNDING = 1e-12  # of a mean of float64, relative

_UNITS = {
    "dead": Quantity("share of units", "hidden units of the MLP that are 0 at all positions"),
    "dormant": Quantity(
        "share of units", "hidden units of the MLP with E|h| <= tau times its mean over the units of the layer"
    ),
    "dominant": Quantity(
        "share of units", "hidden units with E|h| > `dominant` times its mean over the units of the layer"
    ),
    "largest_unit": Quantity(
        "", "largest E|h| of a hidden unit of the MLP, divided by its mean over the units of the layer"
    ),
}
_STREAM = {
    "outlier": Quantity(
        "", "largest magnitude in the residual stream over all positions, divided by the median magnitude"
    ),
    "kurtosis": Quantity("", "excess kurtosis of the entries of a hidden state (0: normal), mean over positions"),
    "anisotropy": Quantity("cosine", "mean cosine of the hidden states of two positions in different rows"),
    "anisotropy_centred": Quantity("cosine", "the same after the mean hidden state is subtracted"),
    "rankme": Quantity(
        "directions", "exp of the entropy of the normalized singular values of the centred hidden states"
    ),
    "participation_ratio": Quantity("directions", "(tr C)^2 / tr C^2 of the covariance C of the hidden states"),
}


@probe("dormant", needs=["logits", "hidden"], gives={**_UNITS, **of_the_stream(_STREAM)})
def dormant(
    subject: Subject,
    rows: Rows,
    *,
    tau: Annotated[float, Field(ge=0)] = 0.1,
    dominant: Annotated[float, Field(gt=1)] = 10.0,
    positions: Annotated[int, Field(ge=2)] = 2048,
    seed: int = 0,
) -> Found:
    """Count units of the MLPs that are dead, dormant or dominant, and measure outliers and the rank of the residual stream.

    Dormant units: Sokar et al. 2023. Units and largest magnitudes are of all positions; the rest is of at most `positions` hidden
    states that are drawn with `seed`, as many of each row. RankMe: Garrido et al. 2023, here centred. Chance levels are those of
    as many independent isotropic normal states; anisotropy is compared only between rows, since positions of one row share
    their text.
    """
    needs, reason = {"hidden"}, ""
    try:
        subject.require("mlp")
        needs.add("mlp")
    except PicoError as error:
        reason = str(error)
    each = max(1, positions // len(rows.tokens))
    answer = yield Ask(rows, lambda found: _read(found, each, seed), frozenset(needs))
    yield from _of_units(answer, sum(map(rows.inputs, range(len(rows.tokens)))), tau, dominant)
    if reason:
        yield from (Reading(name, None, reason=reason) for name in _UNITS)
    chosen = torch.randperm(len(rows.tokens), generator=_generator(seed, "rows"))[:positions].sort().values.tolist()
    for k, largest in enumerate(torch.stack(answer["largest"]).amax(0).tolist()):
        states = [answer["states"][row][k].double() for row in chosen]
        for reading in _of_states(states, largest, seed):
            name, layer = place(reading.name, k)
            yield reading._replace(name=name, layer=layer)


def _generator(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive(seed, purpose, *numbers))


def _read(found: Pass, each: int, seed: int) -> dict[str, Tensor]:
    """Read sampled hidden states [B, K, Q, H], the largest magnitude of each place [B, K], and sum |h| over the positions for the
    units of each MLP, [B, F]. Which positions of a row are sampled depends on its tokens and the seed, not on the rows beside it.
    """
    T = found.logits_BTV.shape[1]
    states = []
    for row, tokens_S in enumerate(found.tokens_BS.tolist()):
        chosen_Q = torch.randperm(T, generator=_generator(seed, "positions", *tokens_S))[:each].sort().values
        states.append(torch.stack([hidden_BTH[row, chosen_Q] for hidden_BTH in found.hidden]))
    largest = [hidden_BTH.abs().amax((1, 2)) for hidden_BTH in found.hidden]
    units = {f"units {layer}": h_BTF.abs().sum(1) for layer, h_BTF in enumerate(found.mlp)}
    return {"states": torch.stack(states), "largest": torch.stack(largest, 1), **units}


def _of_units(answer: Answer, positions: int, tau: float, dominant: float) -> Iterator[Reading]:
    """Yield what the mean magnitudes of the hidden units of each MLP say."""
    for layer, key in enumerate(key for key in answer if key.startswith("units ")):
        mean_F = torch.stack(answer[key]).double().sum(0) / positions
        typical = float(mean_F.mean())
        found = {"dead": mean_F == 0, "dormant": mean_F <= tau * typical, "dominant": mean_F > dominant * typical}
        for name, is_F in found.items():
            share = float(is_F.double().mean()) if math.isfinite(typical) else math.nan
            yield Reading(name, share, layer)
        ratio = float(mean_F.max()) / typical if typical else None
        yield Reading("largest_unit", ratio, layer, reason="" if typical else "all units are dead")


def _of_states(states: list[Tensor], largest: float, seed: int) -> Iterator[Reading]:
    """Yield what sampled hidden states of one place say. states: of each row, float64 [Q, H]. largest: magnitude of all."""
    states_NH = torch.cat(states)
    median = float(states_NH.abs().median())
    yield Reading("outlier", largest / median if median else None, reason="" if median else "the median magnitude is 0")
    yield mean_of("kurtosis", [_excess_kurtosis(of_row_QH) for of_row_QH in states], chance=0.0)
    mean_H, number = states_NH.mean(0), len(states_NH)
    centred = [of_row_QH - mean_H for of_row_QH in states]
    alone = "" if len(states) > 1 else "there is one row only, so there are no two positions in different rows"
    for name, of_rows, expected in (
        ("anisotropy", states, 0.0),
        ("anisotropy_centred", centred, -1 / max(1, number - 1)),
    ):
        yield Reading(name, None if alone else _mean_cosine(of_rows), chance=expected, reason=alone)
    ranks, chances = _ranks(states_NH), _chance(number, len(mean_H), seed)
    same = "" if ranks else "the hidden states are all the same"
    for name, value, chance in zip(("rankme", "participation_ratio"), ranks or (None, None), chances or (None, None)):
        yield Reading(name, value, chance=chance, reason=same)


def _excess_kurtosis(states_QH: Tensor) -> Tensor:
    """Return E (x - mean)^4 / (E (x - mean)^2)^2 - 3 over the entries of each state, [Q]."""
    squares_QH = (states_QH - states_QH.mean(-1, keepdim=True)).square()
    return squares_QH.square().mean(-1) / squares_QH.mean(-1).square() - 3


def _mean_cosine(of_rows: list[Tensor]) -> float:
    """Return the mean cosine of all pairs of states of two different rows, from sums of unit vectors."""
    sums_RH = torch.stack([(of_row_QH / of_row_QH.norm(dim=1, keepdim=True)).sum(0) for of_row_QH in of_rows])
    counts_R = torch.tensor([len(of_row_QH) for of_row_QH in of_rows], dtype=torch.float64)
    pairs = counts_R.sum().square() - counts_R.square().sum()
    return float((sums_RH.sum(0).square().sum() - sums_RH.square().sum()) / pairs)


def _ranks(states_NH: Tensor) -> tuple[float, float] | None:
    """Return RankMe and the participation ratio of centred states; None of states that are all the same."""
    if not states_NH.isfinite().all():
        return math.nan, math.nan
    centred_NH = states_NH - states_NH.mean(0)
    if float(centred_NH.abs().max()) <= _ROUNDING * float(states_NH.abs().max()):
        return None
    values = torch.linalg.svdvals(centred_NH)
    shares, squares = values / values.sum(), (values / values[0]).square()
    return float(torch.special.entr(shares).sum().exp()), float(squares.sum().square() / squares.square().sum())


@cache
def _chance(number: int, width: int, seed: int) -> tuple[float, float] | None:
    """Return RankMe and participation ratio of independent isotropic normal states, from one draw of them."""
    generator = _generator(seed, "isotropic states")
    return _ranks(torch.randn(number, width, dtype=torch.float64, generator=generator))
