"""Induction: does a model continue a sequence of random tokens when it reads it a second time, and which heads look where it did.

Rows are [BOS, r, r], with r of K random tokens that are all different; or [r, r].

Legend: B rows of a pass, R rows, T positions of a row, K tokens of r, N heads, X scores, V vocabulary, M masks.
"""

import math
from dataclasses import replace
from functools import lru_cache, partial
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from picolm.errors import PicoError
from picolm.observe import training
from picolm.observe.passes import Answer, Ask, Pass
from picolm.observe.rows import Rows
from picolm.observe.subject import Subject
from picolm.observe.vocabulary import first_token, special_tokens
from picolm.probes.means import mean_of
from picolm.probes.patterns import readings_of_heads, scores_of_heads
from picolm.probes.probe import Found, Quantity, Reading, probe
from picolm.seeds import derive
from picolm.store import Run

COUNTED = 4096  # training rows at most, evenly spaced, that the frequent tokens are counted in
_SHARE = "share of attention"
_LOOKED_FOR = {
    "previous_token": "the token before",
    "duplicate_token": "earlier occurrences of the token",
    "induction": "the tokens after earlier occurrences of the token",
}
OF_HEADS = {
    "prefix_matching": Quantity(
        _SHARE, "mean attention of each token of the second r to the one after its first occurrence"
    ),
    "duplicate_token": Quantity(_SHARE, "mean attention of each token of the second r to its first occurrence"),
    "previous_token": Quantity(_SHARE, "mean attention to the token before, over queries i >= 1"),
    "previous_token_without_first": Quantity(_SHARE, "mean attention to the token before, over queries i >= 2"),
    "first_token_mass": Quantity(_SHARE, "mean attention to the first token, over queries i >= 1"),
    **{
        f"tl_mul_{name}": Quantity(_SHARE, f"TransformerLens 'mul': sum(A D) / sum(A), D is 1 at {there}")
        for name, there in _LOOKED_FOR.items()
    },
    **{
        f"tl_mul_no_bos_no_current_{name}": Quantity(
            _SHARE, f"tl_mul_{name} of attention that is neither to the first token nor to the query itself"
        )
        for name in _LOOKED_FOR
    },
    **{
        f"tl_abs_{name}": Quantity("", f"TransformerLens 'abs': 1 - T mean|A - D|, not rounded, D is 1 at {there}")
        for name, there in _LOOKED_FOR.items()
    },
}
OF_MODEL = {
    "induction_loss": Quantity("nats", "mean loss of all tokens but the first of the second r"),
    "first_copy_loss": Quantity("nats", "mean loss of all tokens but the first of the first r"),
    "copy_advantage": Quantity("nats", "induction_loss minus first_copy_loss: below 0 where the model copies"),
    "induction_accuracy": Quantity(
        "share of positions", "the likeliest token is the next one, where induction_loss is read"
    ),
    "tl_evals_induction_loss": Quantity(
        "nats", "loss of rows of an even length as TransformerLens's evals: mean of l[K + 1:]"
    ),
}


class _Repeated(NamedTuple):
    """Rows that repeat themselves. period: K; second: the first position of the second r that is read."""

    rows: Rows
    period: int
    second: int


@probe("induction", gives=OF_HEADS | OF_MODEL)
def induction(
    subject: Subject,
    stated: Rows | None,
    *,
    tokens: Literal["frequent", "all"] | list[Annotated[int, Field(ge=0)]] = "frequent",
    alphabet: Annotated[int, Field(ge=2)] = 128,
    count: Annotated[int, Field(ge=1, le=100_000)] = 64,
    length: Annotated[int, Field(ge=2)] = 32,
    seed: Annotated[int, Field(ge=0)] = 0,
    bos: Annotated[int, Field(ge=0)] | Literal["none"] | None = None,
    training_rows: str | None = None,
) -> Found:
    """Ask for the loss on the second copy of random tokens, and for the attention of each head to where it was.

    Prefix matching and the loss as in Olsson et al. 2022. `tokens`: r is drawn from the `alphabet` most frequent tokens of the
    training rows (`frequent`), from all of the vocabulary (`all`), or from a list of ids; `length` of them, in `count` rows.
    `bos`: the id before them, or none (default: the token that texts of the model begin with). `rows` in place of all these: rows
    of token ids [BOS, r, r] or [r, r], all of which the model reads. Chance: uniform attention, and uniform predictions.
    The losses of a model that predicts hidden tokens are its exact nats from left to right, with all later ones hidden: it takes
    a forward pass for each token.
    """
    if subject.likelihood != "bound":
        subject.require("logits")
    made = ""
    if stated is None:
        first = _first(subject, bos)
        _check_length(subject, length, first is not None)
        ids = _alphabet(subject, tokens, alphabet, first, training_rows)
        stated = _drawn(ids, first, count, length, seed)
        made = stated.identity
    repeated, lacking = _repeated(subject, stated), ""
    try:
        subject.require("logits", "patterns")
        answer = yield Ask(repeated.rows, partial(_read, repeated), frozenset({"patterns"}))
    except PicoError as error:
        lacking = str(error)
        if subject.likelihood == "bound":
            answer = _exact_losses(subject, repeated)
        else:
            answer = yield Ask(repeated.rows, partial(_losses, repeated))
    if lacking:
        of_heads = [Reading(name, None, reason=lacking) for name in OF_HEADS]
    else:
        of_heads = list(readings_of_heads(list(OF_HEADS), answer, torch.ones(len(repeated.rows.tokens))))
    size = subject.architecture.outline.config.vocab_size
    chances = {"copy_advantage": 0.0, "induction_accuracy": 1 / size}
    of_model = [
        mean_of(name, answer[name], chance=chances.get(name, math.log(size))) for name in OF_MODEL if name in answer
    ]
    for reading in of_heads + of_model:
        yield reading._replace(rows=made)


