"""How far the confidence of a model is its accuracy."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from picolm.errors import PicoError
from picolm.observe.passes import Ask, Pass
from picolm.observe.rows import Rows
from picolm.observe.subject import Subject
from picolm.probes.means import mean_of
from picolm.probes.probe import Found, Quantity, Reading, probe


def _predictions(found: Pass) -> dict[str, Tensor]:
    """Read confidence, correctness, Brier score and entropy at each position, [B, P]."""
    probs_BPV = found.log_probs_BPV.exp()
    finite_BPV = found.log_probs_BPV.clamp(min=torch.finfo(torch.float32).min)  # 0 times -inf is no number
    confidence_BP, likeliest_BP = probs_BPV.max(-1)
    of_target_BP = found.nats_BP.neg().exp()
    return {
        "confidence": confidence_BP,
        "right": likeliest_BP == found.targets_BP,
        "brier": (probs_BPV * probs_BPV).sum(-1) - 2 * of_target_BP + 1,  # a square takes three times as long
        "entropy": -finite_BPV.mul_(probs_BPV).sum(-1),
    }


@probe(
    "calibration",
    needs=["logits"],
    gives={
        "ece": Quantity("", "mean over positions of |accuracy - confidence| of their bin of top-1 confidence"),
        "brier": Quantity("", "mean squared distance between prediction and next token, summed over the vocabulary"),
        "accuracy": Quantity("share of positions", "the likeliest token is the next one"),
        "confidence": Quantity("probability", "mean probability of the likeliest token"),
        "entropy": Quantity("nats", "mean entropy of the predicted distribution"),
        "bin_positions": Quantity("positions", "number of positions whose confidence is in this bin"),
        "bin_accuracy": Quantity("share of positions", "accuracy of the positions whose confidence is in this bin"),
        "bin_confidence": Quantity("probability", "mean confidence of the positions whose confidence is in this bin"),
    },
)
def calibration(subject: Subject, rows: Rows, *, bins: Annotated[int, Field(ge=1, le=1000)] = 15) -> Found:
    """Compare the probability of the likeliest next token with how often it is the next token.

    ECE as in Guo et al. 2017, over equal bins of confidence c: bin min(floor(bins c), bins - 1).
    """
    answer = yield Ask(rows, _predictions)
    of = {name: torch.cat(answer[name]).double() for name in ("confidence", "right")}
    if wrong := int(of["confidence"].isnan().sum()):
        raise PicoError(
            f"the model computes NaN at {wrong} of {len(of['confidence'])} positions; its weights may have diverged"
        )
    bin_N = (of["confidence"] * bins).floor().clamp(max=bins - 1).long()
    count = torch.bincount(bin_N, minlength=bins)
    sums = {name: torch.bincount(bin_N, of[name], minlength=bins) for name in ("confidence", "right")}
    total = len(bin_N)
    yield Reading("ece", float((sums["right"] - sums["confidence"]).abs().sum()) / total)
    for name, key in (("brier", "brier"), ("accuracy", "right"), ("confidence", "confidence"), ("entropy", "entropy")):
        yield mean_of(name, answer[key])
    for number in range(bins):
        label, positions = f"{number / bins:.3g}-{(number + 1) / bins:.3g}", int(count[number])
        yield Reading("bin_positions", positions, bin=label)
        for name, key in (("bin_accuracy", "right"), ("bin_confidence", "confidence")):
            mean = float(sums[key][number]) / positions if positions else None
            yield Reading(name, mean, bin=label, reason="" if positions else "no position has this confidence")
