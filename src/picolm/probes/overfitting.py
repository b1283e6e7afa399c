"""How much lower the loss of rows is that a model was trained on than that of rows that it was not."""

from collections.abc import Generator
from typing import Annotated

import numpy as np
from pydantic import Field

from picolm.data.batches import permute
from picolm.observe.passes import Answer, Ask
from picolm.observe.rows import Rows
from picolm.observe.subject import BOUND_DRAWS, Subject
from picolm.observe.training import SeenRows, TrainingRows, rows_of_tokens
from picolm.observe.training import training_rows as rows_that_trained
from picolm.probes.in_context import nats
from picolm.probes.means import difference_of, mean_of
from picolm.probes.probe import Found, Quantity, Reading, probe


@probe(
    "overfitting",
    gives={
        "held_out_loss": Quantity("nats", "mean loss of held-out rows"),
        "seen_loss": Quantity("nats", "mean loss of training rows that the step has seen"),
        "unseen_loss": Quantity("nats", "mean loss of training rows that the step has not seen yet"),
        "training_loss": Quantity("nats", "mean loss of the stated training rows"),
        "generalization_gap": Quantity(
            "nats", "loss of held-out rows minus that of training rows, seen ones where known"
        ),
        "seen_gap": Quantity("nats", "loss of training rows not seen yet minus that of seen ones"),
    },
)
def overfitting(
    subject: Subject,
    rows: Rows,
    *,
    sample: Annotated[int, Field(ge=1)] = 128,
    seed: Annotated[int, Field(ge=0)] = 0,
    training_rows: str | None = None,
) -> Found:
    """Compare the loss of training rows that the step has seen, of training rows still to come, and of held-out rows.

    sample: number of training rows of each kind, drawn with `seed` from the first pass over the data. training_rows: a file of
    rows, whose first ones are taken; when they were seen is not known. The standard errors of gaps are those of independent
    samples.
    """
    held_out = yield from _loss(subject, "held_out_loss", rows)
    yield held_out
    training = rows_that_trained(subject.run, training_rows)
    if not isinstance(training, SeenRows):
        numbers = np.arange(min(sample, len(training)))
        stated = yield from _loss_of(subject, "training_loss", training, numbers, "the file has no rows")
        yield stated
        yield _gap("generalization_gap", held_out, stated)
        return
    step = subject.checkpoint.step
    now = min(step * training.rows_per_step, len(training))
    # Rows that the run will read; at its end the next ones of the data, and no others, since files may have to be fetched.
    end = min(max(training.end * training.rows_per_step, now + sample), len(training))
    seen_rows = _drawn(training, 0, now, sample, seed, "seen rows", step)
    coming = _drawn(training, now, end, sample, seed, "unseen rows", step)
    seen = yield from _loss_of(subject, "seen_loss", training, seen_rows, "the step has seen no rows")
    unseen = yield from _loss_of(subject, "unseen_loss", training, coming, "the step has seen all training rows")
    yield from (seen, unseen, _gap("generalization_gap", held_out, seen), _gap("seen_gap", unseen, seen))


def _drawn(training: SeenRows, begin: int, end: int, sample: int, seed: int, what: str, step: int) -> np.ndarray:
    """Return the numbers of rows at random places of the first pass over the data, from begin to end, all different."""
    places = begin + permute(np.arange(min(sample, end - begin)), end - begin, seed, what, step)
    batches, within = np.divmod(np.sort(places), training.rows_per_step)
    return np.array([training.of_step(int(batch))[row] for batch, row in zip(batches, within)], dtype=np.int64)


Loss = Generator[Ask | Reading, Answer, Reading]


def _loss_of(subject: Subject, name: str, training: TrainingRows, numbers: np.ndarray, none: str) -> Loss:
    """Return the mean loss of training rows as a reading, or the reason `none`."""
    if not len(numbers):
        return Reading(name, None, reason=none)
    return (yield from _loss(subject, name, rows_of_tokens(training.tokens(numbers), "train")))


def _loss(subject: Subject, name: str, rows: Rows) -> Loss:
    """Return the mean loss of rows as a reading; of a model that gives only a bound, the bound, and that it is one."""
    if subject.likelihood == "exact":
        of_rows = (yield Ask(rows, nats))["nats"]
    else:
        of_rows = subject.scores(rows)
    reading = mean_of(name, of_rows)
    words = f"{len(rows.tokens)} rows"
    note = f"{words}; an upper bound of the loss, {BOUND_DRAWS} draws a row" if subject.likelihood == "bound" else words
    return reading._replace(note=note, rows=rows.identity)


def _gap(name: str, more: Reading, less: Reading) -> Reading:
    return difference_of(name, more, less, note=more.note.partition("; ")[2])
