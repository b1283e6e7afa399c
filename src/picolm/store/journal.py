"""An append-only file of JSON lines: it can be read while it grows, and survives a writer killed in mid-line."""

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from picolm.errors import FileError, FileMissing, StoreError
from picolm.store.files import disk_errors, dump_json, load_json, written_aside
from picolm.store.forms import LogLine
from picolm.trusted import open_regular, open_to_append, read_lines

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
            with disk_errors("the metrics", self.path, 0), written_aside(self.path) as aside, open(aside, "xb") as file:
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
