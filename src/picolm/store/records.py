"""The small files of a run beside its steps: configuration, environment, metrics, evaluations."""

from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from picolm.errors import StoreError
from picolm.schema import dump
from picolm.store.files import disk_errors, dump_json, load_json, write_atomically
from picolm.store.journal import Journal
from picolm.store.layout import CONFIG, ENVIRONMENT, METRICS, RUN, Directories, inside, step_directory

FORMAT = "pico-run"
VERSION = 1


class Records:
    """Read and replaced as a whole, each; only the metrics grow line by line."""

    def __init__(self, path: Path, directories: Directories):
        self.path = path
        self.directories = directories
        self._metrics = Journal(path / METRICS)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def config(self) -> dict[str, Any]:
        """The configuration as it was written; the store knows no schema."""
        try:
            return yaml.safe_load((self.path / CONFIG).read_text()) or {}
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise StoreError(f"{self.path / CONFIG}: cannot be read ({error})") from error

    @property
    def environment(self) -> dict[str, Any]:
        return _read_json(self.path / ENVIRONMENT)

    def write_config(self, config: Mapping[str, Any]) -> None:
        data = dump(config).encode()
        with disk_errors("the configuration", self.path, len(data)):
            write_atomically(self.path / CONFIG, data)

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        self._write_json(self.path / ENVIRONMENT, environment)

    def append_metrics(self, entry: Mapping[str, Any]) -> None:
        """Add one line; NaN and infinities are kept, see `files.dump_json`."""
        self._metrics.append(entry)

    def metrics(self) -> list[dict[str, Any]]:
        """Every logged line; a last line that is still being written is left out."""
        return self._metrics.entries()

    def truncate_metrics(self, after_step: int) -> int:
        """Drop the lines whose `step` lies beyond `after_step` (they will be made again); return how many."""
        return self._metrics.keep(lambda entry: entry.get("step", after_step) <= after_step)

    def write_evaluation(self, step: int, results: Mapping[str, Any]) -> None:
        self._write_json(self._evaluation_path(step), results)

    def evaluation(self, step: int) -> dict[str, Any] | None:
        """What `write_evaluation` was given for the step; None when there was none."""
        path = self._evaluation_path(step)
        return _read_json(path) if path.exists() else None

    def _evaluation_path(self, step: int) -> Path:
        return inside(self.path, f"{self.directories.eval_results_dir}/{step_directory(step)}.json")

    def _write_json(self, path: Path, value: Mapping[str, Any]) -> None:
        data = dump_json(value, indent=2).encode() + b"\n"
        with disk_errors(path.name, self.path, len(data)):
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, data)

    def _sign(self) -> None:
        """Write `run.json`, which makes the directory a run: its format and what its directories are called."""
        created = datetime.now(UTC).isoformat(timespec="seconds")
        about = {"format": FORMAT, "version": VERSION, "run_name": self.name, "created": created}
        self._write_json(self.path / RUN, {**about, "directories": asdict(self.directories)})


def identity(about: bytes) -> tuple[object, object]:
    """What tells the run of one `run.json` from any other: when it was made, and its name then. Raises ValueError."""
    content = load_json(about or b"{}")
    return content.get("created"), content.get("run_name")


def read_directories(path: Path) -> Directories:
    """What `run.json` at `path` says. Raises StoreError when it is damaged or of another version."""
    about = _read_json(path)
    if (about.get("format"), about.get("version")) != (FORMAT, VERSION):
        found = f"format {about.get('format')!r} version {about.get('version')!r}"
        raise StoreError(f"{path}: {found}; this version of picolm reads {FORMAT!r} version {VERSION}")
    try:
        return Directories(**about["directories"])
    except (KeyError, TypeError) as error:
        raise StoreError(f"{path}: damaged ({error})") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(load_json(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise StoreError(f"{path}: cannot be read ({error})") from error
