"""Find the configurations that come with the package by name, as in `pico train demo`."""

from pathlib import Path

FOLDER = Path(__file__).parent / "configs"
_PARTS = {"train": "", "analyze": "analyses", "suite": "suites"}
"""For each command, the subfolder with its configurations."""


def shipped(command: str) -> dict[str, Path]:
    """Return the configuration files for `pico COMMAND`, by name."""
    return {file.stem: file for file in sorted((FOLDER / _PARTS[command]).glob("*.yaml"))}


def commands() -> list[str]:
    """Return the commands that have configuration files."""
    return list(_PARTS)


def summary(file: Path) -> str:
    """Return the first line of a file, a comment that describes it, without `#`."""
    return file.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()
