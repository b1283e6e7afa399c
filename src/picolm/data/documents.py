"""Text in files -> documents, one at a time: .txt and .md (a file is a document), .jsonl (a line), .parquet (a row).

`.gz` and `.zst` of the first three are decompressed on the way; `.json.gz` and `.json.zst` hold lines too. What a document is
from, its `source`, is the field or column of that name, else the first folder below the given path, else nothing. Documents are
cut at line ends where they exceed a few megabytes. A line that cannot be used is counted and named, and left out; a file that
cannot be read is an error.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from picolm.data.decode import opened
from picolm.data.manifest import digest_of
from picolm.errors import DataError
from picolm.network import fetch

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_TEXT, _LINES, _TABLE = (".txt", ".md", ".py"), (".jsonl",), (".parquet",)
_IN_FOLDERS = (".txt", ".md", ".jsonl", ".parquet")
_COMPRESSED_LINES = ".json"  # alone, such a file is more often one object than lines of them
LONGEST_BYTES = 4 << 20
_NAMED_BAD_LINES = 5
_HUB = re.compile(r"hub:(?P<name>[\w-][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<folder>.+))?")


class Remote(NamedTuple):
    """A file of a data set on the Hub at one commit, and what the Hub states of it (sha256 of large files only)."""

    repository: str
    commit: str
    bytes: int
    sha256: str | None


class TextFile(NamedTuple):
    """A file with documents. name: what messages call it; source: that of its documents which name none themselves.

    A file on the Hub (its path is the one there) is fetched into the Hub's cache when it is read.
    """

    path: Path
    name: str
    source: str | None = None
    remote: Remote | None = None

    def local(self) -> Path:
        """Where it can be read."""
        if self.remote is None:
            return self.path
        repository, commit, *_ = self.remote
        return fetch(repository, self.path.as_posix(), commit, DataError, repo_type="dataset")

    def size(self) -> int:
        """Bytes."""
        return self.path.stat().st_size if self.remote is None else self.remote.bytes

    def digest(self) -> str:
        """sha-256 of its content."""
        if self.remote is not None and self.remote.sha256 is not None:
            return self.remote.sha256
        with _reported(self), self.local().open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()


class Document(NamedTuple):
    """A text and what it is from."""

    text: str
    source: str | None


def find_files(paths: Iterable[str | Path]) -> list[TextFile]:
    """The text files at the given paths, those of a folder in the order of their names; `hub:owner/name[@revision][:FOLDER]`
    is a data set of the Hub. Raises DataError if there are none.
    """
    found: dict[Path, TextFile] = {}
    for text, place in ((str(path), Path(path)) for path in paths):
        if match := _HUB.fullmatch(text):
            files = _on_hub(match["name"], match["revision"], match["folder"] or "")
        elif place.is_dir():
            files = [_in_folder(place, path) for path in _walk(place) if _is_text(path)]
        elif not place.is_file():
            raise DataError(f"{place}: there is no such file or folder")
        elif _kind(place) is None:
            raise DataError(
                f"{place}: is not of a known kind ({', '.join(_IN_FOLDERS)}; all but .parquet also .gz or .zst)"
            )
        else:
            files = [TextFile(place, place.name)]
        for file in files:
            found.setdefault(
                file.path.resolve() if file.remote is None else Path(file.remote.repository) / file.path, file
            )
    if not found:
        raise DataError(
            f"{', '.join(map(str, paths))}: no text files in there ({', '.join(_IN_FOLDERS)}, also .gz or .zst)"
        )
    return list(found.values())


def is_remote(path: str | Path) -> bool:
    """Whether it names a data set of the Hub."""
    return _HUB.fullmatch(str(path)) is not None


def digest_files(files: Sequence[TextFile]) -> str:
    """sha-256 over name, source and content of the files, in their order."""
    with ThreadPoolExecutor() as threads:
        return digest_inputs(files, threads.map(TextFile.digest, files))


def digest_inputs(files: Iterable[TextFile], digests: Iterable[str]) -> str:
    """The same where the digests of the files are known."""
    return digest_of([file.name, file.source, digest] for file, digest in zip(files, digests))


class Reader:
    """Reads documents, and remembers what it could not use and how far it got (bytes_read, of the files' own bytes)."""

    def __init__(self, piece_bytes: int = LONGEST_BYTES):
        """Text files are cut at line ends into documents of about `piece_bytes`."""
        self.bad_lines, self.first_bad_lines, self.bytes_read = 0, list[str](), 0
        self._piece_bytes = piece_bytes

    def documents(self, file: TextFile) -> Iterator[Document]:
        """The documents of a file that hold more than white space."""
        before = self.bytes_read
        kind = _kind(file.path)
        read = self._pieces if kind in _TEXT else self._rows if kind in _TABLE else self._json_lines
        for document in read(file):
            yield from _cut(document) if document.text.strip() else ()
        self.bytes_read = before + file.size()

    def _pieces(self, file: TextFile) -> Iterator[Document]:
        pieces, held_bytes = list[str](), 0
        for number, line in self._lines(file, LONGEST_BYTES):
            try:
                pieces.append(line.decode("utf-8-sig" if number == 1 else "utf-8"))  # a byte-order mark is no text
            except UnicodeDecodeError as error:
                self._bad(file, number, f"not UTF-8 ({error.reason})")
                continue
            held_bytes += len(line)
            if held_bytes >= self._piece_bytes:
                yield Document("".join(pieces), file.source)
                pieces, held_bytes = [], 0
        yield Document("".join(pieces), file.source)

    def _json_lines(self, file: TextFile) -> Iterator[Document]:
        for number, line in self._lines(file, -1):
            if not line.strip():
                continue
            try:
                yield _document(json.loads(line), file.source)
            except ValueError as error:
                self._bad(file, number, str(error))

    def _rows(self, file: TextFile) -> Iterator[Document]:
        number = 0
        with opened(file.local(), file.name) as table:
            names = table.schema_arrow.names
            if "text" not in names:
                raise DataError(f"{file.name}: has no column text (it has: {', '.join(names)})")
            for batch in table.iter_batches(
                batch_size=64, columns=[name for name in ("text", "source") if name in names]
            ):
                for row in batch.to_pylist():
                    number += 1
                    try:
                        yield _document(row, file.source)
                    except ValueError as error:
                        self._bad(file, number, str(error))

    def _lines(self, file: TextFile, limit: int) -> Iterator[tuple[int, bytes]]:
        """(line number, line); a line longer than `limit` bytes comes in parts that end with whole characters."""
        before = self.bytes_read
        with _reported(file), file.local().open("rb") as raw:
            stream, number, rest = _decompressed(raw, file.path), 1, b""
            while line := rest + stream.readline(limit):
                self.bytes_read = before + raw.tell()
                whole = len(line) if line.endswith(b"\n") or len(line) < limit else _whole_characters(line)
                yield number, line[:whole]
                rest = line[whole:]
                number += line.endswith(b"\n")

    def _bad(self, file: TextFile, number: int, reason: str) -> None:
        self.bad_lines += 1
        if len(self.first_bad_lines) < _NAMED_BAD_LINES:
            self.first_bad_lines.append(f"{file.name}:{number}: {reason}")


def label_of(value: Any) -> str | None:
    """Return the value of a field `source` as text: numbers, truth values and what is nested as JSON; None if it is empty."""
    if value is None or value == "":
        return None
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


def _document(record: Any, source: str | None) -> Document:
    """Return the document in a JSON object or table row. Raises ValueError saying why there is none."""
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError("no text in the field `text`")
    label = label_of(record.get("source")) or source
    for part in (text, label or ""):
        part.encode()  # a lone surrogate, legal in JSON, has no UTF-8: UnicodeEncodeError is a ValueError
    return Document(text, label)


def _cut(document: Document) -> Iterator[Document]:
    """Pieces of at most LONGEST_BYTES characters, that end with a line where they can."""
    text = document.text
    while len(text) > LONGEST_BYTES:
        end = text.rfind("\n", 1, LONGEST_BYTES) + 1 or LONGEST_BYTES
        yield Document(text[:end], document.source)
        text = text[end:]
    yield Document(text, document.source)


def _whole_characters(line: bytes) -> int:
    """Bytes up to the start of a UTF-8 character that is cut off at the end, if there is one."""
    for back in range(1, min(4, len(line)) + 1):
        byte = line[-back]
        if byte >= 0xC0:  # the first byte of a character of several bytes tells how many
            return len(line) - back if back < (2 if byte < 0xE0 else 3 if byte < 0xF0 else 4) else len(line)
        if byte < 0x80:
            break
    return len(line)


def _decompressed(raw: BinaryIO, path: Path) -> BinaryIO:
    compression = _COMPRESSIONS.get(path.suffix)
    if compression is None:
        return raw
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw), compression))


