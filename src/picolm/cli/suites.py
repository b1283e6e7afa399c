"""`pico suite`."""

from pathlib import Path
from typing import Annotated

import typer

from picolm.cli.app import ConfigArguments, ConfigPath, TrustRemoteCode, app, config_and_overrides


@app.command()
def suite(
    arguments: ConfigArguments = None,
    config_path: ConfigPath = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show which runs are done and the cost of each run, and exit.")
    ] = False,
    executor: Annotated[
        str, typer.Option(help="Where runs are trained: local, or slurm (needs the extra `slurm`).")
    ] = "local",
    jobs: Annotated[int, typer.Option(min=1, help="Runs to train at the same time on this machine.")] = 1,
    report: Annotated[bool, typer.Option("--report/--no-report", help="Write the report.")] = True,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Train the missing runs of a matrix, analyze all of them, and compare them in one report."""
    config_path, overrides = config_and_overrides("suite", config_path, arguments)

    from picolm.suite.command import run_suite

    file: Path = config_path
    raise typer.Exit(run_suite(file, overrides, executor=executor, jobs=jobs, dry_run=dry_run, report=report))
