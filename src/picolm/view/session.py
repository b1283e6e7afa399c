"""A session: the opened runs, and the answers to what the page asks of them.

An answer that is kept is read; else the model of the run is filled with the weights of the step, one question at a time.
"""

import json
import struct
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field

from picolm import __version__
from picolm.store import Run
from picolm.view import about, answers
from picolm.view.cached import Answers
from picolm.view.refusal import Refused
from picolm.view.viewed import Asked, Viewed

MOST_CHARACTERS = 20_000
Number = Annotated[int, Field(ge=0, lt=2**53)]


class Row(BaseModel, extra="forbid"):
    """A row that a step keeps."""

    split: Literal["train", "val"]
    step: Number
    index: Number


class Question(BaseModel, extra="forbid"):
    """What the page asks of a run: of a text, or of a row; at a step, or at steps (None: all)."""

    run: Number
    step: Number = 0
    text: Annotated[str, Field(max_length=MOST_CHARACTERS)] | None = None
    row: Row | None = None
    layer: Number | None = None
    steps: Annotated[list[Number], Field(max_length=100_000)] | None = None


class Session:
    """The runs of a page. Answers are bytes: JSON, or for patterns a header and numbers."""

    def __init__(self, places: Sequence[str], answers: Answers | None = None, analyses: Sequence[str] = ()):
        """Open the runs. Raises PicoError for a place without one."""
        self.answers, self.analyses = answers or Answers(), list(analyses)
        opened = [(Run.open(place), str(place)) for place in places]
        self.runs = [Viewed(number, run, place, self.answers) for number, (run, place) in enumerate(opened)]

    def run(self, number: int) -> Viewed:
        """Return a run. Raises Refused where there is none, or it was deleted."""
        if number >= len(self.runs):
            raise Refused(f"there is no run {number}; the page shows {len(self.runs)}", 404)
        if self.runs[number].is_gone:
            raise Refused(f"the run {self.runs[number].run.name} is gone: its folder was deleted or moved", 410)
        return self.runs[number]

    def describe(self) -> dict[str, Any]:
        """Return what the page is told at its start. A run that is gone is left out."""
        there = [about.describe(viewed) for viewed in self.runs if not viewed.is_gone]
        return {"version": __version__, "read_only": True, "runs": there}

    def read(self, question: Question) -> tuple[Viewed, Asked]:
        """Return the run and the token ids of a question. Raises PicoError."""
        viewed = self.run(question.run)
        if (question.text is None) == (question.row is None):
            raise Refused("ask of a text, or of a row: one of the two")
        if question.row is not None:
            return viewed, viewed.row(question.row.split, question.row.step, question.row.index)
        return viewed, viewed.text(question.text or "")

    def steps(self, question: Question) -> list[int]:
        """Return the steps that a question is about, ascending: those named, or all with weights."""
        there = self.run(question.run).steps()
        return list(there) if question.steps is None else sorted(set(question.steps))

    def kept(self, kind: str, viewed: Viewed, step: int, ids: Sequence[int]) -> bytes | None:
        """Return an answer that is kept, None for one that has to be computed."""
        return self.answers.get(_key(kind, viewed, step, ids))

    def answer(self, kind: str, viewed: Viewed, step: int, ids: Sequence[Any]) -> bytes:
        """Return an answer, computed unless it is kept. Raises PicoError."""
        key = _key(kind, viewed, step, ids)
        with viewed.asking:
            if (found := self.answers.get(key)) is None:
                found = KINDS[kind](viewed.at(step), viewed, list(ids))
                self.answers.put(key, found)
        return found


def _key(kind: str, viewed: Viewed, step: int, ids: Sequence[Any]) -> str:
    return f"{kind}\n{viewed.key(step)}\n{list(ids)}"


def to_json(value: Any) -> bytes:
    """Return a value as JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode(errors="replace")


def _text(subject: Any, viewed: Viewed, ids: list[int]) -> bytes:
    return to_json(answers.text(subject, ids, viewed.words))


def _layers(subject: Any, viewed: Viewed, ids: list[int]) -> bytes:
    return to_json(answers.layers(subject, ids, viewed.words))


def _heads(subject: Any, viewed: Viewed, ids: list[int]) -> bytes:
    kind, matrix_LNTT = answers.heads(subject, ids)
    return pack(kind, matrix_LNTT, viewed.words(ids[: matrix_LNTT.shape[-1]]))


def _head_scores(subject: Any, viewed: Viewed, ids: list[int]) -> bytes:
    kind, matrix_LNTT = answers.heads(subject, ids)
    return to_json({"kind": kind, **answers.head_scores(matrix_LNTT, ids)})


def _rows(subject: Any, viewed: Viewed, ids: list[Any]) -> bytes:
    return to_json(answers.rows(subject, ids))


KINDS: dict[str, Callable[[Any, Viewed, list[Any]], bytes]] = {
    "rows": _rows,
    "text": _text,
    "layers": _layers,
    "heads": _heads,
    "head-scores": _head_scores,
}


def pack(kind: str, matrix_LNTT: torch.Tensor, tokens: list[str], first_layer: int = 0) -> bytes:
    """Return matrices as bytes: the length of a JSON header (uint32), the header, and float32 numbers, all little-endian."""
    numbers = matrix_LNTT.contiguous().numpy().astype("<f4", copy=False)
    about = {
        "shape": list(numbers.shape),
        "dtype": "float32",
        "kind": kind,
        "tokens": tokens,
        "first_layer": first_layer,
    }
    header = to_json(about)
    return struct.pack("<I", len(header)) + header + numbers.tobytes()


def layer_of(packed: bytes, layer: int) -> bytes:
    """Return one layer of packed matrices. Raises Refused where there is none."""
    (size,) = struct.unpack_from("<I", packed)
    about = json.loads(packed[4 : 4 + size])
    numbers = np.frombuffer(packed, "<f4", offset=4 + size).reshape(about["shape"])
    if layer >= len(numbers):
        raise Refused(f"the model has {len(numbers)} layers; there is no layer {layer}", 404)
    return pack(about["kind"], torch.tensor(numbers[layer : layer + 1]), about["tokens"], layer)


def text_of(asked: Asked, viewed: Viewed, step: int, found: bytes) -> dict[str, Any]:
    """Return the whole answer to a question about a text: what is kept, and what the question itself says."""
    told = {"run": viewed.number, "step": step, "likelihood": viewed.subject.likelihood, "truncated": asked.truncated}
    return told | {"ids": asked.ids, "tokens": viewed.words(asked.ids), "seen_at": asked.seen_at} | json.loads(found)


HISTORY = ("nats", "rank", "probability", "mean_nats")


def line_of(kind: str, step: int, found: bytes) -> dict[str, Any]:
    """Return the line of a stream that a step's answer gives: of a text, its history; of heads, their scores."""
    answer = json.loads(found)
    return {"step": step} | ({name: answer[name] for name in HISTORY} if kind == "text" else answer)
