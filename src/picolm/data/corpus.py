"""Documents: read, filtered, rid of duplicates where that is asked for, and put into shuffled order on disk.

The number of a document is its place among all documents that passed the filters, in the order of the files; its place in the
shuffled corpus and the lot that decides whether it is held out follow from the seed and that number alone. Numbers are known
only when all files are read, so the documents wait in *pieces* of the corpus meanwhile.
"""

from __future__ import annotations

import heapq
import shutil
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from picolm.data.documents import Found, Reader, TextFile
from picolm.data.duplicates import Digests, dropped_from, parts_for
from picolm.data.filters import load_filter
from picolm.data.job import Job, Progress, Report, written
from picolm.data.recipe import Recipe
from picolm.data.runs import bounds, read_between, write_run
from picolm.data.tokenizer import Vocabulary, load_vocabulary
from picolm.errors import DataError
from picolm.seeds import derive

_MOST_SOURCES = 1000
_EXACT_HELD_OUT = 1024
_MOST_FILES = 4096
_NAMED_BAD_LINES = 5
_WAITING = struct.Struct("<II")  # the number of its source in its group of files, bytes of its text
_HELD_OUT = 1 << 31  # added to the number of the source of a document that is held out whatever the seed
_PLACED = struct.Struct("<QI")  # the lot drawn for the document, the number of its source


@dataclass(frozen=True, kw_only=True, repr=False)
class Preparation(Job):
    """Text files on their way to rows. piece_bytes: where long texts are cut; filters: the texts that name them;
    found: the files, with what else there is where they are.
    """

    files: tuple[TextFile, ...]
    recipe: Recipe
    filters: tuple[str, ...]
    piece_bytes: int
    found: Found

    @property
    def groups(self) -> list[tuple[int, int]]:
        """Consecutive files (first, end) that are read together: about a run's worth of them, or one large one."""
        if "groups" not in self._reports:
            self._reports["groups"] = {"of": _groups(self.files, self.run_bytes)}
        return self._reports["groups"]["of"]

    def sources(self) -> list[str] | None:
        """The names of the sources by number; None when no document names one."""
        names = self.report("index")["sources"]
        if set(names) <= {None}:
            return None
        spare = "unlabelled"
        while spare in names:
            spare += "_"
        return [spare if name is None else name for name in names]

    def vocabulary(self) -> Vocabulary:
        """The tokenizer of the rows; there from the start, or once it is trained."""
        if "vocabulary" not in self._reports:
            self._reports["vocabulary"] = {"it": load_vocabulary(self.path("tokenizer"))}
        return self._reports["vocabulary"]["it"]


class Placed(NamedTuple):
    """A document with its side (`train` or `val`) and the number of its source."""

    split: str
    source: int
    text: str


def read(job: Preparation, unit: int, progress: Progress) -> Report:
    """Read a group of files into pieces of the corpus."""
    reader, keeps = Reader(job.piece_bytes), {text: load_filter(text) for text in job.filters}
    left_out, numbers = dict.fromkeys(job.filters, 0), dict[str | None, int]()
    start, end = job.groups[unit]
    before, total = (sum(file.size() for file in files) for files in (job.files[:start], job.files))
    with ExitStack() as stack:
        pieces = _Pieces(job, unit, stack)
        for file in job.files[start:end]:
            for document in reader.documents(file):
                refused = next((text for text, keep in keeps.items() if not keep(document)), None)
                if refused is not None:
                    left_out[refused] += 1
                    continue
                number = numbers.setdefault(document.source, len(numbers))
                _check_sources(len(numbers), document.source)
                for held_out, text in _sides(document.text, file.held_out, job.recipe.val_last):
                    pieces.add(number | held_out * _HELD_OUT, text.encode())
                if pieces.documents % 256 == 0:
                    progress("reading", before + reader.bytes_read, total)
        pieces.close()
    progress("reading", before + reader.bytes_read, total)
    return {
        "pieces": pieces.counts, "sources": list(numbers), "left_out": left_out, "bad_lines": reader.bad_lines,
        "first_bad_lines": reader.first_bad_lines, "nul_characters": reader.nul_characters,
        "files_with_nul": reader.files_with_nul, "digests": [file.digest() for file in job.files[start:end]],
    }  # fmt: skip


