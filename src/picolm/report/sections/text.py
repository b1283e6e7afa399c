"""Section: rows of the captured batch as text, each token coloured by its loss under the weights of the step."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from picolm.errors import PicoError, StoreError
from picolm.report.material import Material
from picolm.report.render import render
from picolm.report.section import SECTIONS, Section
from picolm.store import Run
from picolm.store.checkpoint import Missing, SealedCheckpoint

ROWS, TOKENS, STEPS = 2, 256, 6  # rows per split, tokens per row, steps per run
MOST_PARAMETERS = 100_000_000  # for larger models the forward passes take longer than the rest of the report


@dataclass
class Token:
    """A piece of text and its loss in nats; None if nothing predicts it, at the start of a row. heat: percent of the
    scale.
    """

    text: str
    nats: float | None
    heat: float
    hover: str


@dataclass
class Row:
    heading: str
    tokens: list[Token]


@SECTIONS.add("text")
def text(material: Material) -> Section | None:
    """Return the text of local runs of moderate size that keep weights, rows and a tokenizer; else None."""
    shown = [html for run in material.runs if (html := _shown(material, run, len(material.runs) > 1)) is not None]
    lead = (
        "What the model read at a step, and how surprised it was: the stronger the colour, the higher the loss of the token "
        "given those before it, in nats, with the weights of that step. Held-out rows are the same at each step."
    )
    return Section("Text", shown, lead) if shown else None


def _shown(material: Material, run: Run, named: bool) -> Any:
    """Return the rows of some steps as HTML. Steps that training deletes or thins meanwhile are noted and left out."""
    from picolm.train.evaluate import NoLikelihood

    steps = spread([step for step in run if _readable(run, step)], STEPS) if type(run) is Run else []
    blocks = []
    for step in steps:
        try:
            most = math.log(int(run.config["model"]["vocab_size"]))
            blocks.append((step, list(rows(run, step, most, f"{run.name}, " if named else ""))))
        except NoLikelihood as error:
            material.tell(f"The text of {run.name} is left out: {error}")
            break
        except (PicoError, OSError) as error:
            gone = step not in run.step_directories() or not _readable(run, step)
            why = "it was deleted or thinned while the report was made" if gone else str(error)
            material.tell(f"The text of step {step} of {run.name} is left out: {why}")
    if not blocks:
        return None
    return render("text.html", steps=[step for step, _ in blocks], blocks=blocks, most=most)


def _readable(run: Run, step: int) -> bool:
    try:
        checkpoint = run[step]
        weights = checkpoint.select(kind="weights")
        if not weights or not isinstance(checkpoint, SealedCheckpoint) or "tokenizer.json" not in checkpoint.files:
            return False
        parameters = sum(math.prod(checkpoint.record(address).shape) for address in weights)
        return parameters <= MOST_PARAMETERS and any(checkpoint.rows_file(split) for split in ("train", "val"))
    except StoreError:
        return False


def spread(steps: Sequence[int], count: int) -> list[int]:
    """Return at most `count` of the steps: the first, the last, and others at equal distances in the list."""
    if len(steps) <= count:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]


def rows(run: Run, step: int, most: float, prefix: str = "") -> Iterator[Row]:
    """Yield the first captured rows of a step, of each split. most: the loss at the end of the scale, in nats."""
    import torch

    from picolm.train.evaluate import token_nats
    from picolm.train.sample import load_model
    from picolm.train.text import Text

    checkpoint = run[step]
    assert isinstance(checkpoint, SealedCheckpoint)
    model = load_model(run, step)
    words = Text(checkpoint.locate("tokenizer.json"), int(run.config["model"]["vocab_size"]))
    for split, where in (("train", "training batch of"), ("val", "held-out text at")):
        try:
            table = checkpoint.rows(split).slice(0, ROWS)
        except Missing:
            continue
        ids_RS = np.array(table.column("input_ids").to_pylist())[:, : model.row_length(TOKENS)]
        with torch.no_grad():
            nats_RT = token_nats(model, torch.as_tensor(ids_RS)).numpy()
        names = table.column("source").to_pylist() if "source" in table.column_names else [""] * len(ids_RS)
        numbers = table.column("row").to_pylist() if "row" in table.column_names else [None] * len(ids_RS)
        for ids_S, nats_T, source, number in zip(ids_RS, nats_RT, names, numbers, strict=True):
            loss = f"mean loss {nats_T.mean():.3f} nats" + (
                "" if nats_T.size < TOKENS else f" over {nats_T.size} tokens"
            )
            place = [f"{prefix}{where} step {step}", f"row {number}" if number is not None else "", source, loss]
            yield Row(" · ".join(filter(None, place)), tokens(words.tokens(ids_S.tolist()), nats_T, most))


def tokens(pieces: Sequence[str], nats_T: np.ndarray, most: float) -> list[Token]:
    """Return pieces of text with their losses; the first pieces, which are only read, have none."""
    read = len(pieces) - len(nats_T)
    made = [Token(piece, None, 0, "") for piece in pieces[:read]]
    for place, (piece, nats) in enumerate(zip(pieces[read:], nats_T.tolist(), strict=True), read):
        heat = round(100 * min(1.0, max(0.0, nats / most)), 1) if math.isfinite(nats) else 100
        made.append(Token(piece, nats, heat, f"{piece!r}: {nats:.4f} nats, position {place}"))
    return made
