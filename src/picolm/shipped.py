"""Configurations that come with the package, found by name: `pico train demo`."""

from pathlib import Path

FOLDER = Path(__file__).parent / "configs"
_PARTS = {"train": "", "analyze": "analyses", "suite": "suites"}
"""By command the folder that holds what it takes."""


def shipped(command: str) -> dict[str, Path]:
    """Return the files that `pico command` takes, by name."""
    return {file.stem: file for file in sorted((FOLDER / _PARTS[command]).glob("*.yaml"))}


def commands() -> list[str]:
    """Return the commands for which there are files."""
    return list(_PARTS)


def summary(file: Path) -> str:
    """Return what the first line of a file says of it."""
    return file.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()
