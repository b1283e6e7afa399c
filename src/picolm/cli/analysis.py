"""`pico analyze` and `pico observe`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from picolm.cli.app import ConfigArguments, ConfigPath, RunArgument, TrustRemoteCode, app, config_and_overrides
from picolm.console import say
from picolm.errors import PicoError


@app.command()
def analyze(
    arguments: ConfigArguments = None,
    config_path: ConfigPath = None,
    run: Annotated[
        list[str] | None, typer.Option("--run", "--run_path", help="A run to analyze. Repeat for several runs.")
    ] = None,
    repo_id: Annotated[
        str | None, typer.Option("--repo_id", "--repo-id", help="Repository of a run on the Hub; needs --branch.")
    ] = None,
    branch: Annotated[str | None, typer.Option(help="Branch of a run on the Hub; needs --repo_id.")] = None,
    workers: Annotated[int, typer.Option(help="Number of processes; -1 uses all cores.")] = 1,
    backend: Annotated[str, typer.Option(help="What runs the processes: loky (this machine), dask or ray.")] = "loky",
    strict: Annotated[bool, typer.Option("--strict", help="Fail if anything is missing.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Also write results.csv.")] = False,
    aggregate: Annotated[
        bool,
        typer.Option("--aggregate", help="Also write mean and confidence interval over the runs: aggregated.parquet."),
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Also write report.html into the folder of the analysis; see pico report.")
    ] = False,
    keep_downloads: Annotated[
        str,
        typer.Option(
            metavar="none|N|all",
            help="Of a series on the Hub: of how many measured steps the weights stay in the Hub's cache.",
        ),
    ] = "all",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be read and computed, and exit.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure how weights, gradients and activations change over the steps of runs, from a YAML file."""
    config_path, overrides = config_and_overrides("analyze", config_path, arguments)
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
        "keep_downloads": _number(keep_downloads),
    }
    outcome = analyze_runs(config_path, overrides, places, dry_run=dry_run, **options)
    if report and outcome is not None:
        _report(config_path, overrides, places)


def _number(text: str) -> int | None:
    """Return the number in `none`, `N` or `all` (None). Raises PicoError for another word."""
    if text.isascii() and text.isdecimal():
        return int(text)
    if text not in ("none", "all"):
        raise PicoError(f"--keep-downloads {text}: expected none, a number, or all")
    return 0 if text == "none" else None


def _report(config_path: Path, overrides: list[str], places: list[str]) -> None:
    from picolm.analyze.config import AnalysisConfig
    from picolm.cli.reporting import say_where
    from picolm.report.assembly import write
    from picolm.schema import load

    config = load(config_path, AnalysisConfig, overrides)
    folder = Path(config.monitoring.output_dir) / config.analysis_name
    say_where(write(places or list(config.runs), [str(folder)], folder / "report.html"))


@app.command()
def observe(
    run: RunArgument,
    out: Annotated[Path, typer.Option(help="The folder to create: a run that holds what was observed.")],
    rows: Annotated[
        str,
        typer.Option(
            help="val (the held-out rows of the run), a file of texts, or of token ids: FILE.npy, FILE.parquet:COLUMN."
        ),
    ] = "val",
    prompt: Annotated[
        list[str] | None, typer.Option(help="A text to read, instead of --rows. Repeat for several.")
    ] = None,
    steps: Annotated[
        str | None, typer.Option(help="5,9,20 or 100:200 or 100:200:10 (default: all with weights).")
    ] = None,
    what: Annotated[
        str, typer.Option(help="activations, gradients, patterns, logits, scores, separated by commas.")
    ] = "activations",
    modules: Annotated[
        str | None, typer.Option(help="Modules: roles or ends of names, separated by commas (default: as in training).")
    ] = None,
    layers: Annotated[str, typer.Option(help="Numbers of blocks, separated by commas, or all.")] = "all",
    positions: Annotated[str, typer.Option(help="last, all, or positions in a row, separated by commas.")] = "last",
    max_rows: Annotated[int | None, typer.Option(help="At most so many rows (default: 64 of a file).")] = None,
    length: Annotated[int | None, typer.Option(help="Predicted tokens of a row of a text (default: 512).")] = None,
    hidden: Annotated[int, typer.Option(help="Percent of the tokens that are hidden from a diffusion model.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Rows per forward pass.")] = 8,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Run the model of checkpoints on given rows, and keep its activations, gradients, attention patterns, logits or scores."""
    from functools import partial

    from picolm.document import COMMAND_LINE, Document
    from picolm.observe.command import observe_steps
    from picolm.observe.config import Observe
    from picolm.schema import resolve
    from picolm.store import Run
    from picolm.store.files import size
    from picolm.terminal import phases
    from picolm.train.history import parse_steps

    asked: dict[str, Any] = {
        "rows": prompt or rows,
        "what": what.split(","),
        "layers": _words(layers),
        "positions": _words(positions),
        "max_rows": max_rows,
        "length": length,
        "hidden": hidden,
        "batch_size": batch_size,
    }
    asked |= {"modules": modules.split(",")} if modules else {}
    given = Document("pico observe")
    for key, value in asked.items():
        given.assign((key,), value, COMMAND_LINE)
    asking, chosen = resolve(given, Observe), parse_steps(steps) if steps else None
    with phases() as progress:
        written = dict(observe_steps(Run.open(run), chosen, asking, out, partial(progress, "observing")))
    say(f"{len(written)} steps of {run}, {size(sum(written.values()))}, are in {out}.  See:  pico list {out}")


def _words(text: str) -> Any:
    """Return the numbers in a text, separated by commas; all, last and what is no number as they are."""
    if text in ("all", "last"):
        return text
    return [int(word) if word.lstrip("-").isdecimal() else word for word in text.split(",")]
