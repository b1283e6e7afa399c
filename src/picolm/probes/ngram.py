"""How near a model is to the statistics of short contexts in its training rows."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from picolm.observe.passes import Ask, Pass
from picolm.observe.rows import Rows
from picolm.observe.subject import Subject
from picolm.probes.counts import Counts, contexts_of, corpus_of, count
from picolm.probes.means import mean_of
from picolm.probes.probe import Found, Quantity, Reading, probe

NAMES = {1: "unigram", 2: "bigram", 3: "trigram"}
_OF_EACH = {
    "kl": ("nats", "mean KL(p || model), p the shares of what followed the context in the training rows"),
    "js": ("nats", "mean Jensen-Shannon divergence of these shares and the model, at most ln 2"),
    "cross_entropy": ("nats", "mean of -ln of the model averaged over these shares: KL and the entropy of the shares"),
    "loss": ("nats", "mean -ln of the share of the next token, over positions where this token was counted"),
    "unseen": ("share of positions", "of those with a whole context, those whose context was not counted"),
}
_GIVES = {
    f"{name}_{key}": Quantity(units, f"{name}: {definition}")
    for name in NAMES.values()
    for key, (units, definition) in _OF_EACH.items()
}
_GIVES["unigram_reverse_kl"] = Quantity(
    "nats", "mean KL(model || p), p the shares of all tokens with 1 added to each count"
)


@probe("ngram", needs=["logits"], gives=_GIVES)
def ngram(
    subject: Subject,
    rows: Rows,
    *,
    orders: Annotated[list[Annotated[int, Field(ge=1, le=3)]], Field(min_length=1)] = [1, 2, 3],  # noqa: B006
    until: Literal["all", "step"] = "all",
    training_rows: str | None = None,
) -> Found:
    """Compare the predictions of the model with unigrams, bigrams and trigrams counted in its training rows.

    until: count all rows that the run is to read (the same measure at each step, as in Belrose et al. 2024), or those that the
    step has seen. training_rows: a file of rows to count instead. Counts are not smoothed, so positions whose context was not
    counted are left out, and their share is given. No context reaches into another row.
    """
    step = subject.checkpoint.step if until == "step" else None
    corpus, vocabulary = corpus_of(subject.run, training_rows, step), subject.model.config.vocab_size
    counts = {
        order: count(corpus, order, vocabulary, _contexts(rows, order, vocabulary)) for order in sorted(set(orders))
    }
    answer = yield Ask(rows, partial(_read, counts, vocabulary))
    for order in counts:
        seen = answer[f"{order} seen"]
        for key in ("kl", "js", "cross_entropy"):
            of_rows = answer[f"{order} {key}"]
            yield _mean(f"{NAMES[order]}_{key}", of_rows, seen, "no context of these rows was counted")
        yield _loss(f"{NAMES[order]}_loss", answer[f"{order} loss"])
        yield mean_of(f"{NAMES[order]}_unseen", [~row for row in seen])
    if 1 in counts:
        yield mean_of("unigram_reverse_kl", answer["1 reverse_kl"])


def _contexts(rows: Rows, order: int, vocabulary: int) -> bytes:
    """Return the contexts of all positions of the rows, as `count` takes them."""
    found = [contexts_of(tokens[None, :-1], order, vocabulary).flatten() for tokens in rows.tokens]
    return np.unique(torch.cat(found).numpy()).tobytes()


def _mean(name: str, of_rows: list[Tensor], where: list[Tensor], reason: str) -> Reading:
    """Return the mean over the positions where it is defined."""
    found = mean_of(name, [row[kept] for row, kept in zip(of_rows, where)])
    return found._replace(reason=reason) if found.value is None else found


def _loss(name: str, of_rows: list[Tensor]) -> Reading:
    defined = [row.isfinite() for row in of_rows]
    found = _mean(name, of_rows, defined, "no next token of these rows was counted after its context")
    kept, all_of = sum(int(row.sum()) for row in defined), sum(map(len, defined))
    return found._replace(note=f"over {kept} of {all_of} positions: others would have an infinite loss")


def _read(counts: Mapping[int, Counts], vocabulary: int, found: Pass) -> dict[str, Tensor]:
    """Read all that is compared at each position with a whole context, [B, Q] by order."""
    read: dict[str, Tensor] = {}
    for order, counted in counts.items():
        compare = _unigram if order == 1 else partial(_contextual, order)
        read |= {f"{order} {key}": value for key, value in compare(counted, vocabulary, found).items()}
    return read


def _unigram(counted: Counts, vocabulary: int, found: Pass) -> dict[str, Tensor]:
    """Compare with one distribution at all positions, [B, P]; the whole vocabulary at once is faster than its counted part."""
    log_m_BPV = found.log_probs_BPV
    dense_V = torch.zeros(vocabulary, dtype=torch.float64)
    dense_V[counted.tokens_N] = counted.counts_N.double()
    p_V = (dense_V / dense_V.sum().clamp(min=1)).to(log_m_BPV.dtype)
    smoothed_V = ((dense_V + 1) / (dense_V + 1).sum()).log().to(log_m_BPV.dtype)
    entropy = float(counted.entropy_C.sum())  # of the one context, 0 without
    of_rows = [_dense(log_m_PV, p_V, smoothed_V) for log_m_PV in log_m_BPV]  # one by one: smaller arrays are faster
    cross_BP, negentropy_BP, middle_BP, reverse_BP = (torch.stack(each) for each in zip(*of_rows))
    of_target_V = dense_V.log() - math.log(max(float(dense_V.sum()), 1.0))
    return {
        "kl": cross_BP - entropy,
        "js": middle_BP - (entropy - negentropy_BP) / 2,
        "cross_entropy": cross_BP,
        "reverse_kl": reverse_BP,
        "loss": -of_target_V[found.targets_BP],
        "seen": torch.full_like(found.targets_BP, len(counted.tokens_N) > 0, dtype=torch.bool),
    }


def _dense(log_m_PV: Tensor, p_V: Tensor, smoothed_V: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return, at each position, the cross-entropy of p and the model m, the negative entropy of m, the entropy of (p + m) / 2,
    and KL(m || smoothed p).
    """
    m_PV = log_m_PV.exp()
    cross_P, negentropy_P = -_dot(log_m_PV, p_V), _dot(log_m_PV, m_PV)
    reverse_P = negentropy_P - m_PV @ smoothed_V
    middle_PV = m_PV.add_(p_V).mul_(0.5)
    return cross_P, negentropy_P, -_dot(middle_PV.log(), middle_PV), reverse_P


