"""How far a model has memorized rows: their loss by when they were seen, what can be extracted, and planted canaries.

Greedy decoding from a prompt gives the whole continuation exactly if each of its tokens is the likeliest one after the true
tokens before it, and its first wrong token is the first that is not: one forward pass answers both.

Legend: R rows, B of a pass, P predicted positions, M tokens of the continuation.
"""

import math
from collections.abc import Generator, Iterator, Sequence
from itertools import groupby, pairwise
from typing import Annotated, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from picolm.data.batches import permute
from picolm.data.canaries import random_rows
from picolm.errors import PicoError
from picolm.observe.passes import Answer, Ask, Pass
from picolm.observe.rows import Rows, held_out
from picolm.observe.subject import Subject
from picolm.observe.training import Canary, SeenRows, rows_of_tokens
from picolm.probes.means import difference_of, mean_of
from picolm.probes.probe import Found, Quantity, Reading, probe

_OF = {
    "": "the stated rows; without such, sampled training rows that the checkpoint has seen",
    "band_": "training rows that were first seen in these batches",
    "unseen_": "rows that the checkpoint has not seen",
    "canary_": "this canary",
    "row_": "this row",
}
_WHAT = {
    "loss": Quantity("nats", "mean loss of {}"),
    "extractable": Quantity("share of rows", "greedy decoding from the prompt gives the whole continuation, of {}"),
    "token_accuracy": Quantity(
        "share of tokens", "the likeliest next token, after the true ones, is that of the continuation, of {}"
    ),
    "matched_prefix": Quantity(
        "tokens", "number of tokens that greedy decoding gets right before its first error, of {}"
    ),
    "score": Quantity("share of tokens", "tokens of the continuation that greedy decoding has at their place, of {}"),
}
_CANDIDATES = 64  # rows looked at for each row wanted that was never seen


class Measured(NamedTuple):
    """What was found of a row. nats: [P]. hits: 1 where the continuation is the likeliest token, [M]; empty for a row that is
    too short, NaN where the model computes no number. score: 1 where greedy decoding has it, [M]; None if not asked for.
    rows: digest of the rows that were asked about with it.
    """

    nats: Tensor
    hits: Tensor
    score: Tensor | None
    rows: str


class Sampled(NamedTuple):
    """A training row: its number, and the batches of the whole run that hold it."""

    number: int
    batches: list[int]

    def is_seen(self, step: int) -> bool:
        """Return whether the checkpoint of a step has seen it."""
        return bool(self.batches) and self.batches[0] < step


class Question(NamedTuple):
    """What is asked of each row; see the options of the probe."""

    prompt: int
    continuation: int
    greedy: bool

    def measure(self, rows: Rows) -> Generator[Ask, Answer, list[Measured]]:
        """Ask about rows, and return what was found of each."""
        answer = yield Ask(rows, self._read)
        scores: list[Tensor | None] = [None] * len(rows.tokens)
        long = [row for row, hits in enumerate(answer["hits"]) if len(hits)] if self.greedy else []
        if long:
            tokens = [rows.tokens[row] for row in long]
            decoded = yield from self._decode(torch.stack([row[: self.prompt] for row in tokens]))
            for row, of_row, true in zip(long, decoded, tokens):
                equal = of_row == true[self.prompt : self.prompt + self.continuation]
                scores[row] = torch.where(answer["hits"][row].isnan(), torch.nan, equal.double())
        return [Measured(*each, rows.identity) for each in zip(answer["nats"], answer["hits"], scores)]

    def _read(self, found: Pass) -> dict[str, Tensor]:
        nats_BP, first = found.nats_BP, self.prompt - 1
        if first + self.continuation > nats_BP.shape[1]:
            return {"nats": nats_BP, "hits": nats_BP[:, :0]}
        part = slice(first, first + self.continuation)
        hits_BM = found.logits_BTV[:, part].argmax(-1) == found.targets_BP[:, part]
        return {"nats": nats_BP, "hits": torch.where(nats_BP[:, part].isnan(), torch.nan, hits_BM.double())}

    def _decode(self, tokens_RT: Tensor) -> Generator[Ask, Answer, Tensor]:
        """Return the tokens that greedy decoding adds to each prompt, [R, M]: each time one pass over all tokens."""
        for _ in range(self.continuation):
            answer = yield Ask(rows_of_tokens(tokens_RT, has_targets=False), _likeliest)
            tokens_RT = torch.cat([tokens_RT, torch.stack(answer["token"])[:, None]], dim=1)
        return tokens_RT[:, self.prompt :]

    def readings(
        self, of: str, rows: Sequence[Measured], note: str = "", bin: str = "", none: str = ""
    ) -> Iterator[Reading]:
        """Yield the means over rows, with names that begin with `of`. none: why there is no row, if there is none."""
        long = [row for row in rows if len(row.hits)]
        short = f"a row has to have {self.prompt + self.continuation} tokens, for prompt and continuation"
        if 0 < len(long) < len(rows):
            note = "; ".join(filter(None, (note, f"{len(rows) - len(long)} rows left out of extraction: {short}")))
        values = {
            "loss": [row.nats for row in rows],
            "extractable": [row.hits.prod() for row in long],
            "token_accuracy": [row.hits for row in long],
            "matched_prefix": [row.hits.cumprod(0).sum() for row in long],
            "score": [row.score for row in long if row.score is not None],
        }
        for name, numbers in values.items():
            reading = mean_of(of + name, numbers, note=note, bin=bin, rows=rows[0].rows if rows else "")
            if not numbers:
                reading = reading._replace(reason=short if rows else none)
            if name != "score" or self.greedy:
                yield reading


