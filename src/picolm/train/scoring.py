"""Score pieces of text with the model of an evaluation, in batches of similar lengths, distributed over all processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from picolm.capture.gather import summed
from picolm.data.tokenizer import encode_text
from picolm.errors import PicoError
from picolm.models import Noise, Piece
from picolm.models.generate import NotFinite
from picolm.seeds import derive

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from picolm.train.evaluate import Evaluation


class NoLikelihood(PicoError):
    """The error for scoring text with a model whose likelihood cannot be computed."""


class Language(NamedTuple):
    """The tokenizer of a run and `end`, its end-of-text token, which precedes a text that is scored on its own."""

    tokenizer: Tokenizer
    end: int

    @classmethod
    def of(cls, evaluation: Evaluation, what: str) -> Language:
        """Return the language of the run. Raises PicoError without a tokenizer. what: the evaluation, for messages."""
        text = evaluation.text
        if text is None or text.tokenizer is None or text.eos is None:
            raise PicoError(f"{what}: the run has no tokenizer, so it cannot read text")
        return cls(text.tokenizer, text.eos)

    def tokens(self, text: str) -> list[int]:
        """Return the token ids of a text, encoded as in training: no tokens are added, and text that spells a special
        token is encoded as plain text.
        """
        return encode_text(self.tokenizer, text, f"{text[:60]!r}")


class Scores(NamedTuple):
    """The scores of N pieces, as tensors of shape [N], float64 unless stated.

    nats: -ln p of each piece, summed over its scored tokens, or a bound of it. variance: of `nats`, if they are
    estimated from random draws, else 0. likeliest: bool, whether every scored token is the most likely at its position.
    """

    nats: Tensor
    variance: Tensor
    likeliest: Tensor

    def finite(self) -> Scores:
        """Return these scores. Raises NotFinite for NaN and infinities, which comparisons would hide."""
        if wrong := int((~self.nats.isfinite()).sum()):
            raise NotFinite(
                f"the model computes NaN or infinities for {wrong} of {len(self.nats)} texts; its weights may have diverged"
            )
        return self


def pieces_of(model: Any, tokens_RS: Tensor) -> list[Piece]:
    """Return rows of tokens as pieces in which all tokens are scored except those that the model does not predict."""
    read = model.row_length(0)
    return [Piece(tokens_S, len(tokens_S) - read) for tokens_S in tokens_RS]


def token_nats(model: Any, tokens_RS: Tensor, draws: int = 1) -> Tensor:
    """Return the nats of each scored token of each row, [R, T], on the CPU.

    Raises NoLikelihood if the model has no likelihood.
    """
    require_likelihood(model)
    score = model.score(pieces_of(model, tokens_RS), draws=draws, noise=_noise(range(len(tokens_RS)), "cpu"))
    return torch.stack(score.nats).cpu()


def score(pieces: Sequence[Piece], evaluation: Evaluation) -> Scores:
    """Return the scores of all pieces, on every process. Raises NoLikelihood if the model has no likelihood."""
    require_likelihood(evaluation.model)
    found_N3 = torch.zeros(len(pieces), 3, dtype=torch.float64)  # zero for the pieces of other processes
    for places, batch in _batches(pieces, evaluation):
        noise = _noise(places or [-1], evaluation.device)
        score = evaluation.model.score(batch, draws=evaluation.draws, noise=noise)
        for row, place in enumerate(places):
            found_N3[place, 0] = score.nats[row].double().sum().item()
            found_N3[place, 1] = score.standard_error[row].double().square().item()
            found_N3[place, 2] = score.likeliest is not None and bool(score.likeliest[row])
    found_N3 = summed(found_N3, evaluation.device)
    return Scores(found_N3[:, 0], found_N3[:, 1], found_N3[:, 2] > 0)


def require_likelihood(model: Any) -> None:
    """Raise NoLikelihood if the model states that it has no likelihood."""
    if model.likelihood == "none":
        raise NoLikelihood("the likelihood of a text cannot be computed from this model (its likelihood is `none`)")


def _noise(places: Sequence[int] | range, device: Any) -> Noise:
    """Return the noise for pieces by their indices: the same at every step, for any batch size and number of processes."""
    return Noise([derive(0, "score", place) for place in places], device)


def _batches(pieces: Sequence[Piece], evaluation: Evaluation) -> Iterator[tuple[list[int], list[Piece]]]:
    """Yield (indices, pieces) for the batches of one process, longest pieces first, equally many on every process.

    A process that has no pieces left yields one padding piece with an empty list of indices, because a sharded model
    has to compute on all processes together.
    """
    order = sorted(
        (place for place, piece in enumerate(pieces) if piece.scored), key=lambda place: -len(pieces[place].tokens)
    )
    mine = order[evaluation.rank :: evaluation.world]
    for start in range(0, -(-len(order) // evaluation.world), evaluation.batch_size):
        places = mine[start : start + evaluation.batch_size]
        yield places, [pieces[place] for place in places or order[:1]]
