"""`pico report`."""

from pathlib import Path
from typing import Annotated

import typer

from picolm.cli.app import TrustRemoteCode, app
from picolm.console import say

Runs = Annotated[list[str] | None, typer.Argument(metavar="[RUN]…", help="Runs to show: their folders.")]


@app.command()
def report(
    runs: Runs = None,
    analysis: Annotated[
        list[str] | None, typer.Option("--analysis", "-a", help="The folder of an analysis. Repeat for several.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")] = Path("report.html"),
    figures: Annotated[
        Path | None,
        typer.Option(help="Also write each figure as SVG, PDF and PNG to this folder (needs the extra `figures`)."),
    ] = None,
    section: Annotated[
        list[str] | None, typer.Option("--section", help="A section of your own, my_lab.module:function.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write one HTML file with the plots and tables of runs and analyses. It opens without a network."""
    from picolm.console import configure_logging
    from picolm.report.assembly import write

    configure_logging("WARNING")
    path = write(runs or [], analysis or [], out, own=section or [], figures=figures)
    say_where(path)
    if figures is not None:
        say(f"Its figures are in {figures}.")


def say_where(path: Path) -> None:
    """Print where the report is and how large it is."""
    say(f"The report: {path} ({path.stat().st_size / 1e6:.1f} MB). It opens in any browser, offline.")
