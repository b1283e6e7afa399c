"""What the model of a step says of one text: pure functions of a subject and token ids.

Legend: T tokens of the text, V vocabulary, L layers, N heads, K = L + 1 places of the residual stream.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from picolm.errors import PicoError
from picolm.models.masked import POSITIONS_AT_ONCE, Denoiser, fill
from picolm.observe.passes import Pass
from picolm.observe.rows import Rows
from picolm.observe.subject import Subject, with_threads
from picolm.observe.training import rows_of_tokens
from picolm.probes.logit_lens import check_readout

LIKELIEST = 10  # tokens that are named at each place
MOST_BYTES = 64 * 2**20  # of the patterns of one answer
Strings = Callable[[Sequence[int]], list[str]]


def why_not(subject: Subject) -> dict[str, Any]:
    """Return for each kind of answer true, or the reason why this model cannot give it: text, patterns, mixing, lens."""
    bound = subject.likelihood == "bound" and hasattr(subject.architecture.outline, "logits_at")
    needs: dict[str, tuple[str, ...]] = {
        "text": () if bound else ("logits",),
        "patterns": ("patterns",),
        "mixing": ("mixing",),
        "lens": ("logits", "hidden", "readout"),
    }
    found: dict[str, Any] = {}
    for name, asked in needs.items():
        try:
            subject.require(*asked)
            found[name] = True
        except PicoError as error:
            found[name] = str(error)
    return found


def text(subject: Subject, ids: Sequence[int], strings: Strings) -> dict[str, Any]:
    """Return what the model predicts at each token of a text, given the tokens before it.

    Aligned with the tokens: nats, rank (how many tokens are likelier), probability, entropy in nats, and the likeliest tokens;
    None (no tokens) where nothing predicts the token. next: the likeliest tokens after the last one. order: for a model that
    reveals tokens, the place of each position in the order in which it writes a text of this length after this first token.
    """
    if subject.likelihood == "bound":
        logits_TV, order = hidden_logits(subject, ids), reveal_order(subject, ids)
    else:
        logits_TV, order = _pass(subject, ids).logits_BTV[0], None
    before = int(subject.architecture.outline.row_length(0))
    log_probs_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32)).log_softmax(-1)
    predicted = len(ids) - before
    of_tokens = _predictions(log_probs_TV[:predicted], torch.tensor(ids[before:], dtype=torch.long), strings)
    found = {name: [_NOTHING[name]] * before + values for name, values in of_tokens.items()}
    after = _likeliest(log_probs_TV[predicted : predicted + 1], strings)
    known = [nats for nats in found["nats"] if nats is not None]
    mean = math.fsum(known) / len(known) if known and len(known) == predicted else None
    return found | {"next": after[0] if after else None, "mean_nats": mean, "order": order}


_NOTHING: dict[str, Any] = {"nats": None, "rank": None, "probability": None, "entropy": None, "top": []}


def _predictions(log_probs_TV: Tensor, targets_T: Tensor, strings: Strings) -> dict[str, list[Any]]:
    true_T1 = log_probs_TV.gather(-1, targets_T[:, None])
    rank_T = (log_probs_TV > true_T1).sum(-1)
    entropy_T = torch.special.entr(log_probs_TV.exp()).sum(-1)
    nats_T = numbers(-true_T1[:, 0])
    return {
        "nats": nats_T,
        "rank": [None if nats is None else rank for nats, rank in zip(nats_T, rank_T.tolist())],
        "probability": numbers(true_T1[:, 0].exp()),
        "entropy": numbers(entropy_T),
        "top": _likeliest(log_probs_TV, strings),
    }


def _likeliest(log_probs_TV: Tensor, strings: Strings) -> list[list[list[Any]]]:
    """Return the likeliest tokens at each position with their probabilities, the likeliest first."""
    log_probs_TK, ids_TK = log_probs_TV.topk(min(LIKELIEST, log_probs_TV.shape[-1]))
    probabilities = log_probs_TK.exp().tolist()
    return [
        [[string, p] for string, p in zip(strings(ids), of_token)] if math.isfinite(of_token[0]) else []
        for ids, of_token in zip(ids_TK.tolist(), probabilities)
    ]


def numbers(values: Tensor) -> list[Any]:
    """Return a tensor as lists; None in place of what is not finite."""
    return _finite(values.tolist())


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return value if math.isfinite(value) else None


def _rows(subject: Subject, ids: Sequence[int]) -> Rows:
    """Return a text as rows that are read whole; a row of one token more than the context without its last token."""
    has_targets = len(ids) > subject.architecture.context
    rows = rows_of_tokens(torch.tensor([list(ids)], dtype=torch.long), has_targets=has_targets)
    return Rows(rows.tokens, [list(range(rows.inputs(0)))], "train", has_targets, rows.identity)


def _pass(subject: Subject, ids: Sequence[int], *needs: str) -> Pass:
    return subject.forward(_rows(subject, ids), [0], needs)


@with_threads
@torch.no_grad()
def hidden_logits(subject: Subject, ids: Sequence[int]) -> Tensor:
    """Return the logits of each token but the first, which is given, where it and all later ones are hidden, [T - 1, V].

    They are those of the exact nats from left to right.
    """
    tokens_T = torch.tensor(list(ids), dtype=torch.long)
    subject.check_vocabulary(tokens_T)
    model, size, places_T = subject.model, len(ids), torch.arange(len(ids))
    found = [torch.empty(0, model.config.vocab_size)]
    for part in places_T[1:].split(max(1, POSITIONS_AT_ONCE // size)) if size > 1 else ():
        read_RT = tokens_T.expand(len(part), size).masked_fill(places_T >= part[:, None], model.mask)
        found.append(model.logits_at(read_RT, places_T == part[:, None]))
    return torch.cat(found)


@with_threads
@torch.no_grad()
def reveal_order(subject: Subject, ids: Sequence[int]) -> list[int | None]:
    """Return when each position is written after the first token of a text, from 0, the most confident position first; None for
    the first token, which is given.
    """
    model = _Watched(subject.model)
    tokens_1T = torch.full((1, len(ids)), model.mask)
    tokens_1T[0, 0] = ids[0]
    fill(model, tokens_1T, order="confident")
    return [None, *(sum(bool(where_T[place]) for where_T in model.asked) - 1 for place in range(1, len(ids)))]


class _Watched:
    """A denoiser that keeps which positions it was asked for; one is asked for until it is written."""

    def __init__(self, model: Denoiser):
        self._model, self.mask, self.asked = model, model.mask, list[Tensor]()
        self.nats_at = model.nats_at

    def logits_at(self, tokens_BT: Tensor, where_BT: Tensor) -> Tensor:
        self.asked.append(where_BT[0])
        return self._model.logits_at(tokens_BT, where_BT)


def heads(subject: Subject, ids: Sequence[int]) -> tuple[str, Tensor]:
    """Return the kind, `attention` or `mixing`, and the matrix of each head, [L, N, T of the query, T of the key], float32.

    Cut to the first tokens where it would have more than MOST_BYTES. Raises PicoError for a model that has neither.
    """
    anatomy = subject.anatomy
    shown = math.isqrt(MOST_BYTES // (4 * max(1, (anatomy.layers or 1) * (anatomy.heads or 1))))
    rows = _rows(subject, ids[: min(shown, subject.architecture.context)])
    if hasattr(subject.architecture.outline, "with_mixing"):
        return "mixing", torch.cat([each.matrix_BHTT for each in subject.forward(rows, [0], ["mixing"]).mixing]).float()
    return "attention", torch.cat(list(subject.patterns(rows).values())).float()


def head_scores(matrix_LNTT: Tensor, ids: Sequence[int]) -> dict[str, Any]:
    """Return three numbers of each head, [L][N]: mean entry of the token before, and of the first token, over queries after the
    first; and over queries whose token stands earlier in the text, of the tokens after those (None where none does).
    """
    size = matrix_LNTT.shape[-1]
    tokens_T = torch.tensor(list(ids[:size]))
    same_TT = (tokens_T[:, None] == tokens_T).tril(-1)
    after_TT = F.pad(same_TT[:, :-1], (1, 0))
    repeats = same_TT.any(-1)
    matrix_LNTT = matrix_LNTT.double()
    induction_LNT = (matrix_LNTT * after_TT).sum(-1)[..., repeats]
    none = [[None] * matrix_LNTT.shape[1]] * len(matrix_LNTT)
    return {
        "previous": numbers(matrix_LNTT.diagonal(-1, -2, -1).mean(-1)) if size > 1 else none,
        "first": numbers(matrix_LNTT[..., 1:, 0].mean(-1)) if size > 1 else none,
        "induction": numbers(induction_LNT.mean(-1)) if repeats.any() else None,
    }


@with_threads
def layers(subject: Subject, ids: Sequence[int], strings: Strings) -> dict[str, Any]:
    """Return what the model would predict if it ended after each block, [K][T]: likeliest token, its probability, nats of the
    next token (None after the last one); and the L2 norm of the residual stream.
    """
    subject.require("readout")
    found = _pass(subject, ids, "hidden")
    check_readout(subject, found)
    size = found.logits_BTV.shape[1]
    of_places: dict[str, list[Any]] = {"likeliest": [], "probability": [], "nats": [], "norm": []}
    for k, hidden_BTH in enumerate(found.hidden):
        last = k == len(found.hidden) - 1
        with torch.no_grad():
            logits_TV = (found.logits_BTV if last else subject.readout(hidden_BTH))[0]
        log_probs_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32)).log_softmax(-1)
        best = _likeliest(log_probs_TV, strings)
        true_P = log_probs_TV[: found.targets_BP.shape[1]].gather(-1, found.targets_BP[0][:, None])[:, 0]
        of_places["likeliest"].append([top[0][0] if top else None for top in best])
        of_places["probability"].append([top[0][1] if top else None for top in best])
        of_places["nats"].append(numbers(-true_P) + [None] * (size - len(true_P)))
        of_places["norm"].append(numbers(hidden_BTH[0].norm(dim=-1)))
    return {"tokens": strings(ids[:size]), **of_places}


def rows(subject: Subject, ids_RS: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """Return the exact nats of each token of each row, None for the tokens that are only read, and their mean."""
    found = list[dict[str, Any]]()
    for ids, nats_T in zip(ids_RS, subject.scores(rows_of_tokens(torch.tensor(ids_RS)), draws=0)):
        nats = [None] * (len(ids) - len(nats_T)) + numbers(nats_T)
        found.append({"nats": nats, "mean": numbers(nats_T.double().mean())})
    return found