def _kind(path: Path) -> str | None:
    suffixes = path.suffixes[-2:] if path.suffix in _COMPRESSIONS else path.suffixes[-1:]
    kind = suffixes[0].lower() if suffixes else ""
    allowed = (*_TEXT, *_LINES, _COMPRESSED_LINES) if len(suffixes) == 2 else _TEXT + _LINES + _TABLE
    return kind if kind in allowed else None


def _is_text(path: Path) -> bool:
    return _kind(path) in (*_IN_FOLDERS, _COMPRESSED_LINES)


def _on_hub(name: str, revision: str | None, folder: str) -> list[TextFile]:
    """The text files of a data set on the Hub, those within a folder where one is named."""
    from picolm.data.hub import list_files

    commit, entries = list_files(name, revision)
    wanted = [path for path in sorted(entries) if _is_text(Path(path)) and Path(path).is_relative_to(folder)]
    if not wanted:
        raise DataError(f"{name}: has no text files{f' in {folder}' if folder else ''} ({len(entries)} files in all)")
    return [
        TextFile(Path(path), path, _first_folder(Path(path).relative_to(folder)), Remote(name, commit, *entries[path]))
        for path in wanted
    ]


def _first_folder(relative: Path) -> str | None:
    return relative.parts[0] if len(relative.parts) > 1 else None


def _walk(folder: Path) -> list[Path]:
    """Files below a folder by their relative names, without hidden ones."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent) / name for name in files if not name.startswith(".")]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _in_folder(folder: Path, path: Path) -> TextFile:
    relative = path.relative_to(folder)
    return TextFile(path, relative.as_posix(), _first_folder(relative))


@contextmanager
def _reported(file: TextFile) -> Iterator[None]:
    """Turn what the file system or a decompressor reports into a DataError that names the file."""
    try:
        yield
    except (OSError, EOFError) as error:
        raise DataError(f"{file.path}: cannot be read ({error}); is it truncated?") from error
