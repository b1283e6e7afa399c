"""`pico data …`."""

from pathlib import Path
from typing import Annotated

import typer

from picolm.cli.app import app
from picolm.errors import PicoError

data = typer.Typer(help="Prepare corpora.", no_args_is_help=True)
app.add_typer(data, name="data")


@data.command("prepare")
def prepare_data(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH…", help="Files or folders: .txt .md .jsonl(.gz, .zst) .parquet.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    tokenizer: Annotated[str | None, typer.Option(help="A tokenizer.json, a folder with one, or a Hub name.")] = None,
    train_tokenizer: Annotated[
        bool, typer.Option("--train-tokenizer", help="Train one on the text (the default).")
    ] = False,
    vocab_size: Annotated[int, typer.Option(help="Entries of the tokenizer that is trained.")] = 4096,
    seq_len: Annotated[int, typer.Option(help="Input tokens of a row; rows hold one more, the last target.")] = 2048,
    seed: Annotated[int, typer.Option(help="Of the order of documents and rows, and of what is held out.")] = 42,
    val_fraction: Annotated[float, typer.Option(help="Share of the documents that is held out as split val.")] = 0.0,
) -> None:
    """Turn text into shuffled rows of token ids, ready to train on."""
    from picolm.data.prepare import prepare
    from picolm.terminal import phases, prepared

    if train_tokenizer and tokenizer is not None:
        raise PicoError("--tokenizer names a tokenizer and --train-tokenizer asks for a new one: give one of them")
    with phases() as progress:
        manifest = prepare(
            paths, out, tokenizer=tokenizer, vocab_size=vocab_size, seq_len=seq_len, seed=seed,
            val_fraction=val_fraction, progress=progress,
        )  # fmt: skip
    print(prepared(manifest, out))
