"""Commands for other tools and evaluations: `export`, `import`, `renew`, `evaluate`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from picolm.cli.app import RunArgument, TrustRemoteCode, app
from picolm.console import say
from picolm.errors import PicoError


@app.command()
def export(
    run: RunArgument,
    out: Annotated[Path, typer.Option(help="The folder to create.")],
    step: Annotated[int | None, typer.Option(help="Which checkpoint (default: the latest).")] = None,
    format_name: Annotated[
        str,
        typer.Option("--format", help="llama or mamba2 (transformers), gguf (llama.cpp), torch (a plain state dict)."),
    ] = "llama",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Convert the model of a checkpoint to the format of another tool."""
    from picolm.formats import export as write
    from picolm.store import Run

    written = write(Run.open(run), step, format_name, out)
    say(f"Step {written} of {run} is in {out}, in the format {format_name}.")


@app.command("import")
def import_(
    place: Annotated[
        str, typer.Argument(metavar="DIR|OWNER/NAME", help="A LlamaForCausalLM, or what `--format torch` wrote.")
    ],
    out: Annotated[Path, typer.Option(help="The run to create.")],
    step: Annotated[
        int | None, typer.Option(help="The step it is stored as (default: the one it was exported from, else 0).")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Convert a model of another tool to a run with one step, for analysis, evaluation and generation."""
    from picolm.formats.importing import import_model

    run, stored = import_model(place, out, step)
    say(f"{run.path} holds it as step {stored}.  See:  pico list {run.path}")


@app.command()
def renew(
    run: RunArgument,
    steps: Annotated[
        str | None, typer.Option(help="5,9,20 or 100:200 or 100:200:10 (default: all with weights).")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Update the modelling code inside checkpoints to this version of Pico, for newer versions of transformers."""
    from picolm.formats.renewal import renew_steps
    from picolm.terminal import phases
    from picolm.train.history import own_run, parse_steps

    opened = own_run(run)
    with phases() as progress:
        changed = dict(renew_steps(opened, parse_steps(steps) if steps else None, partial(progress, "renewing")))
    renewed = [step for step, names in changed.items() if names]
    say(f"{len(renewed)} of {len(changed)} checkpoints of {run} have new modelling code; the others had it already.")
    if renewed:
        say("Their manifests record it under `renewed`. A copy on the Hub stays as it is until:  pico push " + str(run))


@app.command()
def evaluate(
    run: RunArgument,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Keys of the run's evaluation section to change.")
    ] = None,
    steps: Annotated[
        str | None, typer.Option(help="5,9,20 or 100:200 or 100:200:10 (default: all with weights).")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help="Evaluations, separated by commas (default: those of the run).")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-evaluation-harness, separated by commas.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="A folder with YAML files of your own tasks.")] = None,
    pairs: Annotated[Path | None, typer.Option(help="Minimal pairs: a jsonl file, or a folder of them.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Evaluate checkpoints; the results are added to those in eval_results/."""
    from picolm.console import screen
    from picolm.store import Run
    from picolm.terminal import evaluations, phases
    from picolm.train.afterwards import evaluate_steps
    from picolm.train.history import parse_steps

    opened = Run.open(run)
    if type(opened) is not Run:
        raise PicoError(f"{run}: results are kept beside a run of picolm on this machine; `pico pull` brings one here")

    names = metrics.split(",") if metrics else []
    words = list(overrides or [])
    if tasks is not None:
        names, words = [*names, "lm_eval"], [*words, f"evaluation.lm_eval.tasks=[{tasks}]"]
    if include_path is not None:
        words.append(f"evaluation.lm_eval.include_path={_quoted(include_path)}")
    if pairs is not None:
        names, words = [*names, "minimal_pairs"], [*words, f"evaluation.minimal_pairs.path={_quoted(pairs)}"]
    if include_path is not None and tasks is None:
        raise PicoError("--include-path says where tasks are described; --tasks says which of them to run")
    if names:
        words.append(f"evaluation.metrics=[{','.join(dict.fromkeys(names))}]")
    with phases() as progress:
        found = dict(
            evaluate_steps(opened, parse_steps(steps) if steps else None, words, partial(progress, "evaluating"))
        )
    screen().print(evaluations(found))
    say(f"Added to {opened.path / opened.directories.eval_results_dir}.")


def _quoted(path: Path) -> str:
    """Return a path as a YAML value, whatever characters it has."""
    import json

    return json.dumps(str(path.expanduser().absolute()))
