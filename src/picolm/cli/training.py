"""`pico train`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from picolm.cli.app import ConfigArguments, ConfigPath, TrustRemoteCode, app, config_and_overrides
from picolm.console import say
from picolm.errors import PicoError


@app.command()
def train(
    arguments: ConfigArguments = None,
    config_path: ConfigPath = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and exit.")] = False,
    view: Annotated[
        bool, typer.Option("--view", help="Show the run in the browser while it is trained (pico view beside it).")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    code_folder: Annotated[
        list[Path] | None, typer.Option(help="A further folder to import your own modules from.", hidden=True)
    ] = None,
) -> None:
    """Train a model from a YAML file, or resume the run of that name."""
    config_path, words = config_and_overrides("train", config_path, arguments)

    from picolm.registry import find_code_in
    from picolm.schema import load
    from picolm.train.config import schema_for

    for folder in code_folder or ():
        find_code_in(folder)
    config = load(config_path, schema_for, words)
    if dry_run:
        from picolm.train.preview import preview

        say(preview(config))
        return

    from picolm.train import run_training

    if not view or os.environ.get("LOCAL_RANK", "0") != "0":  # of several processes the first one shows the run
        raise typer.Exit(run_training(config))
    from picolm.view.command import beside

    if config.checkpointing.run_name is None:
        raise PicoError("--view: give the run a name to find it by, with checkpointing.run_name=…")
    with beside(Path(config.checkpointing.runs_dir).expanduser() / config.checkpointing.run_name, trust_remote_code):
        raise typer.Exit(run_training(config))
