"""`pico suite`."""

from pathlib import Path
from typing import Annotated

import typer

from picolm.cli.app import app
from picolm.cli.arguments import ConfigArguments, ConfigPath, TrustRemoteCode, config_and_overrides


@app.command()
def suite(
    arguments: ConfigArguments = None,
    config_path: ConfigPath = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what is done, and what each run takes, and exit.")
    ] = False,
    executor: Annotated[
        str, typer.Option(help="Where members are trained: local, or slurm (extra `slurm`).")
    ] = "local",
    jobs: Annotated[int, typer.Option(min=1, help="Members to train at the same time on this machine.")] = 1,
    report: Annotated[bool, typer.Option("--report/--no-report", help="Write the report.")] = True,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Train a matrix of runs (what is missing of it), analyze them all, and compare them in one report."""
    config_path, overrides = config_and_overrides("suite", config_path, arguments)

    from picolm.suite.command import run_suite

    file: Path = config_path
    raise typer.Exit(run_suite(file, overrides, executor=executor, jobs=jobs, dry_run=dry_run, report=report))
