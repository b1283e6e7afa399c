"""What the heads of a state space model do with their states: how fast they forget, what they mix, how much they hold.

The matrix by which a head makes outputs of values has signed entries whose sums are not 1. So it is no pattern of attention:
shares are of its absolute entries, and one reading says how much of them is negative.

Legend: B rows of a pass, R rows of all passes, H heads, T positions, P head size, N state size, X scores.
"""

import math

import torch
from torch import Tensor

from picolm.observe.passes import Ask, Pass
from picolm.observe.rows import Rows
from picolm.observe.subject import Subject
from picolm.probes.patterns import readings_of_heads
from picolm.probes.probe import Found, Quantity, Reading, probe

_OF = "of the absolute entries of the mixing matrix (signed, not normalised), over positions after the first"
GIVES = {
    "half_life": Quantity("positions", "ln 2 / mean decay: after so many positions a state of mean decay is half"),
    "distance": Quantity("positions", f"mean number of positions between output and value, by the shares {_OF}"),
    "own_share": Quantity("share", f"share of the position itself {_OF}, the skip D included"),
    "previous_share": Quantity("share", f"share of the position just before {_OF}"),
    "first_share": Quantity("share", f"share of the first position {_OF}"),
    "negative_share": Quantity("share", f"share of negative entries {_OF}"),
    "state_norm": Quantity("", "Frobenius norm of the state after the last position that is read"),
    "state_rank": Quantity(
        "", "exp of the entropy of the singular values of that state, as shares of their sum (Roy and Vetterli 2007)"
    ),
}


def _read(found: Pass) -> dict[str, Tensor]:
    """Return the scores of the heads of each layer, by its number, [B, H, X]; the first is the mean decay."""
    return {
        str(layer): _scores(each.matrix_BHTT, each.decay_BTH, each.state_BHPN)
        for layer, each in enumerate(found.mixing)
    }


def _scores(matrix_BHTT: Tensor, decay_BTH: Tensor, state_BHPN: Tensor) -> Tensor:
    positions_T = torch.arange(matrix_BHTT.shape[-1], dtype=torch.float64, device=matrix_BHTT.device)
    entries_BHQT = matrix_BHTT[:, :, 1:].double()
    share_BHQT = entries_BHQT.abs() / entries_BHQT.abs().sum(-1, keepdim=True)
    of_outputs = (
        positions_T[1:] - share_BHQT @ positions_T,
        share_BHQT.diagonal(1, -2, -1),
        share_BHQT.diagonal(0, -2, -1),
        share_BHQT[..., 0],
        (share_BHQT * (entries_BHQT < 0)).sum(-1),
    )
    singular_BHX = torch.linalg.svdvals(state_BHPN.double())
    rank_BH = torch.special.entr(singular_BHX / singular_BHX.sum(-1, keepdim=True)).sum(-1).exp()
    scores = [decay_BTH.double().mean(1), *(each.mean(-1) for each in of_outputs), singular_BHX.norm(dim=-1), rank_BH]
    return torch.stack(scores, -1)


@probe("state_space", needs=["logits", "mixing"], gives=GIVES)
def state_space(subject: Subject, rows: Rows) -> Found:
    """Measure how fast each head of a state space model forgets, how far back it mixes, and how much its state holds.

    Means over rows, each row counted by its positions after the first; states are those after the inputs of each row.
    """
    answer = yield Ask(rows, _read, frozenset({"mixing"}))
    counts_R = torch.tensor([rows.inputs(row) - 1 for row in range(len(rows.tokens))])
    yield from map(_finished, readings_of_heads(list(GIVES), answer, counts_R))


def _finished(reading: Reading) -> Reading:
    """Return a mean as it is told: that of the decay as a half-life, whose error follows by the derivative."""
    value, error = reading.value, reading.standard_error
    if value is None:
        return reading
    if not math.isfinite(value):
        why = "a state, or all that a position mixes, is 0 or not finite"
        return reading._replace(value=None, standard_error=None, reason=why)
    if reading.name != "half_life":
        return reading
    if value <= 0:
        return reading._replace(value=None, standard_error=None, reason="the state does not decay")
    half_life = math.log(2) / value
    return reading._replace(value=half_life, standard_error=None if error is None else half_life * error / value)
