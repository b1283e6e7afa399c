"""`pico view`."""

from typing import Annotated

import typer

from picolm.cli.app import TrustRemoteCode, app


@app.command()
def view(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN…", help="Runs to look at: their folders, or series of checkpoints.")
    ],
    analysis: Annotated[
        list[str] | None,
        typer.Option(
            "--analysis", "-a", help="The folder of an analysis to show (those in analysis_results are shown anyway)."
        ),
    ] = None,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in the browser.")] = True,
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen at (0: any free one).")] = 0,
    host: Annotated[
        str, typer.Option(help="The address to listen at; one that other machines reach needs --allow-remote.")
    ] = "127.0.0.1",
    allow_remote: Annotated[
        bool,
        typer.Option("--allow-remote", help="Let other machines that know the address read the runs, unencrypted."),
    ] = False,
    beside: Annotated[
        int | None, typer.Option(help="Wait for the run, and end with the process of this number.", hidden=True)
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Watch a model learn in the browser: drag a slider through training and see what it thinks at each step."""
    from picolm.view.command import serve, wait_beside

    if beside is not None:
        wait_beside(runs, beside)
    serve(runs, host=host, port=port, remote=allow_remote, browser=browser, analyses=analysis or (), beside=beside)
