"""Commands that repeat or continue a run from a step: `replay`, `fork`, `batch`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from picolm.cli.app import RunArgument, TrustRemoteCode, app
from picolm.console import say
from picolm.errors import PicoError

if TYPE_CHECKING:
    from picolm.store import Run
    from picolm.train.job import Due
    from picolm.train.replay import Verdict

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Configuration keys to change.")]
Step = Annotated[int, typer.Option("--step", help="The step: the number of updates before it.")]


@app.command()
def replay(
    run: RunArgument,
    overrides: Overrides = None,
    step: Annotated[int | None, typer.Option("--step", help="The step to recompute.")] = None,
    steps: Annotated[
        str | None, typer.Option(help="Several steps: 5,9,20 or 100:200 or 100:200:10, both ends included.")
    ] = None,
    capture: Annotated[
        str | None,
        typer.Option(
            help="What to capture, as YAML: keys of checkpointing.learning_dynamics; `what` may also name weights and optimizer."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The run that the steps are written to (default: RUN-replay).")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare the weights with every recorded digest.")] = False,
    commit: Annotated[
        bool, typer.Option("--commit", help="Add the steps to the run itself, marked as replayed.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Recompute the state of any step by training from the nearest checkpoint before it."""
    if (step is None) == (steps is None):
        raise PicoError("which step? give --step N or --steps FIRST:LAST")
    if commit and (out is not None or capture is not None):
        raise PicoError(
            "--commit adds the steps as the run would have saved them; --out and --capture write another run"
        )

    from picolm.train.fork import collection
    from picolm.train.history import own_run, parse_steps
    from picolm.train.replay import replay as make_again

    opened, wanted = own_run(run), parse_steps(steps) if steps is not None else [step or 0]
    kinds, words = _kinds(capture)
    words += overrides or []
    target: Run | None = opened
    if not commit:
        target = collection(opened, out or opened.path.with_name(opened.name + "-replay"), wanted[0], words)
    verdict = make_again(opened, wanted, kinds=kinds, destination=target, overrides=words, verify=verify)
    _tell(opened, wanted, target, verdict, verify)


def _kinds(capture: str | None) -> "tuple[Due, list[str]]":
    """Return what is kept of each step, and the overrides that configure the capture."""
    import json

    from picolm.document import ConfigError, parse_yaml
    from picolm.train.job import Due

    if capture is None:
        return Due(weights=True, optimizer=True, dynamics=True), []
    try:
        chosen = parse_yaml(capture, "--capture")
    except ConfigError as error:
        lines = (": ".join(filter(None, (problem.path, problem.message))) for problem in error.problems)
        raise PicoError("\n".join(f"--capture {line}" for line in lines)) from error
    if not isinstance(chosen, dict):
        raise PicoError(
            "--capture should be a mapping, for example '{layers: all, positions: all, what: [activations]}'"
        )
    what = chosen.get("what", ["activations", "gradients"])
    what = what if isinstance(what, list) else [what]
    chosen["what"] = [kind for kind in what if kind not in ("weights", "optimizer")]
    words = [f"checkpointing.learning_dynamics.{key}={json.dumps(value)}" for key, value in chosen.items()]
    return Due(weights="weights" in what, optimizer="optimizer" in what, dynamics=bool(chosen["what"])), words


def _tell(run: "Run", wanted: list[int], target: "Run | None", verdict: "Verdict", verify: bool) -> None:
    """Print what was recomputed and the result of the comparison. Exits with code 1 where something differs."""
    from picolm.train.history import circumstances

    if verdict.stopped is not None:
        say("Interrupted: the steps that were finished are kept.")
        raise typer.Exit(128 + verdict.stopped)
    made = f"step {wanted[0]}" if len(wanted) == 1 else f"{len(wanted)} steps, {wanted[0]} to {wanted[-1]},"
    updates = verdict.last - verdict.first
    say(f"Made {made} again from the checkpoint of step {verdict.first}: {updates} updates in {verdict.seconds:.1f} s.")
    if target is not None:
        say(
            f"To be found in {target.path}"
            + (", marked as replayed." if target is run else f"; for example: pico list {target.path}")
        )
    if not verify:
        return
    if not verdict.compared:
        say("Nothing was recorded between these steps to compare with.")
        raise typer.Exit(1)
    same = [str(found.step) for found in verdict.compared if found.identical]
    if verdict.identical:
        say(f"Identical: the weights have the recorded digest at step(s) {', '.join(same)}.")
        return
    for found in verdict.compared:
        if not found.identical:
            far = "" if found.difference is None else f", relative difference {found.difference:.2e}"
            say(f"Different at step {found.step}{far}.")
    say(circumstances(run))
    raise typer.Exit(1)


@app.command()
def fork(
    run: RunArgument,
    step: Step,
    run_name: Annotated[
        str, typer.Option("--run-name", help="Name of the new run; its folder is created beside that of RUN.")
    ],
    overrides: Overrides = None,
    train: Annotated[bool, typer.Option("--train/--no-train", help="Train the new run to its end at once.")] = True,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Start a new run from a step of another run, with changed configuration keys."""
    from picolm.train import run_training
    from picolm.train.fork import fork as make
    from picolm.train.fork import not_inherited
    from picolm.train.history import own_run

    config = make(own_run(run), step, run_name, overrides or [])
    folder = Path(config.checkpointing.runs_dir) / run_name
    say(f"{folder} starts from step {step} of {run}.")
    if keys := not_inherited(own_run(str(folder))):
        say(f"Nothing of it is sent to where {run} is sent. To send it, set these keys: {', '.join(keys)}")
    if not train:
        trust = " --trust-remote-code" if trust_remote_code else ""
        say(f"Train it:  pico train {folder}/training_config.yaml{trust}")
        return
    raise typer.Exit(run_training(config))


@app.command()
def batch(
    run: RunArgument,
    step: Step,
    overrides: Overrides = None,
    rows: Annotated[int | None, typer.Option(help="Show only this many rows.")] = None,
    loss: Annotated[
        bool, typer.Option("--loss", help="Measure the loss of each token before and after the update.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write one line per token to a .csv or .parquet file.")] = None,
    characters: Annotated[int, typer.Option(help="Characters to show of each row.")] = 300,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show the text that the model saw at a step."""
    from picolm.terminal import batch_rows
    from picolm.train.history import own_run
    from picolm.train.inspection import batch_at

    seen = batch_at(own_run(run), step, overrides or [], rows=rows, loss=loss)
    for line in batch_rows(seen, characters):
        say(line)
    if out is not None:
        seen.write(out)
        say(f"One line per token: {out}")
