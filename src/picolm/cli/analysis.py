"""`pico analyze`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from picolm.cli.app import ConfigArguments, ConfigPath, TrustRemoteCode, app, config_and_overrides
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
    }
    outcome = analyze_runs(config_path, overrides, places, dry_run=dry_run, **options)
    if report and outcome is not None:
        _report(config_path, overrides, places)


def _report(config_path: Path, overrides: list[str], places: list[str]) -> None:
    from picolm.analyze.config import AnalysisConfig
    from picolm.cli.reporting import say_where
    from picolm.report.assembly import write
    from picolm.schema import load

    config = load(config_path, AnalysisConfig, overrides)
    folder = Path(config.monitoring.output_dir) / config.analysis_name
    say_where(write(places or list(config.runs), [str(folder)], folder / "report.html"))