def _losses(repeated: _Repeated, found: Pass) -> dict[str, Tensor]:
    """Read the losses of both copies of r without its first token, and whether the second was predicted, [B, K - 1]."""
    nats_BP = found.nats_BP.double()
    right_BP = (found.likeliest_BP == found.targets_BP).double().masked_fill(nats_BP.isnan(), math.nan)
    return _of_copies(repeated, nats_BP) | {"induction_accuracy": right_BP[:, repeated.second :]}


def _exact_losses(subject: Subject, repeated: _Repeated) -> Answer:
    """Return the same losses, for each row, of a model that predicts hidden tokens: its exact nats from left to right."""
    rows = replace(repeated.rows, has_targets=True, unread=subject.architecture.outline.row_length(0))
    nats_RP = torch.stack(subject.scores(rows, draws=0)).double()
    return {name: list(each) for name, each in _of_copies(repeated, nats_RP).items()}


def _of_copies(repeated: _Repeated, nats_BP: Tensor) -> dict[str, Tensor]:
    second = slice(repeated.second, None)
    first = slice(repeated.second - repeated.period, nats_BP.shape[1] - repeated.period)
    read = {
        "induction_loss": nats_BP[:, second],
        "first_copy_loss": nats_BP[:, first],
        "copy_advantage": nats_BP[:, second] - nats_BP[:, first],
    }
    if len(repeated.rows.tokens[0]) % 2 == 0:
        read["tl_evals_induction_loss"] = nats_BP[:, repeated.period + 1 :]
    return read


def _read(repeated: _Repeated, found: Pass) -> dict[str, Tensor]:
    masks_BMTT = _masks(found.tokens_BS)
    return _losses(repeated, found) | scores_of_heads(found.patterns, partial(_scores, repeated, masks_BMTT))


def _scores(repeated: _Repeated, masks_BMTT: Tensor, pattern_BNTT: Tensor) -> Tensor:
    """Return the scores of each row, in the order of `OF_HEADS`, [B, N, X]."""
    period, second, size = repeated.period, repeated.second, pattern_BNTT.shape[-1]

    def back(distance: int, first: int) -> Tensor:
        """Return the mean attention to the position so far back, over all queries from `first` on."""
        return pattern_BNTT.diagonal(-distance, -2, -1)[..., first - distance :].mean(-1)

    plain = [back(period - 1, second), back(period, second), back(1, 1), back(1, 2), pattern_BNTT[..., 1:, 0].mean(-1)]
    sums_MBN = torch.einsum("bnij,bmij->mbn", pattern_BNTT, masks_BMTT.to(pattern_BNTT.dtype))
    whole_BN, at_first_BN = pattern_BNTT.sum((-2, -1)), pattern_BNTT[..., 1:, 0].sum(-1)
    at_self_BN = pattern_BNTT.diagonal(0, -2, -1).sum(-1)
    mul = [each_BN / whole_BN for each_BN in sums_MBN[:3]]
    without = [each_BN / (whole_BN - at_first_BN - at_self_BN) for each_BN in sums_MBN[3:]]
    # sum|A - D| = sum A + sum D - 2 sum(A D), since A is between 0 and 1 and D is 0 or 1
    ones_BM = masks_BMTT.sum((-2, -1))
    off = [(whole_BN + ones_BM[:, place, None] - 2 * sums_MBN[place]) for place in range(3)]
    return torch.stack([*plain, *mul, *without, *(1 - each_BN / size for each_BN in off)], -1)