class _Pieces:
    """Writes documents as they come into files of about a run's size; with duplicates to be found, also their digests."""

    def __init__(self, job: Preparation, unit: int, stack: ExitStack):
        self._job, self._unit, self._stack = job, unit, stack
        self.counts, self.documents, self._bytes = list[int](), 0, 0
        self._file: Any = None
        self._digests: Digests | None = None

    def add(self, source: int, text: bytes) -> None:
        if self._bytes >= self._job.run_bytes:
            self.close()
        if self._file is None:
            self._file = self._stack.enter_context(written(_piece(self._job, self._unit, len(self.counts))))
            self._digests = Digests() if self._job.recipe.deduplicate else None
            self.counts.append(0)
        self._file.write(_WAITING.pack(source, len(text)) + text)
        if self._digests is not None:
            self._digests.add(text)
        self.counts[-1] += 1
        self.documents += 1
        self._bytes += len(text)

    def close(self) -> None:
        """Finish the piece that is being written."""
        if self._digests is not None:
            self._digests.write(self._job.path("digests", self._unit, len(self.counts) - 1))
        self._stack.pop_all().close()
        self._file, self._digests, self._bytes = None, None, 0


def index(job: Preparation, unit: int, progress: Progress) -> Report:
    """Number what was read: documents, pieces, sources."""
    numbers, pieces, offsets, mapping = dict[str | None, int](), list[list[int]](), [0], list[list[int]]()
    found: dict[str, Any] = {
        "left_out": dict.fromkeys(job.filters, 0),
        "bad_lines": 0,
        "first_bad_lines": [],
        "nul_characters": 0,
        "files_with_nul": [],
        "digests": [],
    }
    for group, report in enumerate(job.reports("read", range(len(job.groups)))):
        mapping.append([numbers.setdefault(source, len(numbers)) for source in report["sources"]])
        _check_sources(len(numbers), next(reversed(numbers), None))
        pieces += [[group, piece] for piece in range(len(report["pieces"]))]
        for documents in report["pieces"]:
            offsets.append(offsets[-1] + documents)
        for counted, named in (("bad_lines", "first_bad_lines"), ("nul_characters", "files_with_nul")):
            found[counted] += report[counted]
            found[named] = (found[named] + report[named])[:_NAMED_BAD_LINES]
        found["digests"] += report["digests"]
        for name, dropped in report["left_out"].items():
            found["left_out"][name] += dropped
    total = sum(file.size() for file in job.files)
    progress("reading", total, total)
    if offsets[-1] == 0:
        raise DataError(f"no text in the {len(job.files)} files ({total} bytes){_why_none(found)}")
    parts = parts_for(offsets[-1], job.run_bytes) if job.recipe.deduplicate else 0
    return found | {
        "sources": list(numbers), "numbers": mapping, "pieces": pieces, "offsets": offsets, "duplicate_parts": parts,
    }  # fmt: skip


def shuffle(job: Preparation, number: int, progress: Progress) -> Report:
    """Key the documents of a piece by their numbers, and write them in the order of the keys."""
    report = job.report("index")
    group, piece = report["pieces"][number]
    dropped, draws = dropped_from(job, number, report["duplicate_parts"]), dict[int, Draw]()
    keys, records, size = list[int](), list[bytes](), 0
    for place, (local, text) in zip(count(report["offsets"][number]), _waiting(_piece(job, group, piece))):
        if place - report["offsets"][number] in dropped:
            continue
        source, held_out = report["numbers"][group][local & ~_HELD_OUT], bool(local & _HELD_OUT)
        lot = int(not held_out) if job.recipe.is_fixed else derive(job.seed, "held out", place)
        if not (held_out and job.recipe.val_last):  # the end of a document that is counted already
            draws.setdefault(source, Draw()).add(lot)
        keys.append(derive(job.seed, "document", place))
        records.append(_PLACED.pack(lot, source) + text)
        size += len(text)
    write_run(job.path("documents", number), keys, records)
    kept = job.recipe.val_fraction > 0
    return {
        "bytes": size, "duplicates": len(dropped),
        "draws": {source: [draw.documents, draw.smallest if kept else []] for source, draw in draws.items()},
    }  # fmt: skip


