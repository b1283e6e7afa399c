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
from picolm.probes.divergence import js_terms
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
    entropy = -float((counted.log_p_N.exp() * counted.log_p_N).sum())
    cross_BP = -_dot(log_m_BPV, p_V)
    m_BPV = log_m_BPV.exp()
    negentropy_BP = _dot(log_m_BPV, m_BPV)
    reverse_BP = negentropy_BP - m_BPV @ smoothed_V
    middle_BPV = m_BPV.add_(p_V).mul_(0.5)
    middle_entropy_BP = -_dot(middle_BPV.log(), middle_BPV)
    of_target_V = dense_V.log() - math.log(max(float(dense_V.sum()), 1.0))
    return {
        "kl": cross_BP - entropy,
        "js": middle_entropy_BP - (entropy - negentropy_BP) / 2,
        "cross_entropy": cross_BP,
        "reverse_kl": reverse_BP,
        "loss": -of_target_V[found.targets_BP],
        "seen": torch.full_like(found.targets_BP, len(counted.tokens_N) > 0, dtype=torch.bool),
    }


def _dot(logs_BPV: Tensor, weights: Tensor) -> Tensor:
    """Return the sum of weight x log over the vocabulary, 0 where the weight is 0. weights: [V] or [B, P, V]."""
    dot = (lambda logs, w: logs @ w) if weights.ndim == 1 else torch.linalg.vecdot
    total_BP: Tensor = dot(logs_BPV, weights)
    if not (wrong := total_BP.isnan()).any():  # 0 times the logarithm of 0 is rare: only then is more work done
        return total_BP
    of_wrong = weights.expand_as(logs_BPV)[wrong]
    total_BP[wrong] = torch.where(of_wrong == 0, 0.0, of_wrong * logs_BPV[wrong]).sum(-1)
    return total_BP


def _contextual(order: int, counted: Counts, vocabulary: int, found: Pass) -> dict[str, Tensor]:
    """Compare with what followed the context of each position, [B, Q], over the counted tokens alone.

    The model's share of all other tokens counts to JS as its half times ln 2, whatever they are.
    """
    log_m_BPV, (B, P) = found.log_probs_BPV, found.targets_BP.shape
    context_BQ = contexts_of(found.tokens_BS[:, :P], order, vocabulary)
    first = P - context_BQ.shape[1]
    place_M, seen_M = _find(counted.contexts_C, context_BQ.flatten())
    begin_M, end_M = counted.starts[place_M], counted.starts[place_M + seen_M]  # of none: nothing
    size_M = end_M - begin_M
    of_K = torch.arange(len(size_M)).repeat_interleave(size_M)
    entry_K = torch.arange(len(of_K)) - (size_M.cumsum(0) - size_M - begin_M)[of_K]
    position_M = (torch.arange(B)[:, None] * P + torch.arange(first, P)).flatten()
    log_m_K = log_m_BPV.reshape(-1)[position_M[of_K] * vocabulary + counted.tokens_N[entry_K]].double()
    log_p_K = counted.log_p_N[entry_K]

    def total(terms_K: Tensor) -> Tensor:
        return torch.zeros(len(size_M), dtype=torch.float64).index_add_(0, of_K, terms_K)

    p_K = log_p_K.exp()
    other_M = 1 - total(log_m_K.exp())
    id_N = counted.contexts_C.repeat_interleave(counted.starts.diff()) * vocabulary + counted.tokens_N
    entry_M, known_M = _find(id_N, context_BQ.flatten() * vocabulary + found.targets_BP[:, first:].flatten())
    loss_M = torch.full_like(known_M, math.inf, dtype=torch.float64)
    loss_M[known_M] = -counted.log_p_N[entry_M[known_M]]
    read = {
        "kl": total(p_K * (log_p_K - log_m_K)),
        "js": total(js_terms(log_p_K, log_m_K)) + other_M * (math.log(2) / 2),
        "cross_entropy": total(-p_K * log_m_K),
        "loss": loss_M,
        "seen": seen_M,
    }
    return {key: value_M.reshape(context_BQ.shape) for key, value_M in read.items()}


def _find(sorted_C: Tensor, wanted_M: Tensor) -> tuple[Tensor, Tensor]:
    """Return where each number stands among sorted ones, and whether it is there."""
    place_M = torch.searchsorted(sorted_C, wanted_M).clamp(max=max(len(sorted_C) - 1, 0))
    if not len(sorted_C):
        return place_M, torch.zeros_like(wanted_M, dtype=torch.bool)
    return place_M, sorted_C[place_M] == wanted_M
