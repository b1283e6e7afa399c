"""When a model learns each token: its surprisal over the steps, and the loss of frequent and of rare tokens."""

import math
from collections.abc import Iterator
from typing import Annotated, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from picolm.errors import PicoError
from picolm.observe.passes import Ask, Pass
from picolm.observe.rows import Rows
from picolm.observe.subject import Subject
from picolm.probes.counts import ALL, corpus_of, count
from picolm.probes.means import means_by
from picolm.probes.probe import Found, Quantity, Reading, Steps, probe

UNSEEN = "unseen"
_FOUND = {
    "age_of_acquisition": Quantity(
        "log10 step",
        "where a sigmoid fitted to -surprisal over log10 step passes the middle of chance and the best surprisal",
    ),
    "forgetting": Quantity("bits", "sum of all increases of the surprisal from one step to the next, without step 0"),
    "best": Quantity("bits", "least surprisal of all steps but step 0"),
    "final": Quantity("bits", "surprisal at the last step"),
}


def _nats(found: Pass) -> dict[str, Tensor]:
    return {"nats": found.nats_BP, "targets": found.targets_BP}


def acquisition(steps: Steps) -> Iterator[tuple[int, Reading]]:
    """Yield at the last step what the curve of each token over all steps says; step 0 is no point of the curves.

    As Chang & Bergen 2022: the age is where the fitted sigmoid passes half of the way from chance to the best surprisal.
    """
    after = [
        (step, {each.bin: each for each in found if each.name == "surprisal"}) for step, found in steps if step > 0
    ]
    if not after:
        return
    last, of_last = after[-1]
    curves = {token: [found[token].value if token in found else None for _, found in after] for token in of_last}
    whole = [token for token, curve in curves.items() if None not in curve]
    curve_CS = np.array([curves[token] for token in whole], dtype=float).reshape(len(whole), len(after))
    chance_C = np.array([of_last[token].chance or math.inf for token in whole])
    found_C = _ages(np.log10([step for step, _ in after]), curve_CS, chance_C)
    for token, curve_S, chance, (age, why) in zip(whole, curve_CS, chance_C, found_C):
        yield last, Reading("age_of_acquisition", age, bin=token, reason=why)
        yield last, Reading("forgetting", np.diff(curve_S).clip(min=0).sum(), bin=token)
        yield last, Reading("best", curve_S.min(), bin=token, chance=chance)
        yield last, Reading("final", curve_S[-1], bin=token, chance=chance)
    for token in curves.keys() - set(whole):
        reason = "the surprisal of some step is not a number"
        yield from ((last, Reading(name, None, bin=token, reason=reason)) for name in _FOUND)


def _ages(x_S: np.ndarray, curve_CS: np.ndarray, chance_C: np.ndarray) -> Iterator[tuple[float | None, str]]:
    """Yield where the fitted curves pass the middle of chance and best, or why there is no such place."""
    best_C = curve_CS.min(-1)
    enough = len(x_S) >= 4
    age_C = fit_sigmoids(x_S, -curve_CS).where(-(chance_C + best_C) / 2) if enough else best_C
    for age, best, chance in zip(age_C, best_C, chance_C):
        if not enough:
            yield None, f"a sigmoid has four parameters, and there are {len(x_S)} steps after step 0"
        elif best >= chance:
            yield None, "never better than chance"
        elif np.isnan(age):
            yield None, "the fitted curve never passes the middle of chance and best"
        elif not x_S[0] <= age <= x_S[-1]:
            when = "before the first" if age < x_S[0] else "after the last"
            yield None, f"the fitted curve passes the middle of chance and best {when} of these steps"
        else:
            yield float(age), ""


class Sigmoids(NamedTuple):
    """C curves: offset + rise side sigma(side slope (x - middle)), sigma the logistic function, side 1 or -1. All arrays are [C].

    With side -1, sigma is the distance from the upper end. A curve of which only one end is there is nearly exponential, its
    middle is far away, and only the distance from that end is a number of full precision.
    """

    slope_C: np.ndarray
    middle_C: np.ndarray
    side_C: np.ndarray
    rise_C: np.ndarray
    offset_C: np.ndarray

    def where(self, y_C: np.ndarray) -> np.ndarray:
        """Return where the curves have these values, NaN for a value that a curve does not take."""
        with np.errstate(divide="ignore", invalid="ignore"):
            tail_C = self.side_C * (y_C - self.offset_C) / self.rise_C
            tail_C = np.where((tail_C > 0) & (tail_C < 1), tail_C, np.nan)
            return self.middle_C + self.side_C * (np.log(tail_C) - np.log1p(-tail_C)) / self.slope_C


def fit_sigmoids(x_S: np.ndarray, y_CS: np.ndarray) -> Sigmoids:
    """Fit a sigmoid to each curve by least squares: the best fit that is found from several middles and a gentle slope.

    Gentle, since steps anywhere between two points fit a curve that jumps there equally well, and say not where.
    """
    starts = np.quantile(x_S, [0, 0.25, 0.5, 0.75, 1])
    fit, error_C = _descend(x_S, np.tile(y_CS, (len(starts), 1)), np.repeat(starts, len(y_CS)))
    best_C = np.argmin(error_C.reshape(len(starts), -1), 0) * len(y_CS) + np.arange(len(y_CS))
    return Sigmoids(*(each[best_C] for each in fit))


