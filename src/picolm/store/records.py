"""The small files of a run beside its steps: configuration, environment, metrics, evaluations.

The metrics are a journal: lines of JSON that are only appended, can be read while they grow, and survive a writer killed in
mid-line.
"""

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from picolm.document import ConfigError, parse_yaml
from picolm.errors import FileError, FileMissing, StoreError
from picolm.schema import dump
from picolm.store.files import disk_errors, dump_json, load_json, replacement, write_atomically
from picolm.store.forms import Environment, LogLine, RunFile
from picolm.store.manifest import CONFIG, ENVIRONMENT, METRICS, RUN, Directories, inside, step_directory, step_of
from picolm.trusted import decode, open_regular, open_to_append, read_bytes, read_lines

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


_BLOCK_BYTES = 1 << 16


class Journal:
    """The file `metrics.jsonl`. A last line without a newline is still being written, and is not read."""

    def __init__(self, path: Path):
        self.path = path
        self._mended = False

    def append(self, entry: Mapping[str, Any]) -> None:
        """Append one line. NaN and infinities are written as text, see `dump_json`."""
        line = dump_json(entry).encode() + b"\n"
        with disk_errors("a line of metrics", self.path, len(line)):
            self._mend()
            self._mended = False  # if the disk is full, half of this line may stay behind
            with os.fdopen(open_to_append(self.path), "ab") as file:
                file.write(line)
            self._mended = True

    def entries(self, keys: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
        """Yield every complete line, read one by one; nothing when there is no file.

        keys: only lines that hold one of these keys, reduced to these keys and the step. Raises StoreError, with the
        number of the line, for a damaged one.
        """
        marks = [f'"{key}"'.encode() for key in keys or ()]
        for number, line in enumerate(self._lines(), 1):
            usual = line.startswith(b'{"step":') and line.endswith(b"}")  # as `append` writes it
            if keys is not None and usual and not any(mark in line for mark in marks):
                continue
            entry = self._parsed(line, number)
            if keys is None:
                yield entry
            elif any(key in entry for key in keys):
                yield {"step": entry["step"], **{key: entry[key] for key in keys if key in entry}}

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> int:
        """Rewrite the file with only the entries that `wanted` accepts, unless all are; return the number dropped."""
        dropped = sum(not wanted(entry) for entry in self.entries(("step",)))
        if dropped:
            with (
                disk_errors("the metrics", self.path, 0),
                replacement(self.path) as temporary,
                open(temporary, "xb") as file,
            ):
                for number, line in enumerate(self._lines(), 1):
                    if wanted(self._parsed(line, number)):
                        file.write(line + b"\n")
                file.flush()
                os.fsync(file.fileno())
        return dropped

    def sync(self) -> None:
        """Flush appended lines to disk: a checkpoint must not be newer than the lines before it."""
        try:
            with open_regular(self.path) as file:
                os.fsync(file.fileno())
        except FileMissing:
            pass

    def copy_whole_lines(self, target: Path) -> None:
        """Copy the complete lines to a new file."""
        with open(target, "xb") as file:
            for line in self._lines():
                file.write(line + b"\n")

    def _parsed(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            entry: dict[str, Any] = load_json(line, f"{self.path}:{number}: damaged", LogLine)
        except FileError as error:
            raise StoreError(f"{error}; remove that line to go on") from error
        return entry

    def _lines(self) -> Iterator[bytes]:
        try:
            yield from read_lines(self.path)
        except FileMissing:
            return

    def _mend(self) -> None:
        """Cut off an incomplete last line, at the start and after a failure: the next line would be joined to it."""
        if self._mended or not os.path.lexists(self.path):
            return
        with open_regular(self.path) as file:
            size = os.fstat(file.fileno()).st_size
            whole = _end_of_lines(file, size)
        if whole != size:
            os.truncate(self.path, whole)


def _end_of_lines(file: BinaryIO, size: int) -> int:
    """Return the position after the last newline, searching from the end."""
    end = size
    while end:
        start = max(0, end - _BLOCK_BYTES)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
