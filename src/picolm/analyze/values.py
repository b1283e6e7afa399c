"""A cache of computed values. The cache key is a digest of what a value depends on: matrices, metric, options, code.

Each value has a checksum. A file that is damaged anywhere is renamed as a whole, and its values are computed again.
"""

import hashlib
import logging
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from picolm.errors import PicoError
from picolm.trusted import make_folder

log = logging.getLogger("picolm")


class Value(NamedTuple):
    """A number, or the reason why there is none; if available, also the number of forced correlations and the chance
    level (see `picolm.analyze.table`).
    """

    value: float | None
    reason: str = ""
    forced: int | None = None
    chance: float | None = None
    chance_std: float | None = None

    @property
    def z(self) -> float | None:
        """Standard deviations of chance above its mean; None if there is no chance level or it does not vary."""
        if self.value is None or self.chance is None or self.chance_std is None:
            return None
        if self.chance_std <= 1e-12 * abs(self.chance):  # rounding: permutations change nothing
            return None
        return (self.value - self.chance) / self.chance_std


class Values:
    """A table on disk, key -> value, with a checksum of each value. Each batch that was added survives a crash."""

    def __init__(self, path: Path):
        """Open or create the file. Raises PicoError if it cannot be used; see `rename_damaged` for a damaged one."""
        make_folder(path.parent)
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise PicoError(f"{path} is a link, or no regular file; remove it (a new one is made)")
        self.path = path
        with self._errors():
            self._database = sqlite3.connect(path, timeout=60)
            self._database.execute("PRAGMA journal_mode=WAL")  # one writer, and a reader in each process
            self._database.execute("PRAGMA synchronous=NORMAL")
            with self._database:
                self._database.execute(
                    "CREATE TABLE IF NOT EXISTS kept (key TEXT PRIMARY KEY, value REAL, reason TEXT, forced INTEGER, "
                    "chance REAL, chance_std REAL, checksum TEXT)"
                )
                self._database.execute(
                    "CREATE TABLE IF NOT EXISTS readings (key TEXT PRIMARY KEY, content TEXT, checksum TEXT)"
                )

    def get(self, keys: Iterable[str]) -> dict[str, Value]:
        """Return the values of `keys` that are in the table. A value with a wrong checksum counts as missing."""
        found: dict[str, Value] = {}
        wanted = list(dict.fromkeys(keys))
        for start in range(0, len(wanted), 500):  # SQLite bounds the number of parameters of a query
            batch = wanted[start : start + 500]
            marks = ",".join("?" * len(batch))
            with self._errors():
                rows = self._database.execute(f"SELECT * FROM kept WHERE key IN ({marks})", batch).fetchall()
            found |= {key: Value(*value) for key, *value, checksum in rows if _is_whole(key, value, checksum)}
        return found

    def add(self, values: Mapping[str, Value]) -> None:
        """Add values in one transaction: after a crash, all of them are there or none."""
        rows = [(key, *value, _checksum(key, value)) for key, value in values.items()]
        with self._errors(), self._database:
            self._database.executemany("INSERT OR REPLACE INTO kept VALUES (?, ?, ?, ?, ?, ?, ?)", rows)

    def readings(self, key: str) -> str | None:
        """Return what was kept of a probe under `key`, None without it, or with a wrong checksum."""
        with self._errors():
            found = self._database.execute("SELECT content, checksum FROM readings WHERE key = ?", (key,)).fetchone()
        return found[0] if found is not None and _is_text(key, *found) else None

    def add_readings(self, contents: Mapping[str, str]) -> None:
        """Add what probes found, as text, in one transaction."""
        rows = [(key, content, _checksum(key, (content,))) for key, content in contents.items()]
        with self._errors(), self._database:
            self._database.executemany("INSERT OR REPLACE INTO readings VALUES (?, ?, ?)", rows)

    def close(self) -> None:
        self._database.close()

    def damage(self) -> str | None:
        """Read the whole file and return what is wrong with it; None if nothing is."""
        with self._errors():
            (first, *_) = self._database.execute("PRAGMA integrity_check").fetchone()
            if first != "ok":
                return str(first)
            rows = self._database.execute("SELECT * FROM kept")
            wrong = sum(not _is_whole(key, value, checksum) for key, *value, checksum in rows)
            texts = self._database.execute("SELECT * FROM readings")
            wrong += sum(not _is_text(key, content, checksum) for key, content, checksum in texts)
            self._database.execute("PRAGMA user_version = 1")  # only a write shows whether the file is writable
        return f"{wrong} values do not match their checksums" if wrong else None

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Raise DamagedError if SQLite finds damaged content, PicoError for its other errors."""
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
            # SQLite calls a writable file read-only if its header states an unknown version: that is damage
            claimed = code == sqlite3.SQLITE_READONLY and os.access(self.path, os.W_OK)
            if code in _OF_CONTENT or claimed:
                raise DamagedError(f"{self.path} is damaged ({error}); start the analysis again") from error
            raise PicoError(f"{self.path}: {error}; is the disk full, or another program using it?") from error


class DamagedError(PicoError):
    """The file of cached values does not hold what was written."""


_OF_CONTENT = {
    sqlite3.SQLITE_ERROR,
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_FORMAT,
    sqlite3.SQLITE_MISMATCH,
}


_TYPES = (float | int | None, str, int | None, float | int | None, float | int | None)


def _is_whole(key: str, value: Sequence[Any], checksum: str) -> bool:
    """Return whether a row holds what was written: SQLite keeps a text or bytes in a column of numbers, too."""
    return checksum == _checksum(key, value) and all(map(isinstance, value, _TYPES))


def _is_text(key: str, content: Any, checksum: str) -> bool:
    return isinstance(content, str) and checksum == _checksum(key, (content,))


def rename_damaged(path: Path) -> None:
    """Rename the file of cached values if it is damaged; the values are computed again. Raises PicoError."""
    if not path.exists():
        return
    try:
        with closing(Values(path)) as values:
            damage = values.damage()
    except DamagedError as error:
        damage = str(error.__cause__)
    if damage is None:
        return
    number = next(number for number in count(1) if not path.with_name(f"{path.name}.damaged-{number}").exists())
    renamed = path.with_name(f"{path.name}.damaged-{number}")
    for ending in ("", "-wal", "-shm"):
        with suppress(FileNotFoundError):
            path.with_name(path.name + ending).rename(renamed.with_name(renamed.name + ending))
    log.warning(
        "The values kept in %s are damaged (%s): the file is now %s, and all are computed again.",
        path,
        damage,
        renamed.name,
    )


def _checksum(key: str, value: Iterable[Any]) -> str:
    return hashlib.sha256(repr((key, *value)).encode(errors="surrogatepass")).hexdigest()[:32]
