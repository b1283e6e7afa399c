"""Evaluations of the model in memory, during training or afterwards.

An evaluation is a function that takes the model (which scores text itself) and its rows, and returns named numbers.
`paloma` is the name used by the published configurations: perplexity over rows that may be labelled with their source.
What is computed from a bound of the likelihood is called so: `paloma_bound`, `bound_nats_per_token`. Pieces of text are scored
in batches of similar lengths, distributed over all processes.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from picolm.capture.taps import summed
from picolm.data.tokenizer import encode_text
from picolm.errors import PicoError
from picolm.models import Noise, Piece, Score
from picolm.models.generate import NotFinite
from picolm.registry import Registry
from picolm.train import noise
from picolm.train.devices import reshard

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from picolm.data import Source
    from picolm.store import Run
    from picolm.train.text import Text


log = logging.getLogger("picolm")


class Rows(NamedTuple):
    """R rows of token ids to measure on, the same at every step.

    tokens_RS: int64, cut to the length that the model needs. labels: the source of each row, or None. numbers: the row
    numbers in the data source.
    """

    tokens_RS: Tensor
    labels: list[str] | None
    numbers: np.ndarray

    @classmethod
    def take(cls, source: Source, numbers: np.ndarray, length: int | None = None) -> Rows:
        """Return the rows with these numbers, cut to `length` tokens."""
        tokens_RS = torch.as_tensor(np.asarray(source.rows(numbers))[:, :length], dtype=torch.long)
        return cls(tokens_RS, source.labels(numbers), numbers)

    @classmethod
    def sample(cls, source: Source, max_rows: int | None, length: int) -> Rows:
        """Return at most `max_rows` rows of a data source, taken from its labels in turn, so that none is missing.

        Raises DataError if the source has fewer rows than it states.
        """
        if len(
            source
        ):  # the middle row is in the shard that states far too many rows: asked for before memory is taken
            source.rows(np.array([len(source) // 2]))
        numbers = np.arange(len(source))
        labels = source.labels(numbers) if max_rows is not None and max_rows < len(source) else None
        if labels is not None:
            seen: Counter[str] = Counter()
            turns = []
            for label in labels:
                turns.append(seen[label])
                seen[label] += 1
            numbers = np.sort(np.argsort(turns, kind="stable")[:max_rows])
        return cls.take(source, numbers[:max_rows], length)

    def micro_batches(self, size: int, rank: int, world: int) -> Iterator[tuple[list[int], Tensor]]:
        """Yield (row indices, tokens) of micro-batches of `size` rows for one process, equally many on every process.

        A process that has no rows left yields one padding row with an empty list of indices, because a sharded model,
        or one that averages gradients, has to compute on all processes together. The padding row is not counted.
        """
        total = len(self.tokens_RS)
        mine = list(range(rank, total, world))
        for start in range(0, -(-total // world), size):
            places = mine[start : start + size]
            yield places, self.tokens_RS[places or [0]]


class Evaluation(NamedTuple):
    """The inputs of an evaluation.

    token_bytes_V: the number of bytes of text of each token, None without a tokenizer. text: the tokenizer of the run.
    settings: the evaluation section of its configuration. run, step: which run the model is of, and the updates before it;
    last: the last step of the run.
    """

    model: Any
    rows: Rows | None
    batch_size: int
    token_bytes_V: Tensor | None
    rank: int
    world: int
    device: torch.device
    text: Text | None = None
    settings: Any = None
    run: Run | None = None
    step: int = 0
    last: int | None = None

    @property
    def draws(self) -> int:
        """Number of random draws over which a bound of a likelihood is averaged."""
        if self.settings is None:
            return 1
        return int(self.settings.final_draws if self.step == self.last else self.settings.draws)


EVALUATIONS: Registry[Callable[[Evaluation], dict[str, float]]] = Registry("evaluation", more="picolm.probes")


def evaluate(names: tuple[str, ...], evaluation: Evaluation) -> dict[str, float]:
    """Run the evaluations in `names` with the model in evaluation mode. Returns all results by name.

    An evaluation without a value (the model computes NaN, or has no likelihood) gives NaN under its name and a warning.
    Raises PicoError if two evaluations return a result of the same name.
    """
    results: dict[str, float] = {}
    was_training = evaluation.model.training
    evaluation.model.eval()
    try:
        with torch.no_grad():
            for name in dict.fromkeys(names):
                try:
                    found = EVALUATIONS.get(name)(evaluation)
                except (NotFinite, NoLikelihood) as error:
                    log.warning("%s has no value: %s", name, error)
                    found = {name: math.nan}
                if twice := sorted(set(found) & set(results)):
                    raise PicoError(
                        f"evaluation.metrics: {name} gives {twice[0]!r}, as another evaluation does; rename it"
                    )
                results |= found
    finally:
        evaluation.model.train(was_training)
        reshard(evaluation.model)
    return results


@EVALUATIONS.add("paloma")
def paloma(evaluation: Evaluation) -> dict[str, float]:
    """Return perplexity, over all tokens and by source, and bits per byte.

    Perplexity is exp(nats per token); bits per byte are nats / (ln 2 x bytes of the targets).
    """
    if evaluation.rows is None:
        return {}
    pieces = pieces_of(evaluation.model, evaluation.rows.tokens_RS)
    scores = score(pieces, evaluation, evaluation.draws, evaluation.rows.numbers)
    if not scores.nats.isfinite().all():
        log.warning("paloma has no value: the model computes NaN or infinities; its weights may have diverged")
    tokens = torch.tensor([piece.scored for piece in pieces], dtype=torch.float64)
    table = evaluation.token_bytes_V
    text_bytes = [0 if table is None else int(table[p.tokens[len(p.tokens) - p.scored :]].sum()) for p in pieces]
    columns = torch.stack([scores.nats, tokens, torch.tensor(text_bytes, dtype=torch.float64), scores.variance], 1)
    labels = evaluation.rows.labels or [""] * len(pieces)
    names = sorted(set(labels))
    sources = torch.tensor([names.index(label) for label in labels], dtype=torch.long)
    sums = torch.zeros(len(names), 4, dtype=torch.float64).index_add_(0, sources, columns)
    family = scores.named("paloma")
    results = _scores(family, scores, *sums.sum(0).tolist())
    for name, row in zip(names, sums.tolist()):
        if name:
            results |= _scores(f"{family}/{source_name(name)}", scores, *row)
    return results


UNITS = (
    "nats_per_token",
    "bits_per_byte",
    "bound_nats_per_token",
    "bound_bits_per_byte",
    "standard_error",
    "draws",
)
_LIKE_A_UNIT = re.compile(rf"(?:.*/)?(?:{'|'.join(UNITS)})(?: \(source\))*")


def source_name(label: str) -> str:
    """Return a source label for result names, with ` (source)` added if it could be mistaken for the name of a unit."""
    return f"{label} (source)" if _LIKE_A_UNIT.fullmatch(label) else label


def _scores(
    name: str, scores: Scores, nats: float, tokens: float, text_bytes: float, variance: float
) -> dict[str, float]:
    """Return perplexity, nats per token and, if known, bits per byte; of a bound also its standard error and its draws."""
    unit = "bound_" if scores.draws else ""
    if not tokens:
        return {f"{name}/{unit}nats_per_token": math.nan}
    per_token = nats / tokens
    found = {name: math.inf if per_token > 700 else math.exp(per_token), f"{name}/{unit}nats_per_token": per_token}
    if scores.draws:
        found |= {f"{name}/standard_error": math.sqrt(variance) / tokens, f"{name}/draws": scores.draws}
    if text_bytes:  # below 0: the text of some tokens is unknown
        found[f"{name}/{unit}bits_per_byte"] = nats / (math.log(2) * text_bytes) if text_bytes > 0 else math.nan
    return found


@EVALUATIONS.add("minimal_pairs")
def minimal_pairs(evaluation: Evaluation) -> dict[str, float]:
    """Return the share of sentence pairs whose acceptable sentence is more likely, overall and by phenomenon."""
    from picolm.train.minimal_pairs import accuracy

    return accuracy(evaluation)


@EVALUATIONS.add("lm_eval")
def lm_eval(evaluation: Evaluation) -> dict[str, float]:
    """Run tasks of lm-evaluation-harness. Returns `lm_eval/TASK/METRIC`; raises PicoError if it is not installed."""
    try:
        from picolm.train.harness import run_tasks
    except ImportError as error:
        raise PicoError(f"evaluation.metrics: lm_eval needs: pip install 'picolm[lm_eval]' ({error})") from error
    return run_tasks(evaluation)


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
    draws: over which a bound is averaged; 0: `nats` are exact.
    """

    nats: Tensor
    variance: Tensor
    likeliest: Tensor
    draws: int = 0

    def named(self, name: str) -> str:
        """Return `name`, with the suffix `_bound` for what follows from a bound."""
        return f"{name}_bound" if self.draws else name

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


