"""Evaluations: functions of the live model, in memory, at their own cadence.

An evaluation takes the model (whose `token_nats` gives the loss of each token) and its rows, and returns named numbers. The
name `paloma` is that of the published configurations: perplexity over rows that may say which source they are from.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from picolm.capture.gather import summed
from picolm.errors import PicoError
from picolm.models import Loss, Noise
from picolm.models.generate import NotFinite
from picolm.registry import Registry
from picolm.train.strategies import reshard

if TYPE_CHECKING:
    from picolm.data import Source
    from picolm.train.text import Text


log = logging.getLogger("picolm")


class Rows(NamedTuple):
    """Rows of token ids on which something is measured, the same at every step.

    tokens_RS: inputs and shifted targets; labels: the source of each row, where there is one.
    """

    tokens_RS: Tensor
    labels: list[str] | None
    numbers: np.ndarray

    @classmethod
    def take(cls, source: Source, numbers: np.ndarray, length: int | None = None) -> Rows:
        """The rows of these numbers, cut to `length` tokens."""
        tokens_RS = torch.as_tensor(np.asarray(source.rows(numbers))[:, :length], dtype=torch.long)
        return cls(tokens_RS, source.labels(numbers), numbers)

    @classmethod
    def sample(cls, source: Source, max_rows: int | None, length: int) -> Rows:
        """At most `max_rows` rows of a data source, taken from its labels in turn so that each is represented."""
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
        """(places, tokens) of the rows of one process, `size` at a time; as many times on every process.

        A process whose rows are used up runs along on a row that has no place, since a sharded model, or one that averages
        its gradients, computes on all processes together: what comes of rows beyond the places does not count.
        """
        total = len(self.tokens_RS)
        mine = list(range(rank, total, world))
        for start in range(0, -(-total // world), size):
            places = mine[start : start + size]
            yield places, self.tokens_RS[places or [0]]


class Evaluation(NamedTuple):
    """What an evaluation may use. token_bytes_V: bytes of text behind each token, None where the tokenizer does not tell.

    text: the tokenizer of the run. settings: the evaluation section of its configuration.
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


EVALUATIONS: Registry[Callable[[Evaluation], dict[str, float]]] = Registry("evaluation")


def evaluate(names: tuple[str, ...], evaluation: Evaluation) -> dict[str, float]:
    """Return the results of all evaluations in `names`, the model in evaluation mode meanwhile.

    An evaluation of a model that computes NaN gives NaN under its name, and the log says why.
    """
    results: dict[str, float] = {}
    was_training = evaluation.model.training
    evaluation.model.eval()
    try:
        with torch.no_grad():
            for name in dict.fromkeys(names):
                try:
                    found = EVALUATIONS.get(name)(evaluation)
                except NotFinite as error:
                    log.warning("%s has no value: %s; its weights may have diverged", name, error)
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
    """Perplexity exp(nats per token) over all tokens and by source; bits per byte = nats / (ln 2 x bytes of the targets)."""
    if evaluation.rows is None:
        return {}
    labels = evaluation.rows.labels or [""] * len(evaluation.rows.tokens_RS)
    names = sorted(set(labels))
    sums = _sums_by_source(evaluation, labels, names)
    if not sums[:, 0].isfinite().all():
        log.warning("paloma has no value: the model computes NaN or infinities; its weights may have diverged")
    results = _scores("paloma", *sums.sum(0).tolist())
    for name, row in zip(names, sums.tolist()):
        if name:
            results |= _scores(f"paloma/{source_name(name)}", *row)
    return results


UNITS = ("nats_per_token", "bits_per_byte")
_LIKE_A_UNIT = re.compile(rf"(?:.*/)?(?:{'|'.join(UNITS)})(?: \(source\))*")


def source_name(label: str) -> str:
    """A source as the names of results have it: one that ends as the name of a unit does is told apart from the unit."""
    return f"{label} (source)" if _LIKE_A_UNIT.fullmatch(label) else label


def _sums_by_source(evaluation: Evaluation, labels: list[str], names: list[str]) -> Tensor:
    """[sources, 3] float64: nats, predicted tokens and bytes of text."""
    assert evaluation.rows is not None
    sums = torch.zeros(len(names), 3, dtype=torch.float64)
    some = _predicts_some(evaluation)
    size = 1 if some else evaluation.batch_size  # so that a loss tells the tokens of one row
    for places, tokens_BS in evaluation.rows.micro_batches(size, evaluation.rank, evaluation.world):
        nats_BT = evaluation.model.token_nats(tokens_BS.to(evaluation.device))[: len(places)]
        nats_B, targets_BT = nats_BT.double().sum(1).cpu(), tokens_BS[: len(places), 1:]
        count = float(_own_loss(evaluation, tokens_BS).tokens) if some else nats_BT.shape[1]
        tokens_B = torch.full_like(nats_B, count)
        table = evaluation.token_bytes_V if count == targets_BT.shape[1] else None  # else: the bytes of which tokens?
        bytes_B = table[targets_BT].sum(1).double() if table is not None else torch.zeros(len(places)).double()
        row_sums = torch.stack([nats_B, tokens_B, bytes_B], dim=1)
        sources = torch.tensor([names.index(labels[place]) for place in places], dtype=torch.long)
        sums.index_add_(0, sources, row_sums)
    return summed(sums, evaluation.device)


def _predicts_some(evaluation: Evaluation) -> bool:
    """Whether `token_nats` has the terms of a loss that predicts some of the targets only, with zeros elsewhere.

    Then `Loss.tokens` counts what was predicted. A `token_nats` that is not the terms of the loss has a term for each token
    that it scores. Asked of the first row, on all processes together.
    """
    assert evaluation.rows is not None
    if not hasattr(evaluation.model, "loss"):
        return False
    row_1S = evaluation.rows.tokens_RS[:1]
    terms, loss = evaluation.model.token_nats(row_1S.to(evaluation.device)), _own_loss(evaluation, row_1S)
    return int(loss.tokens) != terms.numel() and math.isclose(
        float(loss.nats), float(terms.double().sum()), rel_tol=1e-3
    )


def _own_loss(evaluation: Evaluation, tokens_1S: Tensor) -> Loss:
    loss: Loss = evaluation.model.loss(tokens_1S.to(evaluation.device), Noise([0], evaluation.device))
    return loss


def _scores(name: str, nats: float, tokens: float, text_bytes: float) -> dict[str, float]:
    if not tokens:
        return {f"{name}/nats_per_token": math.nan}
    per_token = nats / tokens
    scores = {name: math.inf if per_token > 700 else math.exp(per_token), f"{name}/nats_per_token": per_token}
    if text_bytes:  # below 0: some tokens stand for text that is not known
        scores[f"{name}/bits_per_byte"] = nats / (math.log(2) * text_bytes) if text_bytes > 0 else math.nan
    return scores


@EVALUATIONS.add("minimal_pairs")
def minimal_pairs(evaluation: Evaluation) -> dict[str, float]:
    """The share of sentence pairs of which the acceptable one is likelier, in all and by phenomenon."""
    from picolm.train.minimal_pairs import accuracy

    return accuracy(evaluation)


@EVALUATIONS.add("lm_eval")
def lm_eval(evaluation: Evaluation) -> dict[str, float]:
    """Tasks of lm-evaluation-harness: `lm_eval/TASK/METRIC`."""
    try:
        from picolm.train.harness import run_tasks
    except ImportError as error:
        raise PicoError(f"evaluation.metrics: lm_eval needs: pip install 'picolm[lm_eval]' ({error})") from error
    return run_tasks(evaluation)
