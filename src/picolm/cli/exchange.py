"""Commands that upload to and download from the Hugging Face Hub: `push`, `pull`, `data push`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from picolm.cli.app import RunArgument, app
from picolm.cli.corpora import data
from picolm.console import say
from picolm.errors import PicoError

Steps = Annotated[
    str | None, typer.Option(help="Only these steps: 5,9,20 or 100:200 or 100:200:10, both ends included.")
]
Only = Annotated[
    list[str] | None,
    typer.Option(help="Only this part of each step: weights, optimizer or dynamics. Repeat for several."),
]
Private = Annotated[bool, typer.Option("--private", help="Create the repository as private, if it does not exist.")]


@app.command()
def push(
    run: RunArgument,
    repo_id: Annotated[
        str | None,
        typer.Option("--repo-id", "--repo_id", help="OWNER/NAME (default: the repository of the last push)."),
    ] = None,
    branch: Annotated[str | None, typer.Option(help="The branch (default: the name of the run).")] = None,
    steps: Steps = None,
    only: Only = None,
    private: Private = False,
) -> None:
    """Upload a run to the Hugging Face Hub. Continues where an earlier push stopped."""
    from picolm.exchange.push import Sender, destination
    from picolm.exchange.push import push as send
    from picolm.store import Run
    from picolm.terminal import phases

    opened = Run.open(run)
    repository, name = destination(opened, repo_id, branch)
    with phases() as progress:
        sent, damaged = send(
            Sender(opened, repository, name, private),
            _chosen(steps, opened.steps),
            only or (),
            lambda done, total: progress("steps", done, total),
        )
    what = "nothing was missing" if not sent else f"sent {len(sent)} step{'s' * (len(sent) > 1)}"
    say(f"{repository}@{name}: {what}. To have it elsewhere:  pico pull {repository}@{name}")
    if damaged:
        raise PicoError(f"damaged here, and not sent: step {', '.join(map(str, damaged))}")


@app.command()
def pull(
    place: Annotated[str, typer.Argument(metavar="REPO@BRANCH", help="A run on the Hub: OWNER/NAME@BRANCH.")],
    out: Annotated[Path | None, typer.Option(help="The folder of the run (default: runs/BRANCH).")] = None,
    steps: Steps = None,
    only: Only = None,
) -> None:
    """Download a run from the Hugging Face Hub, of Pico or pico-train, and verify it. Continues where it stopped."""
    from picolm.exchange.pull import pull as fetch
    from picolm.store import Run
    from picolm.store.hub import HubRun
    from picolm.terminal import phases

    source = Run.open("hub:" + place.removeprefix("hub:"))
    if not isinstance(source, HubRun):
        raise PicoError(
            f"{place}: a series of checkpoints is not pulled: it is read where it is, as --run {source.path}"
        )
    folder = out or Path("runs") / source.name
    with phases() as progress:
        fetched = fetch(
            source, folder, _chosen(steps, source.steps), only or (), lambda done, total: progress("steps", done, total)
        )
    what = (
        "nothing was missing" if not fetched else f"{len(fetched)} step{'s' * (len(fetched) > 1)}, every digest as sent"
    )
    say(f"{folder}: {what}. For example:  pico list {folder}")


@data.command("push")
def push_data(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `pico data prepare` made.")],
    repo_id: Annotated[str, typer.Option("--repo-id", "--repo_id", help="OWNER/NAME of the data set.")],
    branch: Annotated[str, typer.Option(help="The branch.")] = "main",
    private: Private = False,
) -> None:
    """Upload prepared rows to the Hugging Face Hub, with their manifest and a card."""
    from picolm.exchange.rows import push_rows
    from picolm.terminal import phases

    with phases() as progress:
        push_rows(
            folder,
            repo_id,
            branch=branch,
            private=private,
            progress=lambda done, total: progress("shards", done, total),
        )
    revision = "" if branch == "main" else f"@{branch}"
    say(f"{repo_id} holds the rows. Train on them:  pico train CONFIG data.dataset.name={repo_id}{revision}")


def _chosen(steps: str | None, there: Sequence[int]) -> list[int] | None:
    """Return the steps that were asked for; of a range, those that exist."""
    from picolm.train.history import parse_steps

    if steps is None:
        return None
    wanted = parse_steps(steps)
    found = sorted(set(wanted) & set(there)) if ":" in steps else wanted
    if not found:
        raise PicoError(f"--steps {steps}: there is none of them (there are: {', '.join(map(str, there)) or 'none'})")
    return found
