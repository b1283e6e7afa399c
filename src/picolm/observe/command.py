"""The command `pico observe`: what the model of each step computes on given rows, as a run of its own."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from picolm.address import Address
from picolm.errors import PicoError
from picolm.observe.config import Observe
from picolm.observe.observed import observers
from picolm.observe.rows import Rows
from picolm.observe.subject import Subject
from picolm.schema import plain
from picolm.store import Run
from picolm.train.sample import checkpoint_at


def observe_steps(
    run: Run,
    steps: Sequence[int] | None,
    asked: Observe,
    out: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[tuple[int, int]]:
    """Write what is observed at some steps (None: all with weights) to a new run in `out`. Yields (step, bytes) of each.

    A step of `out` that is there already, from a call that was interrupted, is not computed again. Raises PicoError where `out`
    holds something else.
    """
    chosen = steps if steps is not None else [step for step in run.steps if run[step].select(kind="weights")]
    observer = observers(asked, {run.name: run})[run.name]
    about = {"observed": {"run": run.name, "rows": observer.rows.identity, "asked": plain(asked)}}
    for step in chosen:
        checkpoint_at(run, step)  # raises PicoError without weights, before anything is written
    written = _opened(out, about)
    for done, step in enumerate(chosen):
        progress(done, len(chosen))
        if written is None or step not in written:
            tensors = answers(observer.subject.at(run[step]), observer.rows, asked, observer.addresses)
            if written is None:
                written = Run.create(out, run.config, about)
            texts = {"anatomy.json": observer.subject.anatomy.to_json()}
            meta = {"step": step, "capture": {f"{asked.split}_positions": _common(observer.rows)}}
            table = {"input_ids": [tokens.tolist() for tokens in observer.rows.tokens]}
            written.commit(step, tensors, meta=meta, texts=texts, tables={asked.split: table}, about=about)
        yield step, written[step].minimum_bytes
    progress(len(chosen), len(chosen))


def answers(subject: Subject, rows: Rows, asked: Observe, addresses: Sequence[Address]) -> dict[Address, Tensor]:
    """Return everything that is asked for, by address."""
    found = subject.tensors(rows, addresses, asked.batch_size) if addresses else {}
    whole = subject.anatomy.module("unembedding")
    if "patterns" in asked.what:
        layers = None if asked.layers == "all" else asked.layers
        found |= subject.patterns(rows, layers, asked.batch_size)
    if "logits" in asked.what:
        found[Address("logits", rows.split, whole)] = subject.logits(rows, asked.batch_size)
    if "scores" in asked.what:
        scores = subject.scores(rows, asked.batch_size, draws=0)
        equal = len({len(of_row) for of_row in scores}) == 1
        found[Address("scores", rows.split, whole)] = torch.stack(scores) if equal else torch.cat(scores)
    return found


def _opened(out: Path, about: dict[str, Any]) -> Run | None:
    """Return the run in `out`, None without one. Raises PicoError for one that holds something else."""
    if not (out / "run.json").exists():
        return None
    written = Run.open(out)
    if {**written.environment, **about} != written.environment:
        raise PicoError(f"{out}: holds another run, or what was observed otherwise; choose another folder")
    return written


def _common(rows: Rows) -> list[int] | None:
    """Return the positions that are read of every row, None where they differ."""
    return rows.positions[0] if all(positions == rows.positions[0] for positions in rows.positions) else None
