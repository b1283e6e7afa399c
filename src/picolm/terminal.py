"""Display the progress and the results of commands."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from picolm.data.manifest import Manifest
    from picolm.train.inspection import Batch


@contextmanager
def phases() -> Iterator[Callable[[str, int, int | None], None]]:
    """Yield a callback (phase, amount done, total) that shows a progress bar per phase; without a terminal, a line."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from picolm.console import can_redraw, say, screen, visible

    console = screen(error=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not can_redraw(console)) as bars:
        tasks: dict[str, object] = {}

        def report(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(visible(what), total=total)
                if not can_redraw(console):
                    say(f"{what} …", error=True)
            bars.update(tasks[what], completed=done, total=total)  # type: ignore[arg-type]

        yield report


def prepared(manifest: "Manifest", place: object) -> str:
    """Return a summary of a prepared corpus: its size, what was left out, and the command to train on it."""
    rows = ", ".join(f"{manifest.rows(split):,} rows ({split})" for split in manifest.splits)
    lines = [
        f"{manifest.documents:,} documents, {manifest.tokens:,} tokens: {rows} of {manifest.seq_len} + 1 tokens in {place}"
    ]
    if manifest.dropped_tokens:
        lines.append(
            f"{manifest.dropped_tokens:,} tokens at the ends of sources were too few for a row and are left out"
        )
    if manifest.bad_lines:
        lines.append(
            f"{manifest.bad_lines:,} lines could not be used, among them: {', '.join(manifest.first_bad_lines)}"
        )
    lines += _remarks(manifest)
    vocabulary = manifest.tokenizer["vocab_size"]
    lines.append(
        f"Train on it:  pico train demo data.dataset.name={place} data.tokenizer.vocab_size={vocabulary} "
        f"model.vocab_size={vocabulary} model.max_seq_len={manifest.seq_len} checkpointing.run_name=mine"
    )
    return "\n".join(lines)


def _remarks(manifest: "Manifest") -> "Iterator[str]":
    """Yield remarks on prepared rows: unread files, followed links, NUL characters, characters without a token."""
    from picolm.data.documents import described

    if manifest.not_read:
        yield f"Not read: {described(manifest.not_read, manifest.first_not_read)}"
    if manifest.outside:
        yield f"Links that lead out of the given folders were followed: {', '.join(manifest.outside)}"
    if manifest.nul_characters:
        yield f"The text holds {manifest.nul_characters:,} NUL characters, in {', '.join(manifest.files_with_nul)}"
    if manifest.lost_characters:
        shown = ", ".join(f"{character!r} ({count:,})" for character, count in manifest.most_lost.items())
        yield f"The tokenizer has no token for {manifest.lost_characters:,} characters: {shown}"


_HEADINGS = {
    "metrics": ("metric", "kind", "of", "options", ""),
    "components": ("component", "of", ""),
    "probes": ("probe", "options", "gives", ""),
}


def parts(family: str) -> "Table":
    """Return a table of the metrics, the components or the probes, with a line on each, for `pico list`."""
    import inspect

    from rich import box
    from rich.table import Table

    from picolm.analyze.components import COMPONENTS
    from picolm.analyze.metrics import METRICS

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in _HEADINGS[family]:
        shown.add_column(heading, overflow="fold")
    if family == "probes":
        from picolm.probes import PROBES

        for name in PROBES:
            probe = PROBES.get(name)
            shown.add_row(name, ", ".join(probe.options), ", ".join(probe.gives), probe.summary)
    elif family == "metrics":
        for name in METRICS:
            metric = METRICS.get(name)
            operands = "one tensor" if metric.arity == 1 else "two tensors"
            shown.add_row(name, metric.kind, operands, ", ".join(metric.options), metric.summary)
    else:
        for name in COMPONENTS:
            part = COMPONENTS.get(name)
            text = " ".join((inspect.getdoc(part) or "").split())
            shown.add_row(name, ", ".join(part.kinds or ("anything",)), text)
    return shown


def configurations() -> "Table":
    """Return a table of the configurations that come with the package: the command and a summary of each."""
    from rich import box
    from rich.table import Table

    from picolm.shipped import commands, shipped, summary

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("command", no_wrap=True)
    shown.add_column("", overflow="fold")
    for command in commands():
        for name, file in shipped(command).items():
            shown.add_row(f"pico {command} {name}", summary(file))
    return shown


def evaluations(results: Mapping[int, Mapping[str, float]], most: int = 5) -> "Table":
    """Return a table of results by step, with a row per result and a column per step.

    With more than `most` steps, only the first and the last have columns. From three steps on, a sparkline shows all.
    """
    from rich import box
    from rich.table import Table

    from picolm.console import sparkline

    steps = sorted(results)
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("evaluation", overflow="fold")
    columns = steps if len(steps) <= most else [steps[0], steps[-1]]
    for heading in (*(f"step {step}" for step in columns), *(["over steps"] if len(steps) > 2 else [])):
        shown.add_column(heading, justify="right", no_wrap=True)
    for name in dict.fromkeys(name for step in steps for name in results[step]):
        values = [f"{results[step][name]:.6g}" if name in results[step] else "" for step in columns]
        course = [results[step][name] for step in steps if name in results[step]]
        shown.add_row(name, *values, *([sparkline(course)] if len(steps) > 2 else []))
    return shown


def batch_rows(batch: "Batch", characters: int) -> Iterator[str]:
    """Yield a heading and the beginning of the text for each row of a batch, with its mean loss if it was measured.

    characters: the most characters of text for each row.
    """
    texts = batch.text.decode(batch.rows.tokens_RS)
    for place, number in enumerate(batch.rows.numbers.tolist()):
        heading = [f"row {number}", batch.where[place]]
        if batch.rows.labels is not None:
            heading.append(batch.rows.labels[place])
        if batch.before_RT is not None:
            heading.append(f"loss {batch.before_RT[place].mean():.4f} before the update")
            heading.append(
                f"{batch.after_RT[place].mean():.4f} after" if batch.after_RT is not None else "no update after it"
            )
        yield " · ".join(heading)
        text = " ".join(map(str, batch.rows.tokens_RS[place].tolist())) if texts is None else texts[place]
        yield "  " + text[:characters].replace("\n", "\n  ") + (" …" if len(text) > characters else "") + "\n"
