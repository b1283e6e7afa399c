"""The log-probability of pieces of text under a causal model, in batches of like lengths, spread over all processes.

Rows are padded on the right, which no earlier position of a causal model sees.

Legend: B rows of a batch, S tokens of its longest row, N pieces in all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from picolm.capture.gather import summed
from picolm.data.tokenizer import encode_text
from picolm.errors import PicoError
from picolm.models.generate import NotFinite

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from picolm.train.evaluate import Evaluation


LOGITS = 2**28  # numbers in memory at a time, at most (1 GiB in float32), where a single row does not have more


class Language(NamedTuple):
    """How a run reads text: its tokenizer, and the token that ends a document, which a text by itself is given after."""

    tokenizer: Tokenizer
    end: int

    @classmethod
    def of(cls, evaluation: Evaluation, what: str) -> Language:
        """Raises PicoError, on behalf of the evaluation `what`, where the run has no tokenizer."""
        text = evaluation.text
        if text is None or text.tokenizer is None or text.eos is None:
            raise PicoError(f"{what}: the run has no tokenizer, so it cannot read text")
        return cls(text.tokenizer, text.eos)

    def tokens(self, text: str) -> list[int]:
        """Encode text as in training: nothing is added, and text that spells a special token stays text."""
        return encode_text(self.tokenizer, text, f"{text[:60]!r}")


class Piece(NamedTuple):
    """Tokens whose last `scored` ones are asked for, given those before them."""

    tokens: Sequence[int]
    scored: int


def nats(pieces: Sequence[Piece], evaluation: Evaluation) -> Tensor:
    """Return -ln p of the scored tokens of each piece, summed, float64 [N]. Raises NotFinite."""
    sums_N = torch.zeros(len(pieces), dtype=torch.float64)
    for places, tokens_BS in _batches(pieces, evaluation):
        nats_BT = evaluation.model.token_nats(tokens_BS.to(evaluation.device)).double().cpu()
        for row, place in enumerate(places):
            sums_N[place] = nats_BT[row, _scored(pieces[place])].sum()
    return _finite(summed(sums_N, evaluation.device))  # each process has zeros in the places of the others


def nats_and_greedy(pieces: Sequence[Piece], evaluation: Evaluation) -> tuple[Tensor, Tensor]:
    """`nats`, and whether each scored token is the likeliest one at its place (bool [N]); by the logits of the batch."""
    found_N2 = torch.zeros(len(pieces), 2, dtype=torch.float64)
    longest = max((len(piece.tokens) for piece in pieces), default=1)
    rows = max(1, LOGITS // (longest * evaluation.model.config.vocab_size))
    for places, tokens_BS in _batches(pieces, evaluation._replace(batch_size=min(rows, evaluation.batch_size))):
        logits_BTV = evaluation.model(tokens_BS[:, :-1].to(evaluation.device))
        for row, place in enumerate(places):
            where = _scored(pieces[place])
            targets_P = tokens_BS[row, 1:][where].to(logits_BTV.device)
            logits_PV = logits_BTV[row, where]
            logits_PV = logits_PV.to(torch.promote_types(logits_PV.dtype, torch.float32))
            chosen_P = logits_PV.log_softmax(-1).gather(-1, targets_P[:, None])
            found_N2[place, 0] = -chosen_P.double().sum().item()
            found_N2[place, 1] = float((logits_PV.argmax(-1) == targets_P).all())
    found_N2 = summed(found_N2, evaluation.device)
    return _finite(found_N2[:, 0]), found_N2[:, 1] > 0


def _finite(nats_N: Tensor) -> Tensor:
    """Raise NotFinite where a model computes NaN: compared or averaged, it would become a number."""
    if wrong := int((~nats_N.isfinite()).sum()):
        raise NotFinite(f"the model computes NaN or infinities for {wrong} of {len(nats_N)} texts")
    return nats_N


def _batches(pieces: Sequence[Piece], evaluation: Evaluation) -> Iterator[tuple[list[int], Tensor]]:
    """(places, tokens) of the pieces of one process, the longest first; as many times on every process."""
    order = sorted(
        (place for place, piece in enumerate(pieces) if piece.scored), key=lambda place: -len(pieces[place].tokens)
    )
    mine = order[evaluation.rank :: evaluation.world]
    for start in range(0, -(-len(order) // evaluation.world), evaluation.batch_size):
        places = mine[start : start + evaluation.batch_size]
        rows = [torch.tensor(pieces[place].tokens) for place in places or order[:1]]
        yield places, torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _scored(piece: Piece) -> slice:
    """Where the scored tokens of a piece are among its targets."""
    end = len(piece.tokens) - 1
    return slice(end - piece.scored, end)
