"""Values that were computed before, by what they follow from: the digests of the matrices, the metric, its options, its code."""

import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple


class Value(NamedTuple):
    """A number, or the reason why there is none; with how many correlations are forced, and what chance gives, where that is
    asked for (see `picolm.analyze.table`).
    """

    value: float | None
    reason: str = ""
    forced: int | None = None
    chance: float | None = None
    chance_std: float | None = None

    @property
    def z(self) -> float | None:
        """Standard deviations of chance above its mean; None where there is no chance level, or it does not vary."""
        if self.value is None or self.chance is None or not self.chance_std:
            return None
        return (self.value - self.chance) / self.chance_std


class Values:
    """A table on disk, key -> value; every batch that was added survives an interruption."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(path, timeout=60)
        self._database.execute("PRAGMA journal_mode=WAL")  # a reader in each process beside the one writer
        self._database.execute("PRAGMA synchronous=NORMAL")
        with self._database:
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS computed (key TEXT PRIMARY KEY, value REAL, reason TEXT)"
            )

    def get(self, keys: Iterable[str]) -> dict[str, Value]:
        """Those of the values that are known."""
        found: dict[str, Value] = {}
        wanted = list(dict.fromkeys(keys))
        for start in range(0, len(wanted), 500):  # SQLite bounds the number of parameters of a query
            batch = wanted[start : start + 500]
            marks = ",".join("?" * len(batch))
            rows = self._database.execute(f"SELECT key, value, reason FROM computed WHERE key IN ({marks})", batch)
            found |= {key: Value(value, reason) for key, value, reason in rows}
        return found

    def add(self, values: Mapping[str, Value]) -> None:
        """Keep values; all of a batch or, after a crash, none of it."""
        with self._database:
            rows = [(key, value.value, value.reason) for key, value in values.items()]
            self._database.executemany("INSERT OR REPLACE INTO computed VALUES (?, ?, ?)", rows)

    def close(self) -> None:
        self._database.close()