def _descend(
    x_S: np.ndarray, y_CS: np.ndarray, middle_C: np.ndarray, slope: float = 2.0, rounds: int = 150
) -> tuple[Sigmoids, np.ndarray]:
    """Return the fits that are found from these middles, all at once, and their squared errors.

    Offset and rise are exact for each slope and middle (Golub & Pereyra 1973), which are found by the method of Levenberg and
    Marquardt with Kaufman's derivative.
    """
    at_C2 = np.stack([np.full(len(y_CS), slope), middle_C], -1)
    damping_C = np.full(len(y_CS), 1e-2)
    rest_CS, slopes_CS2, fit = _project(x_S, y_CS, at_C2)
    for _ in range(rounds):
        square_C22 = slopes_CS2.swapaxes(1, 2) @ slopes_CS2
        scale_C2 = np.maximum(np.diagonal(square_C22, axis1=1, axis2=2), 1e-12) * damping_C[:, None]
        downhill_C2 = (slopes_CS2 * rest_CS[..., None]).sum(1)
        step_C2 = np.linalg.solve(square_C22 + scale_C2[:, None] * np.eye(2), downhill_C2[..., None])[..., 0]
        tried_CS, tried_slopes_CS2, tried = _project(x_S, y_CS, at_C2 + step_C2)
        better_C = np.square(tried_CS).sum(-1) < np.square(rest_CS).sum(-1)
        at_C2 = np.where(better_C[:, None], at_C2 + step_C2, at_C2)
        rest_CS = np.where(better_C[:, None], tried_CS, rest_CS)
        slopes_CS2 = np.where(better_C[:, None, None], tried_slopes_CS2, slopes_CS2)
        fit = Sigmoids(*(np.where(better_C, new, old) for new, old in zip(tried, fit)))
        damping_C = np.clip(np.where(better_C, damping_C / 10, damping_C * 4), 1e-12, 1e12)
    return fit, np.square(rest_CS).sum(-1)


def _project(x_S: np.ndarray, y_CS: np.ndarray, at_C2: np.ndarray) -> tuple[np.ndarray, np.ndarray, Sigmoids]:
    """Return what the best offset and rise leave of the curves, its slopes in slope and middle, and the sigmoids."""
    slope_C1, middle_C1 = at_C2[:, :1], at_C2[:, 1:]
    z_CS = np.clip(slope_C1 * (x_S - middle_C1), -500, 500)
    side_C1 = np.where(z_CS.mean(-1, keepdims=True) > 0, -1.0, 1.0)
    tail_CS = side_C1 / (1 + np.exp(-side_C1 * z_CS))
    shape_CS = tail_CS - tail_CS.mean(-1, keepdims=True)
    square_C1 = np.maximum(np.square(shape_CS).sum(-1, keepdims=True), 1e-300)
    rise_C1 = (shape_CS * y_CS).sum(-1, keepdims=True) / square_C1
    offset_C1 = (y_CS - rise_C1 * tail_CS).mean(-1, keepdims=True)
    steep_CS = rise_C1 * abs(tail_CS) * (1 - abs(tail_CS))
    slopes_CS2 = np.stack([steep_CS * (x_S - middle_C1), -steep_CS * slope_C1], -1)
    slopes_CS2 -= slopes_CS2.mean(1, keepdims=True)
    along_C2 = (shape_CS[..., None] * slopes_CS2).sum(1) / square_C1
    slopes_CS2 -= shape_CS[..., None] * along_C2[:, None]
    columns = (each[:, 0] for each in (slope_C1, middle_C1, side_C1, rise_C1, offset_C1))
    return y_CS - offset_C1 - rise_C1 * tail_CS, slopes_CS2, Sigmoids(*columns)


@probe(
    "token_curves",
    needs=["logits"],
    gives={
        "surprisal": Quantity("bits", "mean of -log2 p of this token where it is the next one"),
        "frequency_loss": Quantity(
            "nats", "mean loss of next tokens whose count in the training rows has this log10, cut"
        ),
        "frequency_positions": Quantity("positions", "number of positions with such a next token"),
        **_FOUND,
    },
    afterwards=acquisition,
)
def token_curves(
    subject: Subject,
    rows: Rows,
    *,
    min_count: Annotated[int, Field(ge=1)] = 10,
    training_rows: str | None = None,
) -> Found:
    """Measure the surprisal of each token, its age of acquisition and forgetting, and the loss by frequency.

    min_count: tokens that are next ones in these rows less often are left out. training_rows: a file of rows to count the
    frequencies in, instead of the rows that the run is to read.
    """
    answer = yield Ask(rows, _nats)
    chance = math.log2(subject.model.config.vocab_size)
    bits = [nats / math.log(2) for nats in answer["nats"]]
    for reading in means_by("surprisal", bits, answer["targets"], at_least=min_count):
        yield reading._replace(chance=chance)
    try:
        corpus = corpus_of(subject.run, training_rows)
    except PicoError as error:
        yield Reading("frequency_loss", None, reason=str(error))
        return
    counts_V = torch.zeros(subject.model.config.vocab_size, dtype=torch.float64)
    counted = count(corpus, 1, len(counts_V), ALL)
    counts_V[counted.tokens_N] = counted.counts_N
    group_V = torch.where(counts_V > 0, counts_V.log10().floor() + 1, 0)  # 0: never counted
    groups = [group_V[targets] for targets in answer["targets"]]
    for reading in means_by("frequency_loss", answer["nats"], groups, _frequency):
        yield reading
    numbers = torch.bincount(torch.cat(groups).long()).tolist()
    for group, number in enumerate(numbers):
        if number:
            yield Reading("frequency_positions", number, bin=_frequency(group))


def _frequency(group: int) -> str:
    return str(group - 1) if group else UNSEEN