def token_nats(model: Any, tokens_RS: Tensor) -> Tensor:
    """Return the exact nats of each scored token of each row, [R, T], on the CPU.

    Raises NoLikelihood if the model has no likelihood, or no exact one.
    """
    require_likelihood(model)
    drawn = noise.of_scores(range(len(tokens_RS)))
    return torch.stack(scored(model, pieces_of(model, tokens_RS), 0, drawn).nats).cpu()


def score(
    pieces: Sequence[Piece], evaluation: Evaluation, draws: int = 0, numbers: Sequence[int] | np.ndarray | None = None
) -> Scores:
    """Return the scores of all pieces, on every process.

    draws: of a bound, where the model has no other likelihood; 0: exact nats. numbers: of each piece, which its draws depend on
    (default: its place). Raises NoLikelihood if the model has no likelihood, and for 0 draws if it has no exact one.
    """
    require_likelihood(evaluation.model)
    draws_used = draws if evaluation.model.likelihood == "bound" else 0
    found_N3 = torch.zeros(len(pieces), 3, dtype=torch.float64)  # zero for the pieces of other processes
    for places, batch in _batches(pieces, evaluation):
        own = [int(place if numbers is None else numbers[place]) for place in places or [0]]
        score = scored(evaluation.model, batch, draws, noise.of_scores(own, evaluation.device))
        for row, place in enumerate(places):
            found_N3[place, 0] = score.nats[row].double().sum().item()
            found_N3[place, 1] = score.standard_error[row].double().square().item()
            found_N3[place, 2] = score.likeliest is not None and bool(score.likeliest[row])
    found_N3 = summed(found_N3, evaluation.device)
    return Scores(found_N3[:, 0], found_N3[:, 1], found_N3[:, 2] > 0, draws_used)


def scored(model: Any, pieces: Sequence[Piece], draws: int, drawn: Noise) -> Score:
    """Return the score of pieces. Raises NoLikelihood for 0 draws if the model gives no exact nats."""
    try:
        found: Score = model.score(pieces, draws=draws, noise=drawn)
        if draws or found.exact:
            return found
    except NotImplementedError:
        pass
    raise NoLikelihood(
        "the likelihood of a text can only be bounded with this model, and a bound is not comparable with an exact value"
    )


def require_likelihood(model: Any) -> None:
    """Raise NoLikelihood if the model states that it has no likelihood."""
    if model.likelihood == "none":
        raise NoLikelihood("the likelihood of a text cannot be computed from this model (its likelihood is `none`)")


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
