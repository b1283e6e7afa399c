"""`pico data …`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from picolm.cli.app import app
from picolm.console import say
from picolm.errors import PicoError

if TYPE_CHECKING:
    from picolm.data.inspection import Inspection

data = typer.Typer(help="Prepare, inspect, verify, merge and push tokenized data.", no_args_is_help=True)
app.add_typer(data, name="data")

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `pico data prepare` made.")]
Out = Annotated[Path, typer.Option(help="The folder to create.")]


@data.command("prepare")
def prepare_data(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH…", help="Files or folders: .txt .md .jsonl(.gz, .zst) .parquet; or hub:owner/name[@revision]."
        ),
    ],
    out: Out,
    tokenizer: Annotated[str | None, typer.Option(help="A tokenizer.json, a folder with one, or a Hub name.")] = None,
    train_tokenizer: Annotated[
        bool, typer.Option("--train-tokenizer", help="Train a tokenizer on the text (the default).")
    ] = False,
    vocab_size: Annotated[int, typer.Option(help="Vocabulary size of the tokenizer to train.")] = 4096,
    seq_len: Annotated[
        int, typer.Option(help="Input tokens per row; a row holds one more token, the last target.")
    ] = 2048,
    seed: Annotated[int, typer.Option(help="Seed of the order of rows and of which documents are held out.")] = 42,
    val_fraction: Annotated[float, typer.Option(help="Fraction of documents held out as split val.")] = 0.0,
    val: Annotated[
        list[str] | None,
        typer.Option(help="A file or folder held out as split val. Repeat for several."),
    ] = None,
    val_last: Annotated[float, typer.Option(help="Fraction at the end of each document held out as split val.")] = 0.0,
    filters: Annotated[
        list[str] | None,
        typer.Option(
            "--filter", help="Filter of documents: length,min_characters=200 or my_lab.x:filter. Repeat for several."
        ),
    ] = None,
    deduplicate: Annotated[
        bool, typer.Option("--deduplicate", help="Keep only the first of documents with identical text.")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Number of processes (default: one per core). The rows are the same for any number."),
    ] = None,
) -> None:
    """Tokenize text into shuffled rows of token ids for training. Continues after an interruption."""
    from picolm.data.prepare import prepare
    from picolm.terminal import phases, prepared

    if train_tokenizer and tokenizer is not None:
        raise PicoError("--tokenizer names a tokenizer and --train-tokenizer asks for a new one: give one of them")
    with phases() as progress:
        manifest = prepare(
            paths, out, tokenizer=tokenizer, vocab_size=vocab_size, seq_len=seq_len, seed=seed,
            val_fraction=val_fraction, val=val or [], val_last=val_last, filters=filters or [],
            deduplicate=deduplicate, workers=workers, progress=progress,
        )  # fmt: skip
    say(prepared(manifest, out))
    for name, dropped in manifest.left_out.items():
        say(f"{dropped:,} documents were left out: {name}")


@data.command("merge")
def merge_data(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR…", help="Folders that `pico data prepare` made.")],
    out: Out,
    weights: Annotated[
        str | None,
        typer.Option(help="Shares of the training rows, in the order of the folders: 0.7,0.3 (default: all rows)."),
    ] = None,
    rows: Annotated[
        int | None, typer.Option(help="Number of training rows of the result (default: as many as possible).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of which rows are taken and of their order.")] = 42,
) -> None:
    """Mix prepared folders by weights. No row is taken twice; all held-out rows are kept. See also the source `mix:`."""
    from picolm.data.merge import merge
    from picolm.terminal import phases, prepared

    with phases() as progress:
        manifest = merge(folders, out, weights=_numbers(weights), rows=rows, seed=seed, progress=progress)
    say(prepared(manifest, out))


@data.command("inspect")
def inspect_data(
    folder: Folder,
    tokens: Annotated[int, typer.Option(help="Number of most frequent tokens to show.")] = 20,
    rows: Annotated[int, typer.Option(help="Random rows of each split to show as text.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of the random rows.")] = 0,
    characters: Annotated[int, typer.Option(help="Characters to show of each row.")] = 400,
) -> None:
    """Show what prepared rows hold: sources, frequent tokens, rows that are in both splits, random rows as text."""
    from picolm.data.inspection import inspect

    found = inspect(folder, tokens=tokens, rows=rows, seed=seed)
    say("\n".join(_summary(found)))
    for sample in found.samples:
        text = sample.text[:characters] + (" …" if len(sample.text) > characters else "")
        say(f"\n{sample.split} row {sample.number}" + (f" · {sample.source}" if sample.source else ""))
        say("  " + text.replace("\n", "\n  "))


@data.command("verify")
def verify_data(folder: Folder) -> None:
    """Check a prepared folder against its manifest: digests, numbers of rows, range of token ids."""
    from picolm.data.inspection import prepared_manifest, verify

    if problems := verify(folder):
        raise PicoError("\n".join([*problems, f"{len(problems)} problems; prepare or fetch {folder} again"]))
    manifest = prepared_manifest(folder)
    shards = sum(map(len, manifest.splits.values()))
    say(f"{folder}: {shards} shards, {manifest.tokens:,} tokens, the tokenizer: all as the manifest says")


def _summary(found: "Inspection") -> list[str]:
    manifest = found.manifest
    lines = [
        f"{manifest.tokens:,} tokens in rows of {manifest.seq_len} + 1: "
        + ", ".join(f"{manifest.rows(split):,} rows ({split})" for split in manifest.splits),
        f"{manifest.documents:,} documents, vocabulary of {manifest.tokenizer['vocab_size']:,} entries, "
        f"{found.unused_ids:,} of them in no row",
    ]
    lines += [
        f"  {name}: {counts['documents']:,} documents, "
        + ", ".join(f"{counts[f'{split}_rows']:,} rows ({split})" for split in manifest.splits)
        for name, counts in manifest.sources.items()
    ]
    if "val" in manifest.splits:
        some = f", such as {', '.join(map(str, found.repeated_rows))}" if found.repeated else ""
        lines.append(f"{found.repeated:,} of {manifest.rows('val'):,} held-out rows are training rows too{some}")
    lines.append("Most frequent tokens:")
    lines += [f"  {token.times / manifest.tokens:7.2%}  {token.id:6d}  {token.text!r}" for token in found.frequent]
    return lines


def _numbers(text: str | None) -> list[float] | None:
    from picolm.document import parse_yaml

    if text is None:
        return None
    values = parse_yaml(f"[{text}]", "--weights")
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        raise PicoError(f"--weights {text}: numbers with commas between them are needed, such as 0.7,0.3")
    return [float(value) for value in values]
