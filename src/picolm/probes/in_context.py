"""How far a model predicts better late in a row than early in it."""

from typing import Annotated

from pydantic import Field
from torch import Tensor, arange

from picolm.errors import PicoError
from picolm.observe.passes import Ask, Pass
from picolm.observe.rows import Rows
from picolm.observe.subject import Subject
from picolm.probes.means import mean_of, means_by
from picolm.probes.probe import Found, Quantity, Reading, probe

EARLY, LATE = 50, 500  # the positions of Olsson et al. 2022
Position = Annotated[int, Field(ge=0)]


def nats(found: Pass) -> dict[str, Tensor]:
    """Read the loss at each position, [B, P]."""
    return {"nats": found.nats_BP}


@probe(
    "in_context",
    needs=["logits"],
    gives={
        "position_loss": Quantity("nats", "mean loss of the next token after this position of the row, from 0"),
        "in_context_score": Quantity(
            "nats", "mean over rows of the loss at a late position minus that at an early one"
        ),
    },
)
def in_context(subject: Subject, rows: Rows, *, early: Position | None = None, late: Position | None = None) -> Found:
    """Measure the loss at each position of the rows, and how much lower it is late in a row than early in it.

    The score of Olsson et al. 2022, whose positions are 50 and 500. Where rows are shorter than that, late is the last position
    (of rows of several lengths, of the middle one) and early a tenth of it. Raises PicoError for positions that no row has.
    """
    losses = (yield Ask(rows, nats))["nats"]
    yield from means_by("position_loss", losses, [arange(len(row)) for row in losses])
    lengths = sorted(map(len, losses))
    last = lengths[len(lengths) // 2] - 1
    scaled = late is None and last < LATE
    late = min(LATE, last) if late is None else late
    early = (late // 10 if late < LATE else EARLY) if early is None else early
    if max(early, late) >= lengths[-1]:
        raise PicoError(f"there is no position {max(early, late)}: the longest row has {lengths[-1]} positions, from 0")
    if early >= late:
        if early == 0 and last <= 0:
            yield Reading("in_context_score", None, reason="rows of one position have no early and no late one")
            return
        raise PicoError(f"early ({early}) has to be before late ({late})")
    long = [row for row in losses if len(row) > late]
    score = mean_of("in_context_score", [row[late : late + 1] - row[early : early + 1] for row in long])
    note = f"position {late} minus position {early}, {len(long)} rows"
    why = f"; scaled, since the rows are too short for {LATE}" if scaled else ""
    yield score._replace(note=note + why)
