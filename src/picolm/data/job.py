"""Work that is done in units: each is finished or absent, so that it can be interrupted, spread, and gone on with.

A job is a list of stages; a stage is a number of units that need each other in no way; between two stages everything of the
first is there. A unit writes its files aside and renames them, and then its *report*, a small JSON file. A unit with a report is
never done again, whoever did it: one process, four, or a thousand tasks on a cluster. So what comes out cannot depend on them.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from picolm import trusted
from picolm.data.manifest import digest_of
from picolm.errors import FileError

WORK_FORMAT = 2  # of the files in a work folder; folders of another one are not continued
_REPORT_BYTES = 1 << 30
Progress = Callable[[str, int, int | None], None]
"""(what is being done, how much is done, how much there is in all): bytes while reading, then documents, then rows."""

Report = dict[str, Any]


def untold(what: str, done: int, total: int | None) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Job:
    """folder: where all that is not yet finished lies; out: the folder that is made of it.

    run_bytes: what a unit holds of the corpus at once. It changes which units there are, and no byte of the result.
    """

    folder: Path
    out: Path
    seed: int
    row_length: int
    run_bytes: int
    rows_per_shard: int
    _reports: dict[str, Report] = field(default_factory=dict, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reports": {}}  # what was read is not sent to other processes

    def report(self, stage: str) -> Report:
        """The report of a stage of one unit."""
        if stage not in self._reports:
            self._reports[stage] = next(self.reports(stage, range(1)))
        return self._reports[stage]

    def reports(self, stage: str, units: Iterable[int]) -> Iterator[Report]:
        """The reports of finished units."""
        for unit in units:
            yield read_sealed(self._report_path(stage, unit), self.folder)

    def is_done(self, stage: str, unit: int) -> bool:
        """Whether a unit is finished."""
        return self._report_path(stage, unit).is_file()

    def path(self, *parts: str | int) -> Path:
        """Where a part of the work lies; numbers are written with leading zeros."""
        return self.folder.joinpath(*(f"{part:06d}" if isinstance(part, int) else part for part in parts))

    def finish(self, stage: str, unit: int, report: Report) -> None:
        """Remember that a unit is finished."""
        with written(self._report_path(stage, unit)) as file:
            file.write(sealed(report))

    def sources(self) -> list[str] | None:
        """The names of the sources by number, None where nothing names one."""
        raise NotImplementedError

    def _report_path(self, stage: str, unit: int) -> Path:
        return self.path("reports", stage, f"{unit:06d}.json")


class Stage(NamedTuple):
    """units: how many there are, known once the stages before are finished; work: does one and returns its report."""

    name: str
    units: Callable[[Any], int]
    work: Callable[[Any, int, Progress], Report]

    @property
    def is_single(self) -> bool:
        """Whether it is one unit by its nature."""
        return self.units is one


def one(job: Job) -> int:
    """The units of a stage that looks at all of the stage before it."""
    return 1


def run_stage(job: Job, stage: Stage, progress: Progress = untold, rank: int = 0, world: int = 1) -> None:
    """Do the units rank, rank + world, … of a stage, leaving out what is finished."""
    for unit in range(rank, stage.units(job), world):
        if not job.is_done(stage.name, unit):
            job.finish(stage.name, unit, stage.work(job, unit, progress))
            _give_back()


def _give_back() -> None:
    """Hand free memory back to the system. Left to itself, the allocator keeps what lies between pieces that are in use, and
    what a process takes would grow with the number of units it has done.
    """
    with suppress(AttributeError, OSError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def sealed(value: Any) -> bytes:
    """Return a JSON value together with its digest, so that damage shows before the value is used."""
    value = json.loads(json.dumps(value))  # keys that are numbers become text
    return json.dumps({"value": value, "sha256": digest_of([value])}).encode()


def read_sealed(path: Path, folder: Path) -> Any:
    """Return a value written with `sealed` into a file of the work folder. Raises FileError if it is not as it was written."""
    content = trusted.parse_json(trusted.read_bytes(path, folder, _REPORT_BYTES), str(path), dict[str, Any])
    if content.get("sha256") != digest_of([content.get("value")]):
        raise FileError(f"{path}: is damaged; delete {folder} and start again")
    return content["value"]


@contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """A file to write into that takes its name when it is whole and on disk."""
    aside = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
