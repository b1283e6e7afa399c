"""Where each head looks: how widely, how far back, and how much at the first token and at the previous one."""

import torch
from torch import Tensor

from picolm.observe.passes import Ask, Pass
from picolm.observe.rows import Rows
from picolm.observe.subject import Subject
from picolm.probes.patterns import readings_of_heads, scores_of_heads
from picolm.probes.probe import Found, Quantity, probe

GIVES = {
    "entropy": Quantity("nats", "mean entropy of what a query attends to, over queries after the first token"),
    "relative_entropy": Quantity(
        "share of the largest", "mean of that entropy divided by ln(i + 1), its most at query i"
    ),
    "first_token_mass": Quantity(
        "share of attention", "mean attention to the first token of a row, of queries after it"
    ),
    "previous_token_mass": Quantity("share of attention", "mean attention to the token just before the query"),
    "distance": Quantity("positions", "mean number of positions between a query and what it attends to"),
}


def _scores(pattern_BNTT: Tensor) -> Tensor:
    """Return the means over queries i >= 1 of each row, in the order of `GIVES`, [B, N, 5]."""
    positions_T = torch.arange(pattern_BNTT.shape[-1], dtype=pattern_BNTT.dtype)
    later_BNQT = pattern_BNTT[:, :, 1:]
    entropy_BNQ = torch.special.entr(later_BNQT).sum(-1)
    there_BNQ = later_BNQT @ positions_T  # mean position of the keys
    of_queries = (
        entropy_BNQ,
        entropy_BNQ / (positions_T[1:] + 1).log(),
        later_BNQT[..., 0],
        pattern_BNTT.diagonal(-1, -2, -1),
        positions_T[1:] - there_BNQ,
    )
    return torch.stack([each.mean(-1, dtype=torch.float64) for each in of_queries], -1)


def _read(found: Pass) -> dict[str, Tensor]:
    return scores_of_heads(found.patterns, _scores)


@probe("attention", needs=["logits", "patterns"], gives=GIVES)
def attention(subject: Subject, rows: Rows) -> Found:
    """Measure how widely and how far back each attention head looks. Chance: uniform attention to all tokens so far.

    All tokens of a row are queries, also the last one, which is only predicted elsewhere; in rows that are longer than the
    context of the model by that token, those before it.
    """
    if rows.has_targets and rows.unread and max(map(len, rows.tokens)) <= subject.architecture.context:
        rows = rows.read_whole()
    answer = yield Ask(rows, _read, frozenset({"patterns"}))
    queries_R = torch.tensor([rows.inputs(row) - 1 for row in range(len(rows.tokens))])
    yield from readings_of_heads(list(GIVES), answer, queries_R)