def _masks(tokens_BT: Tensor) -> Tensor:
    """Return where TransformerLens expects attention, in the order of `_LOOKED_FOR`; the same without the first token and without
    the query itself, [B, 6, T, T].
    """
    rows, size = tokens_BT.shape
    duplicate_BTT = (tokens_BT[:, :, None] == tokens_BT[:, None, :]).float().tril(-1)
    previous_BTT = torch.eye(size).roll(-1, 1).tril(-1).expand(rows, size, size)
    masks_BMTT = torch.stack([previous_BTT, duplicate_BTT, F.pad(duplicate_BTT[..., :-1], (1, 0))], 1)
    without_BMTT = masks_BMTT.tril(-1)
    without_BMTT[..., 0] = 0
    return torch.cat([masks_BMTT, without_BMTT], 1)


def _repeated(subject: Subject, stated: Rows) -> _Repeated:
    """Return rows as prompts, read whole. Raises PicoError for rows that do not repeat themselves, or that are too long."""
    lengths, context = sorted({len(row) for row in stated.tokens}), subject.architecture.context
    if len(lengths) > 1 or lengths[0] < 4:
        raise PicoError(
            f"the rows have {lengths[0]} to {lengths[-1]} tokens; expected rows [BOS, r, r] of one length of 5 or more"
        )
    if lengths[0] > context:
        raise PicoError(f"the rows have {lengths[0]} tokens, all of which are read; the model reads at most {context}")
    tokens_RT = torch.stack(stated.tokens)
    period = lengths[0] // 2
    same_R = (tokens_RT[:, 1 : lengths[0] - period] == tokens_RT[:, period + 1 :]).all(1)
    if not same_R.all():
        raise PicoError(
            f"row {int((~same_R).nonzero()[0])} does not repeat itself; expected rows [BOS, r, r], or [r, r], the first token of "
            "which may be replaced by BOS"
        )
    # The token that the first one of an even row repeats is read only if it was not replaced, as TransformerLens does.
    whole = lengths[0] % 2 == 0 and bool((tokens_RT[:, 0] == tokens_RT[:, period]).all())
    return _Repeated(training.rows_of_tokens(tokens_RT, stated.split, has_targets=False), period, period + (not whole))


def _first(subject: Subject, bos: int | Literal["none"] | None) -> int | None:
    """Return the token before r, None for none. Raises PicoError where it is not known."""
    first = first_token(subject.run) if bos is None else bos
    if first is None:
        raise PicoError(
            f"{subject.run.name}: it is not known which token its texts begin with; state its id (bos: 0), or bos: none for rows "
            "without one"
        )
    return None if first == "none" else first


def _alphabet(
    subject: Subject, tokens: str | list[int], alphabet: int, first: int | None, training_rows: str | None
) -> Tensor:
    """Return the ids that r is drawn from. Raises PicoError where they are not known."""
    size = subject.architecture.outline.config.vocab_size
    if isinstance(tokens, list):
        if first in tokens:
            raise PicoError(f"tokens holds {first}, the token before r; leave it out, or state another one (bos)")
        return torch.tensor(sorted(set(tokens)))
    counts_V = torch.ones(size, dtype=torch.long)
    if tokens == "frequent":
        counts_V = _counts(subject.run, training_rows, size).clone()
        counts_V[[number for number in special_tokens(subject.run) if number < len(counts_V)]] = 0
    if first is not None and first < len(counts_V):
        counts_V[first] = 0
    ids = counts_V.argsort(descending=True, stable=True)[: int((counts_V > 0).sum())]
    return ids if tokens == "all" else ids[:alphabet]


@lru_cache(maxsize=8)  # an analysis asks at each step, of the same run
def _counts(run: Run, place: str | None, size: int) -> Tensor:
    """Return how often each token stands in the training rows. Raises PicoError where these are not known."""
    rows = training.training_rows(run, place)
    numbers = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), COUNTED)).astype(np.int64))
    return torch.bincount(rows.tokens(numbers).flatten(), minlength=size)


def _check_length(subject: Subject, length: int, before: int) -> None:
    """Raise PicoError unless rows of `before` tokens and twice r fit into the context."""
    context, size = subject.architecture.context, 2 * length + before
    if size > context:
        raise PicoError(
            f"length {length} makes rows of {size} tokens, and the model of {subject.run.name} reads at most {context}; the "
            f"largest length is {(context - before) // 2}"
        )


def _drawn(ids: Tensor, first: int | None, count: int, length: int, seed: int) -> Rows:
    """Return rows of random tokens. Raises PicoError where there are too few to draw from."""
    if len(ids) < length:
        raise PicoError(
            f"there are {len(ids)} token(s) to draw from, and r has {length} different ones (length); state more tokens, or a "
            "smaller length"
        )
    rows_RT = []
    for row in range(count):
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(derive(seed, "induction row", row)))
        r_K = ids[order[:length]]
        rows_RT.append(torch.cat([ids.new_tensor([] if first is None else [first]), r_K, r_K]))
    return training.rows_of_tokens(torch.stack(rows_RT), has_targets=False)
