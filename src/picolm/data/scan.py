"""Index all documents and decide for each, before tokenizing, its source and whether it is held out or dropped.

`scan` reads the files once, in any number of processes, and writes an index with a record per document. `decide` turns
it into one number per document, its *stream*: 2 * source number, + 1 if it is held out; or -1 if it is in no row.

Shapes: D documents.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np

from picolm.data.batches import permute
from picolm.data.documents import Document, Reader, TextFile
from picolm.data.filters import load_filter
from picolm.data.recipe import Plan, Report, Unusable
from picolm.data.shards import written
from picolm.errors import DataError

DROPPED = -1
_MOST_SOURCES = 1000
_DIGESTS_AT_ONCE = 1 << 20
_DOCUMENT = np.dtype([("digest", "<u8", 2), ("source", "<u4"), ("held_out", "?")])
_PACKED = struct.Struct("<16sI?")
_REFUSED = (1 << 32) - 1  # the source of a document that a filter rejected


def scan(plan: Plan, unit: int, files: Sequence[TextFile]) -> Report:
    """Read the files of a unit and write the index of their documents. Returns counts of used and unusable content."""
    reader, keeps = Reader(plan.piece_bytes), {text: load_filter(text) for text in plan.filters}
    left_out, numbers, documents, used = Counter[str](), dict[str | None, int](), 0, 0
    with written(plan.path("documents", unit)) as index:
        for document, pieces in _documents(plan, reader, files):
            fault = next((text for text, keep in keeps.items() if not keep(document)), None)
            if fault is not None:
                left_out[fault] += 1
            source = _REFUSED if fault is not None else numbers.setdefault(document.source, len(numbers))
            _check_sources(numbers)
            for held_out, text in pieces:
                digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
                index.write(_PACKED.pack(digest, source, held_out))
                documents, used = documents + 1, used + (fault is None)
    return {
        "documents": documents, "used": used, "sources": list(numbers), "left_out": left_out, "bad_lines": reader.bad_lines,
        "first_bad_lines": reader.first_bad_lines, "nul_characters": reader.nul_characters,
        "files_with_nul": reader.files_with_nul, "digests": [file.digest() for file in files],
    }  # fmt: skip


def decide(plan: Plan, found: Sequence[Report], *, deduplicate: bool, val_fraction: float) -> Report:
    """Write the stream of each document to streams.npy. found: the reports of all units.

    Returns the sources, the number of documents of each, and the number of duplicates.
    """
    numbers, place = dict[str | None, int](), 0
    streams_D = np.lib.format.open_memmap(
        plan.path("streams.npy"), "w+", np.int16, (sum(report["documents"] for report in found),)
    )
    for unit, report in enumerate(found):
        mapping = np.array([numbers.setdefault(source, len(numbers)) for source in report["sources"]], dtype=np.int16)
        _check_sources(numbers)
        for chunk in _index(plan, unit):
            kept, streams = chunk["source"] != _REFUSED, np.full(len(chunk), DROPPED, dtype=np.int16)
            streams[kept] = 2 * mapping[chunk["source"][kept]] + chunk["held_out"][kept]
            streams_D[place : place + len(chunk)] = streams
            place += len(chunk)
    duplicates = _drop_duplicates(plan, streams_D, len(found)) if deduplicate else 0
    counts = np.zeros(2 * len(numbers), dtype=np.int64)
    for chunk in _chunks(streams_D):
        counts += np.bincount(chunk[chunk != DROPPED], minlength=len(counts))
    documents = counts[::2] + (0 if plan.val_last else counts[1::2])  # the ends of documents are counted already
    if val_fraction:
        _hold_out(streams_D, documents, val_fraction, plan.seed)
    streams_D.flush()
    return {"sources": _labels(list(numbers)), "documents": documents.tolist(), "duplicates": duplicates}


def texts(plan: Plan, files: Sequence[TextFile], streams_D: np.ndarray) -> Iterator[tuple[int, str]]:
    """Yield (stream, text) of the documents that are not dropped. Raises DataError if files changed since the scan."""
    pieces = chain.from_iterable(pieces for _, pieces in _documents(plan, Reader(plan.piece_bytes), files))
    for stream in streams_D.tolist():
        _, text = next(pieces, (False, None))
        if text is None:
            break
        if stream != DROPPED:
            yield stream, text
    else:
        if next(pieces, None) is None:
            return
    raise DataError(f"{files[0].path}, or one of the {len(files) - 1} files after it, was changed while it was read")


def _documents(
    plan: Plan, reader: Reader, files: Sequence[TextFile]
) -> Iterator[tuple[Document, list[tuple[bool, str]]]]:
    """Yield each document with its pieces (is held out, text)."""
    for file in files:
        for document in reader.documents(file):
            yield document, _pieces(document.text, file.held_out, plan.val_last)


def _pieces(text: str, held_out: bool, last: float) -> list[tuple[bool, str]]:
    """Return a document as pieces (is held out, text): its last share is held out if `last` is above 0.

    It is cut after a line, else after a space, else anywhere.
    """
    end = len(text) - round(last * len(text))
    if not last or held_out or end == len(text):
        return [(held_out, text)]
    found = max(text.rfind("\n", 0, end), text.rfind("\r", 0, end)) + 1 or text.rfind(" ", 0, end) + 1 or end
    begin, rest = text[:found], text[found:]
    return [(False, begin), (True, rest)] if begin.strip() and rest.strip() else [(False, text)]


def _drop_duplicates(plan: Plan, streams_D: np.ndarray, units: int) -> int:
    """Drop all but the first of documents with equal texts, one part of the digests at a time. Returns how many."""
    parts, dropped = np.uint64(1 + len(streams_D) // _DIGESTS_AT_ONCE), 0
    for part in range(int(parts)):
        numbers, digests, place = list[np.ndarray](), list[np.ndarray](), 0
        for chunk in chain.from_iterable(_index(plan, unit) for unit in range(units)):
            used = streams_D[place : place + len(chunk)] != DROPPED
            here = np.flatnonzero((chunk["digest"][:, 0] % parts == part) & used)
            numbers.append(place + here)
            digests.append(chunk["digest"][here])
            place += len(chunk)
        numbers_N, digests_N2 = np.concatenate(numbers), np.concatenate(digests)
        order_N = np.lexsort((numbers_N, digests_N2[:, 1], digests_N2[:, 0]))
        same = (digests_N2[order_N[1:]] == digests_N2[order_N[:-1]]).all(axis=1)
        streams_D[numbers_N[order_N[1:][same]]] = DROPPED
        dropped += int(same.sum())
    return dropped


def _hold_out(streams_D: np.ndarray, documents: np.ndarray, fraction: float, seed: int) -> None:
    """Hold out `fraction` of the documents of each source, chosen by a permutation: at least one, but never all."""
    before = np.zeros(len(documents), dtype=np.int64)
    for chunk in _chunks(streams_D):
        for source in np.unique(chunk[chunk != DROPPED] // 2).tolist():
            there, here = int(documents[source]), np.flatnonzero(chunk == 2 * source)
            places = permute(before[source] + np.arange(len(here)), there, seed, "held out", source)
            before[source] += len(here)
            chunk[here[places < min(max(1, round(fraction * there)), there - 1)]] += 1


def _index(plan: Plan, unit: int) -> Iterator[np.ndarray]:
    """Yield the records of the documents of a unit in chunks."""
    with plan.path("documents", unit).open("rb") as file:
        while len(chunk := np.fromfile(file, _DOCUMENT, 1 << 16)):
            yield chunk


def _chunks(streams_D: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(streams_D), 1 << 20):
        yield streams_D[start : start + (1 << 20)]


def _labels(names: list[str | None]) -> list[str] | None:
    """Return the names of the sources by number; None if no document has a source."""
    if set(names) <= {None}:
        return None
    spare = "unlabelled"
    while spare in names:
        spare += "_"
    return [spare if name is None else name for name in names]


def _check_sources(numbers: dict[str | None, Any]) -> None:
    if len(numbers) > _MOST_SOURCES:
        raise Unusable(
            f"the documents have more than {_MOST_SOURCES} different values of `source`, such as {next(reversed(numbers))!r}; "
            "it is meant for kinds of text: rename the field, or put the kind into it"
        )
