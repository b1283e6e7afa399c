"""The command `pico`. Each command imports what it needs when it runs, so that `--help` answers at once."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from picolm import __version__
from picolm.errors import PicoError

app = typer.Typer(
    help="Pico: train small language models, keep every gradient, watch them learn.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data = typer.Typer(help="Prepare corpora.", no_args_is_help=True)
app.add_typer(data, name="data")

ConfigArguments = Annotated[
    list[str] | None,
    typer.Argument(metavar="[CONFIG] [KEY=VALUE]…", help="A YAML file; then keys that differ from it."),
]
ConfigPath = Annotated[Path | None, typer.Option("--config_path", "--config-path", help="The same as CONFIG.")]
RunArgument = Annotated[str, typer.Argument(help="A run: its folder, for example runs/demo.", metavar="RUN")]


def main() -> None:
    """Run the command line; problems that the user can act on are shown as messages, without a traceback."""
    # Read when torch loads OpenMP: threads that wait spin for microseconds, not milliseconds. By default a second busy
    # process on the same cores makes each small operation up to 70 times slower; alone on the machine it costs nothing.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        app()
    except PicoError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def pico(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of all commands."""


@app.command()
def train(
    arguments: ConfigArguments = None,
    config_path: ConfigPath = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and exit.")] = False,
) -> None:
    """Train a model as a YAML file says, or go on with the run of that name."""
    config_path, words = _config_and_overrides("train", config_path, arguments)

    from picolm.schema import load
    from picolm.train.config import schema_for

    config = load(config_path, schema_for, words)
    if dry_run:
        from picolm.train.preview import preview

        print(preview(config))
        return

    from picolm.train import run_training

    raise typer.Exit(run_training(config))


@app.command()
def analyze(
    arguments: ConfigArguments = None,
    config_path: ConfigPath = None,
    run: Annotated[
        list[str] | None, typer.Option("--run", "--run_path", help="A run to analyze; may be given again.")
    ] = None,
    repo_id: Annotated[
        str | None, typer.Option("--repo_id", "--repo-id", help="A run on the Hub: its repository …")
    ] = None,
    branch: Annotated[str | None, typer.Option(help="… and its branch.")] = None,
    workers: Annotated[int, typer.Option(help="Processes to spread the steps over; -1 for all cores.")] = 1,
    backend: Annotated[str, typer.Option(help="Where the processes are: loky (here), dask or ray.")] = "loky",
    strict: Annotated[bool, typer.Option("--strict", help="Anything that is missing is an error.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Write results.csv too.")] = False,
    aggregate: Annotated[
        bool, typer.Option("--aggregate", help="Mean and interval over the runs: aggregated.parquet.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be read and computed, and exit.")] = False,
) -> None:
    """Measure how weights, gradients and activations of runs change, as a YAML file says."""
    config_path, overrides = _config_and_overrides("analyze", config_path, arguments)
    if (repo_id is None) != (branch is None):
        raise PicoError("--repo_id and --branch belong together: give both, or --run FOLDER")

    from picolm.analyze.command import analyze_runs

    places = [*(run or []), *([f"hub:{repo_id}@{branch}"] if repo_id else [])]
    options: dict[str, Any] = {
        "workers": workers,
        "backend": backend,
        "strict": strict,
        "csv": csv,
        "aggregated": aggregate,
    }
    analyze_runs(config_path, overrides, places, dry_run=dry_run, **options)


def _config_and_overrides(
    command: str, config_path: Path | None, arguments: list[str] | None
) -> tuple[Path, list[str]]:
    """CONFIG or --config_path, and the key=value words behind it."""
    words = arguments or []
    if config_path is not None:
        return config_path, words
    if not words or "=" in words[0]:
        from picolm.schema import ConfigError, Problem

        raise ConfigError([Problem("", "", f"which configuration? pico {command} CONFIG [key=value …]")])
    return Path(words[0]), words[1:]


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


@app.command("list")
def list_run(
    run: Annotated[
        str, typer.Argument(help="A run, or the word metrics or components.", metavar="RUN|metrics|components")
    ],
) -> None:
    """Show the steps of a run, what each holds and how many bytes it takes; or all metrics, or all components."""
    from rich.console import Console

    console = Console()
    console.width = max(console.width, 116)  # wrapped by the terminal rather than cut off
    if run in ("metrics", "components") and not Path(run).exists():
        from picolm.terminal import parts

        console.print(parts(run))
        return

    from picolm.store import Run
    from picolm.store.listing import contents, table

    console.print(table(contents(Run.open(run))))


@app.command()
def verify(run: RunArgument) -> None:
    """Recompute every digest of a run and say what does not hold."""
    from picolm.store import Run, listing

    opened = Run.open(run)
    steps = dict(listing.verify(opened))
    problems = [problem for found in steps.values() for problem in found]
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems or not steps:
        raise PicoError(f"{len(problems)} problem(s) in {len(steps)} checkpoints of {run}")
    kept = type(opened) is Run
    print(
        f"{len(steps)} checkpoints of {run}: "
        + ("every digest holds" if kept else "all can be read; their format keeps no digests")
    )


@app.command()
def generate(
    run: RunArgument,
    prompt: Annotated[str, typer.Option(help="The text to go on from.")] = "",
    step: Annotated[int | None, typer.Option(help="Which checkpoint (default: the latest).")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = 100,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw from this many likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the likeliest tokens that hold this probability.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
) -> None:
    """Let a checkpoint write on from a prompt."""
    from picolm.train.sample import sample

    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    print(sample(run, step, prompt, max_new_tokens=max_new_tokens, seed=seed, **options))
