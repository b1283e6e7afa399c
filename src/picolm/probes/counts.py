"""Counts of n-grams in training rows: which tokens follow a context, and how often. Nothing is counted across rows.

A context of n - 1 ids is one number, its ids as digits to the base of the vocabulary; that of a unigram is 0. Legend: C contexts
that were counted, N pairs of a context and a token that follows it, in the order of contexts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from picolm.errors import PicoError
from picolm.observe.training import SeenRows, TrainingRows, training_rows
from picolm.store import Run

TOKENS_AT_A_TIME = 1 << 22
ALL = np.zeros(1, dtype=np.int64).tobytes()  # the context of all unigrams


@dataclass(frozen=True)
class Corpus:
    """Training rows to count in. end: the step up to which, None for all rows of a file. Equal for the same rows."""

    identity: str
    end: int | None
    rows: TrainingRows = field(compare=False, repr=False)

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield rows of tokens [R, S], and how often each was read [R]."""
        if self.end is None or not isinstance(self.rows, SeenRows):
            numbers, times = np.arange(len(self.rows)), np.ones(len(self.rows), dtype=np.int64)
        else:
            numbers, times = np.unique(self.rows.before(self.end), return_counts=True)
        start, size = 0, 1  # the length of rows is known from the first one
        while start < len(numbers):
            tokens_RS = self.rows.tokens(numbers[start : start + size]).numpy()
            yield tokens_RS, times[start : start + size]
            start, size = start + size, max(1, TOKENS_AT_A_TIME // tokens_RS.shape[1])


def corpus_of(run: Run, place: str | None, step: int | None = None) -> Corpus:
    """Return the training rows of a run that a checkpoint of `step` has seen (None: all that the run is to read), or those of a
    file. Raises PicoError where neither is known, and for a step with a file.
    """
    rows = training_rows(run, place)
    if step is not None and not isinstance(rows, SeenRows):
        raise PicoError("a file of training rows does not say which of them a step has seen; leave out until: step")
    end = (rows.end if step is None else step) if isinstance(rows, SeenRows) else None
    return Corpus(rows.identity, end, rows)


class Counts(NamedTuple):
    """What follows the contexts. contexts_C: sorted; starts: [C + 1], where the tokens of each begin; tokens_N: what follows it,
    sorted; ids_N: both as one number; p_N: its share, float64; counts_N: how often; entropy_C: of these shares, in nats.
    """

    contexts_C: Tensor
    starts: Tensor
    tokens_N: Tensor
    ids_N: Tensor
    p_N: Tensor
    counts_N: Tensor
    entropy_C: Tensor


def contexts_of(tokens_RS: Tensor, order: int, vocabulary: int) -> Tensor:
    """Return the context of each token that has one in its row, and that of what would follow, [R, S - order + 2]; of unigrams
    [R, S], where the first token of a row is no target.
    """
    context = torch.zeros_like(tokens_RS) if order == 1 else tokens_RS[:, : tokens_RS.shape[1] - order + 2]
    for place in range(1, order - 1):
        context = context * vocabulary + tokens_RS[:, place : place + context.shape[1]]
    return context


@lru_cache(maxsize=16)
def count(corpus: Corpus, order: int, vocabulary: int, wanted: bytes) -> Counts:
    """Count what follows some contexts. wanted: these contexts, sorted int64. Raises PicoError for ids outside of the vocabulary.

    Only these are counted, so that memory grows with the rows that are asked about, and not with the training data.
    """
    contexts = np.frombuffer(wanted, dtype=np.int64)
    ids, times = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    for tokens_RS, times_R in corpus.blocks():
        if tokens_RS.size and (tokens_RS.min() < 0 or tokens_RS.max() >= vocabulary):
            raise PicoError(
                f"the training rows hold token ids up to {tokens_RS.max()}; the vocabulary of the model has {vocabulary}"
            )
        found_RQ = contexts_of(torch.from_numpy(tokens_RS), order, vocabulary).numpy()[:, :-1]
        following_RQ = tokens_RS[:, tokens_RS.shape[1] - found_RQ.shape[1] :]
        kept_RQ = _among(contexts, found_RQ)
        new = (found_RQ * vocabulary + following_RQ)[kept_RQ]
        of_new = np.broadcast_to(times_R[:, None], kept_RQ.shape)[kept_RQ]
        ids, place = np.unique(np.concatenate([ids, new]), return_inverse=True)
        times = np.bincount(place, np.concatenate([times, of_new]), minlength=len(ids))
    found_C, starts = np.unique(ids // vocabulary, return_index=True)
    edges = np.append(starts, len(ids))
    p_N = times / np.repeat(np.add.reduceat(times, starts) if len(ids) else times, np.diff(edges))
    entropy_C = -np.add.reduceat(p_N * np.log(p_N), starts) if len(ids) else p_N
    return Counts(*map(torch.as_tensor, (found_C, edges, ids % vocabulary, ids, p_N, times, entropy_C)))


def _among(sorted_C: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Return which of the numbers are among the sorted ones."""
    if not len(sorted_C):
        return np.zeros(numbers.shape, dtype=bool)
    found: np.ndarray = sorted_C[np.searchsorted(sorted_C, numbers).clip(max=len(sorted_C) - 1)] == numbers
    return found
