"""Commands that read a run: `list`, `verify`, `generate`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from picolm.cli.app import RunArgument, TrustRemoteCode, app
from picolm.console import say
from picolm.errors import PicoError, StoreError


@app.command("list")
def list_run(
    run: Annotated[
        str,
        typer.Argument(
            help="A run, a folder of runs, or one of the words configs, metrics, components and probes.",
            metavar="RUN|FOLDER|configs|metrics|components|probes",
        ),
    ],
) -> None:
    """Show the steps of a run, the runs of a folder, or all shipped configurations, metrics, components or probes."""
    from picolm.console import screen

    console = screen()
    if run in ("configs", "metrics", "components", "probes") and (run == "configs" or not Path(run).exists()):
        from picolm.terminal import configurations, parts

        console.print(configurations() if run == "configs" else parts(run))
        return

    from picolm.store import Run
    from picolm.store.listing import contents, loss_line, runs_in, runs_table, table

    try:
        opened = Run.open(run)
    except StoreError:
        found = runs_in(Path(run))
        if not found:
            raise
        console.print(runs_table(found))
        return
    console.print(table(contents(opened), width=console.width))
    if line := loss_line(opened):
        say(line)


@app.command()
def verify(run: RunArgument) -> None:
    """Recompute every digest of a run and print what differs."""
    from picolm.store import Run, listing

    opened = Run.open(run)
    steps = dict(listing.verify(opened))
    problems = [problem for found in steps.values() for problem in found]
    for problem in problems:
        say(problem, error=True)
    if problems or not steps:
        raise PicoError(f"{len(problems)} problem(s) in {len(steps)} checkpoints of {run}")
    kept = type(opened) is Run
    say(
        f"{len(steps)} checkpoints of {run}: "
        + ("every digest holds" if kept else "all can be read; their format keeps no digests")
    )


@app.command()
def generate(
    run: RunArgument,
    prompt: Annotated[str, typer.Option(help="The text to continue.")] = "",
    step: Annotated[int | None, typer.Option(help="Which checkpoint (default: the latest).")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Largest number of tokens to generate.")] = 100,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature; 0 always takes the most likely token.")
    ] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Sample from this many most likely tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample from the most likely tokens that together hold this probability.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    order: Annotated[
        str | None,
        typer.Option(help="Diffusion models: fill in `confident` positions first, `random` ones, or `left_to_right`."),
    ] = None,
    denoising_steps: Annotated[
        int | None, typer.Option(help="Diffusion models: forward passes to fill in all tokens (default: one for each).")
    ] = None,
    block_length: Annotated[
        int | None, typer.Option(help="Diffusion models: fill in so many tokens before the next ones.")
    ] = None,
    suffix: Annotated[
        str | None, typer.Option(help="Diffusion models: fill the gap of max-new-tokens tokens before this text.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Generate text from a checkpoint."""
    from picolm.train.sample import sample

    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    own = {"order": order, "steps": denoising_steps, "block_length": block_length, "suffix": suffix}
    options |= {name: value for name, value in own.items() if value is not None}
    say(sample(run, step, prompt, max_new_tokens=max_new_tokens, seed=seed, **options))