def divide(job: Preparation, unit: int, progress: Progress) -> Report:
    """Decide who is held out, and into how many parts the shuffled corpus is cut."""
    pieces = len(job.report("index")["pieces"])
    draws = [Draw() for _ in job.report("index")["sources"]]
    size = duplicates = 0
    for report in job.reports("shuffle", range(pieces)):
        size, duplicates = size + report["bytes"], duplicates + report["duplicates"]
        for source, (documents, smallest) in report["draws"].items():
            draws[int(source)].merge(documents, smallest)
    shutil.rmtree(job.path("pieces"), ignore_errors=True)
    shutil.rmtree(job.path("digests"), ignore_errors=True)
    return {
        "limits": [1 if job.recipe.is_fixed else draw.limit(job.recipe.val_fraction) for draw in draws],
        "documents": [draw.documents for draw in draws],
        "duplicates": duplicates,
        "parts": -(-size // job.run_bytes),
    }


def documents_of(job: Preparation, part: int) -> Iterator[Placed]:
    """The documents of one part of the shuffled corpus, in order."""
    report = job.report("divide")
    runs = (job.path("documents", number) for number in range(len(job.report("index")["pieces"])))
    for record in read_between(runs, *bounds(part, report["parts"])):
        lot, source = _PLACED.unpack_from(record)
        yield Placed("val" if lot < report["limits"][source] else "train", source, record[_PLACED.size :].decode())


class Draw:
    """Chooses the held-out documents of a source: those that drew the smallest lots (63-bit numbers).

    The exact share is kept as long as it is at most 1024 documents; beyond that each document is held out with the
    probability `fraction`, which differs from the share by 3 % at most (one standard deviation), and takes no memory.
    """

    def __init__(self) -> None:
        self.documents = 0
        self._heap: list[int] = []  # the negated smallest lots

    @property
    def smallest(self) -> list[int]:
        """The smallest lots, rising; one more than can be held out exactly."""
        return sorted(-lot for lot in self._heap)

    def add(self, lot: int) -> None:
        """Count a document."""
        self.merge(1, [lot])

    def merge(self, documents: int, smallest: list[int]) -> None:
        """Count documents of which these drew the smallest lots."""
        self.documents += documents
        for lot in smallest:
            keep = heapq.heappush if len(self._heap) <= _EXACT_HELD_OUT else heapq.heappushpop
            keep(self._heap, -lot)

    def limit(self, fraction: float) -> int:
        """Lots below it are held out: the share of all documents, at least one and not all of them."""
        wanted = min(max(1, round(fraction * self.documents)), self.documents - 1)
        if fraction == 0 or wanted <= 0:
            return 0
        return int(fraction * 2**63) if wanted > _EXACT_HELD_OUT else self.smallest[wanted]


def _groups(files: tuple[TextFile, ...], run_bytes: int) -> list[tuple[int, int]]:
    groups, start, size = list[tuple[int, int]](), 0, 0
    for number, file in enumerate(files, 1):
        size += file.size()
        if size >= run_bytes or number - start == _MOST_FILES or number == len(files):
            groups.append((start, number))
            start, size = number, 0
    return groups


def _sides(text: str, held_out: bool, last: float) -> list[tuple[bool, str]]:
    """Return a document as (whether it is held out, text): the last share of it is, where one is asked for.

    It is cut behind a line, else behind white space, else anywhere.
    """
    end = len(text) - round(last * len(text))
    if not last or held_out or end == len(text):
        return [(held_out, text)]
    found = max(text.rfind("\n", 0, end), text.rfind("\r", 0, end)) + 1 or text.rfind(" ", 0, end) + 1 or end
    begin, rest = text[:found], text[found:]
    return [(False, begin), (True, rest)] if begin.strip() and rest.strip() else [(False, text)]


def _piece(job: Job, group: int, piece: int) -> Path:
    return job.path("pieces", group, piece)


def _waiting(piece: Path) -> Iterator[tuple[int, bytes]]:
    with piece.open("rb") as file:
        while header := file.read(_WAITING.size):
            source, size = _WAITING.unpack(header)
            yield source, file.read(size)


def _check_sources(sources: int, last: str | None) -> None:
    if sources > _MOST_SOURCES:
        raise DataError(
            f"the documents have more than {_MOST_SOURCES} different values of `source`, such as {last!r}; "
            "it is meant for kinds of text: rename the field, or put the kind into it"
        )


def _why_none(found: dict[str, Any]) -> str:
    reasons = [f"{dropped} documents were left out by {name}" for name, dropped in found["left_out"].items() if dropped]
    if found["bad_lines"]:
        reasons.append(f"{found['bad_lines']} lines could not be used: {', '.join(found['first_bad_lines'])}")
    return "".join(f"; {reason}" for reason in reasons)