@probe(
    "memorization",
    needs=["logits"],
    gives={
        **{
            of + name: Quantity(what.units, what.definition.format(rows))
            for of, rows in _OF.items()
            for name, what in _WHAT.items()
        },
        "counterfactual": Quantity(
            "nats", "loss of rows not seen minus loss of sampled rows seen, at the same checkpoint"
        ),
        "exposure": Quantity(
            "bits", "log2(references + 1) - log2(rank of the loss of a canary among random rows of its alphabet)"
        ),
    },
)
def memorization(
    subject: Subject,
    stated: Rows | None,
    *,
    prompt: Annotated[int, Field(ge=1)] = 16,
    continuation: Annotated[int, Field(ge=1)] = 16,
    greedy: bool = False,
    per_row: bool | None = None,
    bands: Annotated[int, Field(ge=1, le=1000)] = 8,
    rows_per_band: Annotated[int, Field(ge=1, le=10_000)] = 16,
    references: Annotated[int, Field(ge=1, le=100_000)] = 255,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> Found:
    """Measure what is remembered of training rows: those of several ranges of batches, rows never seen, and canaries.

    A checkpoint of step S has seen batches 0 to S - 1. Ranges are log-spaced from the start of the run to its end, and their
    rows are the same at each step, so that their curves show the loss before and after they are seen. Rows never seen: of the
    training data; where the run reads all of it, those not read yet; then held-out rows. The difference at one checkpoint
    estimates counterfactual memorization (Zhang et al. 2021) without training again. Extraction as in Carlini et al. 2023:
    `prompt` tokens, then `continuation` tokens, from the start of a row. Exposure as in Carlini et al. 2019, estimated from
    `references` random rows; positions at which all canaries of a group are the same are the same in these; their mean loss is
    the chance level of `canary_loss`. Stated rows
    (`rows:`) are measured in place of all this, with any series. greedy: also decode, for `score`. per_row: a value of each
    row, with the batches that hold it (default: of stated rows).
    """
    question = Question(prompt, continuation, greedy)
    if stated is not None:
        yield from _stated(subject, stated, question, per_row is not False)
        return
    try:
        seen = SeenRows(subject.run)
    except PicoError as error:
        raise PicoError(f"{error}; state the rows to ask about (rows: FILE.npy)") from error
    step, (of_bands, others) = subject.checkpoint.step, _sample(seen, bands, rows_per_band, seed)
    sampled = [row for _, rows in of_bands for row in rows]
    found = yield from _ask(question, seen, sampled)
    for label, rows in of_bands:
        note = f"{sum(row.is_seen(step) for row in rows)} of {len(rows)} rows seen before this step"
        none = "no row is seen for the first time in these batches"
        yield from question.readings("band_", [found[row.number] for row in rows], note, label, none)
    before = [found[row.number] for row in sampled if row.is_seen(step)]
    known = list(question.readings("", before, none="this checkpoint has seen none of these rows"))
    unread, measured, why = yield from _unseen(question, subject, seen, others, rows_per_band)
    unknown = list(question.readings("unseen_", measured, why, none=f"there are no {why}"))
    yield from [*known, *unknown, difference_of("counterfactual", unknown[0], known[0], unknown[0].note)]
    if per_row:
        for row, of_row in zip([*sampled, *unread], [*found.values(), *measured]):
            yield from question.readings("row_", [of_row], _when(row.batches, step), bin=str(row.number))
    if seen.canaries:
        yield from _canaries(question, seen.canaries, step, references, seed)


def _stated(subject: Subject, stated: Rows, question: Question, per_row: bool) -> Found:
    if not stated.has_targets:
        raise PicoError("prompts have no continuation to compare with; give a file of token ids or of texts")
    measured = yield from question.measure(stated)
    yield from question.readings("", measured)
    if per_row:
        notes = _where(subject, stated.tokens)
        for number, (of_row, note) in enumerate(zip(measured, notes)):
            yield from question.readings("row_", [of_row], note, bin=str(number))


def _where(subject: Subject, tokens: Sequence[Tensor]) -> list[str]:
    """Return for each row the batches of the run that hold it, as text; nothing where that is not known."""
    try:
        seen = SeenRows(subject.run)
    except PicoError:
        return [""] * len(tokens)
    found, batches = seen.find(tokens), list[set[int]]()
    of_number = dict(zip(numbers := sorted({n for of_row in found for n in of_row}), seen.seen_at(numbers, seen.end)))
    for row, of_row in zip(tokens, found):
        batches.append({batch for number in of_row for batch in of_number[number]})
        batches[-1].update(step for canary in seen.canaries if torch.equal(canary.tokens, row) for step in canary.steps)
    return [_when(sorted(each), subject.checkpoint.step) for each in batches]


def _when(batches: Sequence[int], step: int, most: int = 8) -> str:
    """Return the batches that hold a row, as text."""
    if not batches:
        return "never seen in this run"
    shown = ", ".join(map(str, batches[:most])) + (f", … {batches[-1]}" if len(batches) > most else "")
    before = sum(each < step for each in batches)
    return f"in batch{'es' if len(batches) > 1 else ''} {shown}; seen {before} of {len(batches)} times before this step"


def _sample(
    seen: SeenRows, bands: int, rows_per_band: int, seed: int
) -> tuple[list[tuple[str, list[Sampled]]], list[Sampled]]:
    """Return by range of batches the rows that were first seen there, and other rows drawn from all of the data."""
    edges, drawn = _edges(seen.end, bands), list[list[int]]()
    for number, (first, end) in enumerate(pairwise(edges)):
        size = (end - first) * seen.rows_per_step
        places = permute(np.arange(min(rows_per_band, size)), size, seed, "memorization", number)
        batches = [(seen.of_step(first + int(at) // seen.rows_per_step), int(at) % seen.rows_per_step) for at in places]
        drawn.append([int(of_batch[place % len(of_batch)]) for of_batch, place in batches if len(of_batch)])
    candidates = permute(np.arange(min(_CANDIDATES * rows_per_band, len(seen))), len(seen), seed, "memorization others")
    numbers = list(dict.fromkeys([*(each for band in drawn for each in band), *map(int, candidates)]))
    batches_of = dict(zip(numbers, seen.seen_at(numbers, seen.end)))
    found = list[tuple[str, list[Sampled]]]()
    for (first, end), of_band in zip(pairwise(edges), drawn):
        rows = [Sampled(each, batches_of[each]) for each in dict.fromkeys(of_band) if batches_of[each][0] >= first]
        found.append((f"{first}-{end - 1}" if end - first > 1 else str(first), rows))
    in_bands = {row.number for _, rows in found for row in rows}
    return found, [Sampled(each, batches_of[each]) for each in map(int, candidates) if each not in in_bands]


def _edges(end: int, bands: int) -> list[int]:
    """Return the first batches of log-spaced ranges of the batches 0 to `end` - 1, and `end`; fewer ranges for few batches."""
    return sorted({0, end, *(round(end ** (number / (bands - 1))) for number in range(bands) if bands > 1 and end)})


def _ask(question: Question, seen: SeenRows, rows: Sequence[Sampled]) -> Generator[Ask, Answer, dict[int, Measured]]:
    """Return what was found of training rows by their numbers."""
    numbers = [row.number for row in rows]
    measured = (yield from question.measure(rows_of_tokens(seen.tokens(numbers)))) if numbers else []
    return dict(zip(numbers, measured))


def _unseen(
    question: Question, subject: Subject, seen: SeenRows, others: Sequence[Sampled], enough: int
) -> Generator[Ask, Answer, tuple[list[Sampled], list[Measured], str]]:
    """Return rows that the checkpoint has not seen, without held-out ones, what was found of all, and which they are."""
    rows, why = [row for row in others if not row.batches], "training rows that the run never reads"
    if len(rows) < enough:
        rows = [row for row in others if not row.is_seen(subject.checkpoint.step)]
        why = "training rows of later batches, as the run reads nearly all of its data"
    if len(rows) < enough:
        try:
            held = torch.stack(held_out(subject.run)[: 4 * enough])
        except PicoError as error:
            why = f"training rows that are not read yet; {error}"
        else:
            measured = yield from question.measure(rows_of_tokens(held))
            return [], measured, "held-out rows, as nearly all training rows were seen"
    found = yield from _ask(question, seen, rows[: 4 * enough])
    return rows[: 4 * enough], list(found.values()), why


def _canaries(question: Question, canaries: Sequence[Canary], step: int, references: int, seed: int) -> Found:
    measured = yield from question.measure(rows_of_tokens(torch.stack([canary.tokens for canary in canaries])))
    numbered = enumerate(zip(canaries, measured))
    for group, (_, members) in enumerate(groupby(numbered, key=lambda each: id(each[1][0].alike))):
        of_group = list(members)
        losses_R = yield from _references(of_group[0][1][0], references, seed, group)
        for number, (canary, of_row) in of_group:
            note = ": ".join(filter(None, (canary.group, _when(canary.steps, step))))
            others = None if losses_R is None else float(losses_R.mean()) / len(of_row.nats)
            for reading in question.readings("canary_", [of_row], note, bin=str(number)):
                yield reading._replace(chance=others) if reading.name == "canary_loss" else reading
            yield _exposure(float(of_row.nats.double().sum()), losses_R, str(number))


def _references(like: Canary, count: int, seed: int, group: int) -> Generator[Ask, Answer, Tensor | None]:
    """Return the losses of random rows of the alphabet of a canary, in nats, [R]; None for an alphabet of one token."""
    if len(like.alphabet) < 2:
        return None
    tokens_RS = random_rows(count, len(like.tokens), like.alphabet, seed, "memorization references", group)
    format_S = (like.alike == like.alike[0]).all(0)
    if len(like.alike) > 1 and not format_S.all():
        tokens_RS[:, format_S] = like.alike[0, format_S]
    answer = yield Ask(rows_of_tokens(torch.from_numpy(tokens_RS)), _losses)
    return torch.stack(answer["nats"])


def _exposure(nats: float, losses_R: Tensor | None, label: str) -> Reading:
    """Return the exposure of a canary. Losses that are the same share their ranks; chance: the mean over all ranks."""
    if losses_R is None:
        return Reading(
            "exposure", None, bin=label, reason="the alphabet of the canary has one token, so no row differs"
        )
    if math.isnan(nats) or bool(losses_R.isnan().any()):
        return Reading("exposure", None, bin=label, reason="a loss is not a number here")
    total = len(losses_R) + 1
    rank = 1 + int((losses_R < nats).sum()) + int((losses_R == nats).sum()) / 2
    chance = math.log2(total) - math.lgamma(total + 1) / math.log(2) / total
    note = f"at most {math.log2(total):.3g} bits with {total - 1} references"
    return Reading("exposure", math.log2(total / rank), bin=label, chance=chance, note=note)


def _losses(found: Pass) -> dict[str, Tensor]:
    return {"nats": found.nats_BP.double().sum(-1)}


def _likeliest(found: Pass) -> dict[str, Tensor]:
    return {"token": found.logits_BTV[:, -1].argmax(-1)}