def _dot(logs_PV: Tensor, weights: Tensor) -> Tensor:
    """Return the sum of weight x log over the vocabulary, 0 where the weight is 0. weights: [V] or [P, V]."""
    total_P: Tensor = logs_PV @ weights if weights.ndim == 1 else torch.linalg.vecdot(logs_PV, weights)
    if (wrong_P := total_P.isnan()).any():  # 0 times the logarithm of 0 is rare: only then is more work done
        of_wrong = weights.expand_as(logs_PV)[wrong_P]
        total_P[wrong_P] = torch.where(of_wrong == 0, 0.0, of_wrong * logs_PV[wrong_P]).sum(-1)
    return total_P


def _contextual(order: int, counted: Counts, vocabulary: int, found: Pass) -> dict[str, Tensor]:
    """Compare with what followed the context of each position, [B, Q], over the counted tokens alone."""
    context_BQ = contexts_of(found.tokens_BS[:, : found.targets_BP.shape[1]], order, vocabulary)
    length = context_BQ.shape[1]
    place_BQ, seen_BQ = _find(counted.contexts_C, context_BQ)
    entry_BQ, known_BQ = _find(counted.ids_N, context_BQ * vocabulary + found.targets_BP[:, -length:])
    loss_BQ = torch.full(known_BQ.shape, math.inf, dtype=torch.float64)
    loss_BQ[known_BQ] = -counted.p_N[entry_BQ[known_BQ]].log()
    entropy_BQ = torch.zeros_like(loss_BQ)
    entropy_BQ[seen_BQ] = counted.entropy_C[place_BQ[seen_BQ]]
    begin_BQ, end_BQ = counted.starts[place_BQ], counted.starts[place_BQ + seen_BQ]  # of none: nothing
    of_rows = [_sparse(counted, *of_row) for of_row in zip(found.log_probs_BPV[:, -length:], begin_BQ, end_BQ)]
    cross_BQ, middle_BQ = (torch.stack(each) for each in zip(*of_rows))
    return {
        "kl": cross_BQ - entropy_BQ,
        "js": middle_BQ - entropy_BQ / 2,
        "cross_entropy": cross_BQ,
        "loss": loss_BQ,
        "seen": seen_BQ,
    }


def _sparse(counted: Counts, log_m_QV: Tensor, begin_Q: Tensor, end_Q: Tensor) -> tuple[Tensor, Tensor]:
    """Return, at each position, the cross-entropy of p and the model m, and the entropy of M = (p + m) / 2 less half that of m.

    Where p is 0, M is m / 2, and all that remains of these entropies is m ln 2 / 2: the share of the model for tokens that were
    not counted is enough, whatever they are. begin_Q, end_Q: where the counted tokens of each context are.
    """
    size_Q = end_Q - begin_Q
    entry_K = torch.arange(int(size_Q.sum())) - (size_Q.cumsum(0) - end_Q).repeat_interleave(size_Q)
    row_K = (torch.arange(len(size_Q)) * log_m_QV.shape[1]).repeat_interleave(size_Q)
    log_m_K = log_m_QV.reshape(-1)[row_K + counted.tokens_N[entry_K]].double()
    p_K, m_K = counted.p_N[entry_K], log_m_K.exp()
    middle_K = (p_K + m_K) / 2
    terms_K = m_K * (log_m_K.clamp(min=-1e4) - math.log(2)) / 2 - middle_K * middle_K.log()
    cross_Q, middle_Q = (
        torch.segment_reduce(each_K, "sum", lengths=size_Q, unsafe=True) for each_K in (p_K * log_m_K, terms_K)
    )
    return -cross_Q, middle_Q + math.log(2) / 2


def _find(sorted_C: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return where each number stands among sorted ones, and whether it is there."""
    if not len(sorted_C):
        return torch.zeros_like(wanted), torch.zeros_like(wanted, dtype=torch.bool)
    place = torch.searchsorted(sorted_C, wanted.contiguous()).clamp(max=len(sorted_C) - 1)
    return place, sorted_C[place] == wanted
