"""Arguments that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from picolm.errors import PicoError

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
