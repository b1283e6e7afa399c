"""Arguments that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

ConfigArguments = Annotated[
    list[str] | None,
    typer.Argument(metavar="[CONFIG] [KEY=VALUE]…", help="A YAML file; then keys that differ from it."),
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
    """CONFIG or --config_path, and the key=value words behind it."""
    words = arguments or []
    if config_path is not None:
        return config_path, words
    if not words or "=" in words[0]:
        from picolm.schema import ConfigError, Problem

        raise ConfigError([Problem("", "", f"which configuration? pico {command} CONFIG [key=value …]")])
    return Path(words[0]), words[1:]
