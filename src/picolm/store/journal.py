"""A file of JSON lines that is appended to while others read it, and that survives a writer killed in mid-line."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from picolm.errors import StoreError
from picolm.store.files import disk_errors, dump_json, load_json, write_atomically


class Journal:
    """`metrics.jsonl`. A last line without an end is one that was being written, and is not read."""

    def __init__(self, path: Path):
        self.path = path
        self._mended = False

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add one line. NaN and infinities are written as text, see `dump_json`."""
        line = dump_json(entry).encode() + b"\n"
        with disk_errors("a line of metrics", self.path, len(line)):
            self._mend()
            self._mended = False  # if the disk is full, half of this line may stay behind
            with open(self.path, "ab") as file:
                file.write(line)
            self._mended = True

    def entries(self) -> list[dict[str, Any]]:
        """Every whole line. Raises StoreError, with its number, for a line in the middle that is damaged."""
        entries = []
        for number, line in enumerate(self._lines(), 1):
            try:
                entries.append(load_json(line))
            except ValueError as error:
                raise StoreError(f"{self.path}:{number}: damaged ({error}); remove that line to go on") from error
        return entries

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> int:
        """Rewrite the file with the wanted entries only; return how many were dropped."""
        entries = self.entries()
        kept = [entry for entry in entries if wanted(entry)]
        with disk_errors("the metrics", self.path, 0):
            if self.path.exists():
                write_atomically(self.path, "".join(dump_json(entry) + "\n" for entry in kept).encode())
        return len(entries) - len(kept)

    def sync(self) -> None:
        """Force what was appended to the disk: a checkpoint must not be younger than the lines before it."""
        if self.path.exists():
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())

    def _lines(self) -> list[bytes]:
        """The lines that ended; what follows the last end of line is torn."""
        return self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []

    def _mend(self) -> None:
        """At the start, and after a failure: cut off a torn line, or the next would be glued to it."""
        if not self._mended and self.path.exists():
            whole = sum(len(line) + 1 for line in self._lines())
            if whole != self.path.stat().st_size:
                os.truncate(self.path, whole)
