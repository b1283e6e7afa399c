"""The small files of a run beside its steps: configuration, environment, metrics, evaluations."""

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from picolm.document import ConfigError, parse_yaml
from picolm.errors import StoreError
from picolm.schema import dump
from picolm.store.files import disk_errors, dump_json, load_json, write_atomically
from picolm.store.forms import Environment, RunFile
from picolm.store.journal import Journal
from picolm.store.layout import CONFIG, ENVIRONMENT, METRICS, RUN, Directories, inside, step_directory, step_of
from picolm.trusted import decode, read_bytes

FORMAT = "pico-run"
VERSION = 1


class Records:
    """The small files of a run. Each is read and replaced as a whole; only the metrics grow line by line."""

    def __init__(self, path: Path, directories: Directories):
        self.path = path
        self.directories = directories
        self._metrics = Journal(inside(path, METRICS))

    @property
    def name(self) -> str:
        """The name of its folder as text, in any locale; bytes that are not UTF-8 are escaped."""
        return os.fsencode(self.path.resolve().name).decode("utf-8", "backslashreplace")

    @property
    def config(self) -> dict[str, Any]:
        """The configuration as written, not checked against a schema. Raises StoreError when it cannot be read."""
        path = inside(self.path, CONFIG)
        return parse_config(read_bytes(path), str(path))

    @property
    def environment(self) -> dict[str, Any]:
        """Versions, hardware, data and starts, see `forms.Environment`. Raises StoreError when it cannot be read."""
        return _read_json(inside(self.path, ENVIRONMENT), Environment)

    def write_config(self, config: Mapping[str, Any]) -> None:
        data = dump(config).encode()
        with disk_errors("the configuration", self.path, len(data)):
            write_atomically(inside(self.path, CONFIG), data)

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        self._write_json(inside(self.path, ENVIRONMENT), environment)

    def append_metrics(self, entry: Mapping[str, Any]) -> None:
        """Append one line; NaN and infinities are kept, see `files.dump_json`."""
        self._metrics.append(entry)

    def metrics(self) -> list[dict[str, Any]]:
        """Return every logged line. Long runs log gigabytes: see `read_metrics`."""
        return list(self.read_metrics())

    def read_metrics(self, keys: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
        """Yield every logged line, read one by one; a last line that is still being written is left out.

        keys: only lines that hold one of these keys, reduced to these keys and `step`; far less work when lines are
        long.
        """
        return self._metrics.entries(keys)

    def truncate_metrics(self, after_step: int) -> int:
        """Drop the lines whose `step` is greater than `after_step` (they will be logged again); return how many."""
        return self._metrics.keep(lambda entry: entry["step"] <= after_step)

    def write_evaluation(self, step: int, results: Mapping[str, Any]) -> None:
        self._write_json(self._evaluation_path(step), results)

    def evaluation(self, step: int) -> dict[str, Any] | None:
        """Return what `write_evaluation` stored for the step; None when there is nothing."""
        path = self._evaluation_path(step)
        return _read_json(path, dict[str, Any]) if os.path.lexists(path) else None

    def evaluated_steps(self) -> list[int]:
        """Return the steps that have results, ascending; including those whose checkpoint was deleted."""
        folder = self.path / self.directories.eval_results_dir
        steps = (step_of(path.stem) for path in folder.glob("step_*.json")) if folder.is_dir() else ()
        return sorted(step for step in steps if step is not None)

    def _evaluation_path(self, step: int) -> Path:
        return inside(self.path, f"{self.directories.eval_results_dir}/{step_directory(step)}.json")

    def _write_json(self, path: Path, value: Mapping[str, Any]) -> None:
        data = dump_json(value, indent=2).encode() + b"\n"
        with disk_errors(path.name, self.path, len(data)):
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, data)

    def refuse_replacing(self, config: Mapping[str, Any]) -> None:
        """Raise StoreError when a new run with this configuration would replace a file of the user.

        The same configuration is accepted: a process that was killed while it created this run leaves it.
        """
        path = inside(self.path, CONFIG)
        ours = os.path.lexists(path) and read_bytes(path) == dump(config).encode()
        for name in (METRICS, *(() if ours else (CONFIG, ENVIRONMENT))):
            if os.path.lexists(self.path / name):
                raise StoreError(
                    f"{self.path}: holds {name} and is no run (there is no {RUN}); nothing in it is replaced: choose another "
                    "run_name, or move that file away"
                )

    def _sign(self, name: str | None = None) -> None:
        """Write `run.json`, which makes the directory a run: its format and the names of its directories."""
        created = datetime.now(UTC).isoformat(timespec="seconds")
        about = {"format": FORMAT, "version": VERSION, "run_name": name or self.name, "created": created}
        self._write_json(self.path / RUN, {**about, "directories": asdict(self.directories)})


def identity(about: bytes) -> tuple[object, object]:
    """Return what identifies the run of a `run.json`: its time of creation, and its name then. Raises StoreError."""
    content = load_json(about or b"{}", RUN)
    return content.get("created"), content.get("run_name")


def read_directories(path: Path) -> Directories:
    """Return the directory names in the `run.json` at `path`. Raises StoreError when damaged or of another version."""
    about = _read_json(path, RunFile)
    if (about.get("format"), about.get("version")) != (FORMAT, VERSION):
        found = f"format {about.get('format')!r} version {about.get('version')!r}"
        raise StoreError(f"{path}: {found}; this version of picolm reads {FORMAT!r} version {VERSION}")
    try:
        return Directories(**about["directories"])
    except (KeyError, TypeError) as error:
        raise StoreError(f"{path}: directories: {error}") from error


def parse_config(data: bytes, name: str) -> dict[str, Any]:
    """Return the mapping in the YAML of a stored configuration; an empty one for an empty file. Raises StoreError."""
    try:
        config = parse_yaml(decode(data, name), name)
    except ConfigError as error:
        raise StoreError(str(error)) from error
    if not isinstance(config, dict | None):
        raise StoreError(f"{name}: should be a mapping of sections (`model:`, `training:`, …)")
    return config or {}


def _read_json(path: Path, form: Any) -> dict[str, Any]:
    value: dict[str, Any] = load_json(read_bytes(path), str(path), form)
    return value
