"""Minimal pairs (Warstadt et al. 2020, BLiMP): is the acceptable sentence more likely than the unacceptable one?

The score of a sentence is the sum of the log-probabilities of all its tokens; the first token is predicted from the
end-of-text token. Files have the format of BLiMP: one JSON object per line.
"""

from __future__ import annotations

import json
from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from picolm.errors import DataError
from picolm.models import Piece
from picolm.train.evaluate import Language, score

if TYPE_CHECKING:
    from picolm.train.evaluate import Evaluation


class Pair(NamedTuple):
    """Two sentences that differ in one property. phenomenon: its name, or empty. place: file and line, for messages."""

    good: str
    bad: str
    phenomenon: str
    place: str


def accuracy(evaluation: Evaluation) -> dict[str, float]:
    """Return the share of pairs whose acceptable sentence is more likely, overall and by phenomenon.

    A tie counts as wrong. Sentences are compared by exact nats, never by bounds. Raises DataError for unusable files and
    sentences that are too long, PicoError without a tokenizer, and NotFinite if the model computes NaN.
    """
    settings, language = evaluation.settings.minimal_pairs, Language.of(evaluation, "minimal_pairs")
    pairs = read_pairs(Path(settings.path).expanduser(), settings.group_by)
    pieces = [
        _piece(sentence, pair, language, evaluation.model) for pair in pairs for sentence in (pair.good, pair.bad)
    ]
    scores = score(pieces, evaluation._replace(batch_size=settings.batch_size)).finite()
    good_P, bad_P = scores.nats.view(-1, 2).unbind(1)
    right: dict[str, list[float]] = defaultdict(list)
    for pair, correct in zip(pairs, (good_P < bad_P).tolist()):
        for name in ("minimal_pairs", *([f"minimal_pairs/{pair.phenomenon}"] if pair.phenomenon else [])):
            right[name].append(float(correct))
    return {name: sum(values) / len(values) for name, values in sorted(right.items())}


@lru_cache(maxsize=4)
def read_pairs(path: Path, group_by: str) -> tuple[Pair, ...]:
    """Return the pairs of a .jsonl file, or of all .jsonl files of a folder, sorted by name.

    Raises DataError, with file and line, for a file that cannot be read or a line that is not a pair.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    pairs = tuple(
        _pair(line, group_by, f"{file}:{number}")
        for file in files
        for number, line in enumerate(_lines(file), start=1)
        if line.strip()
    )
    if not pairs:
        raise DataError(f"evaluation.minimal_pairs.path: {path} holds no pairs (looked for lines of JSON in *.jsonl)")
    return pairs


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"evaluation.minimal_pairs.path: {file} cannot be read ({error})") from error


def _pair(line: str, group_by: str, place: str) -> Pair:
    try:
        entry: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place}: is no JSON ({error})") from error
    fields = ("sentence_good", "sentence_bad")
    if not isinstance(entry, dict) or not all(isinstance(entry.get(field), str) and entry[field] for field in fields):
        raise DataError(f"{place}: should be an object with the texts {' and '.join(fields)}; found {line[:80]!r}")
    return Pair(entry["sentence_good"], entry["sentence_bad"], str(entry.get(group_by, "")), place)


def _piece(sentence: str, pair: Pair, language: Language, model: Any) -> Piece:
    tokens, context = language.tokens(sentence), model.config.max_seq_len
    if len(tokens) + 1 > model.row_length(context):
        raise DataError(f"{pair.place}: a sentence of {len(tokens)} tokens; the context of this model is {context}")
    return Piece(torch.tensor([language.end, *tokens]), len(tokens))
