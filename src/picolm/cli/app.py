"""The application that commands register with, and the arguments that several of them share."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from picolm import __version__
from picolm.console import say, visible
from picolm.errors import PicoError


@contextmanager
def _visible_errors() -> Iterator[None]:
    """Show the control characters of a wrong argument as escapes in the message about it."""
    try:
        yield
    except Exception as error:
        if isinstance(message := getattr(error, "message", None), str):
            error.message = visible(message)  # type: ignore[attr-defined]
        raise


class Commands(TyperGroup):
    """The group of all commands. Messages about wrong arguments, which may hold file names, are escaped by `visible`."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        with _visible_errors():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        with _visible_errors():
            return super().invoke(ctx)


app = typer.Typer(
    cls=Commands,
    help="Pico: train small language models, keep every gradient, watch them learn.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        say(__version__)
        raise typer.Exit


@app.callback()
def pico(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of all commands."""


ConfigArguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG] [KEY=VALUE]…",
        help="A YAML file, or the name of one that comes with Pico (pico list configs); then keys that differ from it.",
    ),
]
ConfigPath = Annotated[Path | None, typer.Option("--config_path", "--config-path", help="The same as CONFIG.")]
RunArgument = Annotated[str, typer.Argument(help="A run: its folder, for example runs/demo.", metavar="RUN")]


def _trust(value: bool) -> bool:
    from picolm.registry import trust_remote_code

    trust_remote_code(value)
    return value


TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        callback=_trust,
        help="Import code that a run or model names itself, as module:attribute. Code that you name in the command, or in your "
        "own YAML file, is always imported.",
    ),
]


def config_and_overrides(command: str, config_path: Path | None, arguments: list[str] | None) -> tuple[Path, list[str]]:
    """Return the file that CONFIG or --config_path names, and the key=value words behind it.

    Raises PicoError where there is neither a file nor a shipped configuration of that name.
    """
    words = arguments or []
    if config_path is None:
        if not words or "=" in words[0]:
            from picolm.schema import ConfigError, Problem

            raise ConfigError([Problem("", "", f"which configuration? pico {command} CONFIG [key=value …]")])
        config_path, words = Path(words[0]), words[1:]
    if config_path.suffix or len(config_path.parts) != 1 or config_path.is_file():
        return config_path, words

    from picolm.shipped import shipped

    found = shipped(command)
    if str(config_path) not in found:
        raise PicoError(
            f"{config_path}: there is no such file, and no configuration of this name comes with Pico; those for "
            f"`pico {command}` are {', '.join(found)}"
        )
    return found[str(config_path)], words
