"""Scores of attention heads: numbers of the pattern of each head, beside those of uniform causal attention.

Legend: B rows of a pass, R rows of all passes, N heads, T positions, X scores.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from picolm.observe.passes import Answer
from picolm.probes.means import mean_over_rows
from picolm.probes.probe import Reading

UNIFORM = "uniform"


def scores_of_heads(patterns: Sequence[Tensor], score: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Return the scores of the heads of each layer, by its number, and those of a head with uniform attention, [B, N, X].

    patterns: attention weights of each layer, [B, N, T, T]. score: a function of such weights.
    """
    rows, _, size, _ = patterns[0].shape
    uniform_TT = torch.ones(size, size, dtype=torch.float64).tril() / torch.arange(1, size + 1)[:, None]
    found = {str(layer): score(pattern_BNTT) for layer, pattern_BNTT in enumerate(patterns)}
    return found | {UNIFORM: score(uniform_TT.expand(rows, 1, size, size))}


def readings_of_heads(names: Sequence[str], answer: Answer, counts_R: Tensor) -> Iterator[Reading]:
    """Yield the mean over rows of each score of each head; if the answer has that of uniform attention, it is the chance level.

    names: of the X scores. answer: with what `scores_of_heads` returned, or such scores by the number of the layer. counts_R: the
    weight of each row, its number of positions that are read; rows of weight 0 have no scores.
    """
    read = counts_R > 0
    if not read.any():
        yield from (Reading(name, None, reason="no row has a second position") for name in names)
        return

    def means(key: str) -> tuple[Tensor, Tensor | None]:
        scores_RNX = torch.stack(answer[key]).double()[read]
        return mean_over_rows(scores_RNX * counts_R[read, None, None], counts_R[read])

    chances = means(UNIFORM)[0][0].tolist() if UNIFORM in answer else [None] * len(names)
    for layer in range(sum(key.isdigit() for key in answer)):
        mean_NX, error_NX = means(str(layer))
        for head, values in enumerate(mean_NX.tolist()):
            errors = [None] * len(names) if error_NX is None else error_NX[head].tolist()
            for name, value, error, chance in zip(names, values, errors, chances):
                yield Reading(name, value, layer, head, standard_error=error, chance=chance)
