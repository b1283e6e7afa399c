"""Read documents from text files: .txt and .md (one document per file), .jsonl (per line), .parquet (per row).

File endings may have any case. All kinds but .parquet may be compressed (`.gz`, `.zst`); `.json.gz` and `.json.zst` are
read as .jsonl. Text is UTF-8, or UTF-16 or UTF-32 with a byte-order mark. The `source` of a document is the field or
column of that name, else the first folder below the given path, else None. Documents of more than four million
characters are cut at line ends. Unusable lines are skipped and counted, and the first ones listed; so are files in a
folder that are not read. A file that cannot be read is an error.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from picolm import trusted
from picolm.data.decode import opened
from picolm.data.manifest import digest_of
from picolm.data.walk import counted, visible, walk
from picolm.errors import DataError
from picolm.network import fetch

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_TEXT, _LINES, _TABLE = (".txt", ".text", ".md", ".markdown", ".py"), (".jsonl", ".ndjson"), (".parquet",)
_IN_FOLDERS = (*_TEXT[:-1], *_LINES, *_TABLE)
_KINDS = f"{', '.join(_IN_FOLDERS)}; all but .parquet also .gz or .zst"
_COMPRESSED_LINES = ".json"  # uncompressed, such a file is more often one object than one object per line
LONGEST = 4 << 20  # characters of a document
_LONGEST_LINE = 64 << 20  # characters of a line of JSON
_MOST_EXPANDED, _FREE_BYTES = 300, 64 << 20  # beyond the second, a file may expand to at most 300 times its size
_MARKS = {  # byte-order marks, the longer ones first
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
_HEAD_BYTES = 4096
_NAMED = 5
_HUB = re.compile(r"hub:(?P<name>[\w-][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<folder>.+))?")


class TextFile(NamedTuple):
    """A file with documents.

    name: the name of the file in messages. source: used for documents that do not name theirs. held_out: whether all
    its documents are held out.
    """

    path: Path
    name: str
    source: str | None = None
    held_out: bool = False

    def size(self) -> int:
        """Return the size in bytes."""
        return self.path.stat().st_size

    def state(self) -> list[Any]:
        """Return values that change when the file changes, without reading it: name, path, options, size and mtime."""
        status = self.path.stat()
        return [self.name, str(self.path.absolute()), self.source, self.held_out, status.st_size, status.st_mtime_ns]

    def digest(self) -> str:
        """Return the sha-256 of the content. Raises DataError if the file cannot be read."""
        with _reported(self), trusted.open_regular(self.path.resolve()) as content:
            return hashlib.file_digest(content, "sha256").hexdigest()


class Document(NamedTuple):
    """A text and its source."""

    text: str
    source: str | None


class Found(NamedTuple):
    """The text files that were found; the files that are not read (a count per reason, the first names); and the links
    that lead out of the given folders.
    """

    files: list[TextFile]
    not_read: dict[str, int]
    first_not_read: list[str]
    outside: list[str]


def find_files(paths: Iterable[str | Path]) -> list[TextFile]:
    """Return the text files at the given paths; see `survey`."""
    return survey(paths).files


def survey(paths: Iterable[str | Path], held_out: Iterable[str | Path] = ()) -> Found:
    """Find the text files at the given paths, sorted by name within a folder, and the files that are not read.

    `hub:owner/name[@revision][:FOLDER]` is a data set of the Hub, downloaded into the Hub's cache. A file that is found
    twice is returned once. held_out: paths whose documents are held out; these files come first. Raises DataError if
    `paths` or a given `held_out` contains no text files.
    """
    found: dict[Path, TextFile] = {}
    not_read, outside = list[tuple[str, str]](), list[str]()
    for side, places in ((True, list(held_out)), (False, list(paths))):
        before = len(found)
        for place in places:
            for file in _files_at(place, not_read, outside):
                found.setdefault(file.path.resolve(), file._replace(held_out=side))
        if len(found) == before and (places or not side):
            counts, names = counted(not_read)
            others = f"; not read: {described(counts, names)}" if counts else ""
            raise DataError(f"{', '.join(map(str, places))}: no text files in there ({_KINDS}){others}")
    return Found(list(found.values()), *counted(not_read), [visible(name) for name in outside])


def described(counts: Mapping[str, int], names: Sequence[str]) -> str:
    """Format counts per reason and some names as text for messages."""
    listed = ", ".join(f"{count:,} ({why})" for why, count in counts.items())
    return f"{listed}, such as {', '.join(names)}" if names else listed


def is_remote(path: str | Path) -> bool:
    """Return whether the path names a data set of the Hub."""
    return _HUB.fullmatch(str(path)) is not None


def digest_files(files: Sequence[TextFile], digests: Sequence[str] | None = None) -> str:
    """Return the sha-256 over names, sources and contents of files in order. digests: of their contents, if known."""
    if digests is None:
        with ThreadPoolExecutor() as threads:
            digests = list(threads.map(TextFile.digest, files))
    return digest_of(
        [file.name, file.source, digest, *(["held out"] if file.held_out else [])]
        for file, digest in zip(files, digests, strict=True)
    )


class Reader:
    """A reader of documents that also counts unusable lines, NUL characters and bytes_read (as stored in the files)."""

    def __init__(self, longest: int = LONGEST):
        """Create a reader that cuts plain-text files at line ends into documents of about `longest` bytes."""
        self.bad_lines, self.first_bad_lines, self.bytes_read = 0, list[str](), 0
        self.nul_characters, self.files_with_nul = 0, list[str]()
        self._longest, self._expanded = longest, 0

    def documents(self, file: TextFile) -> Iterator[Document]:
        """Yield the documents of a file that are not only white space. Raises DataError if the file cannot be read."""
        before, self._expanded = self.bytes_read, 0
        kind = _kind(file.path)
        read = self._pieces if kind in _TEXT else self._rows if kind in _TABLE else self._json_lines
        for document in read(file):
            if "\0" in document.text:
                self._nul(file, document.text.count("\0"))
            yield from _cut(document) if document.text.strip() else ()
        self.bytes_read = before + file.size()

    def _pieces(self, file: TextFile) -> Iterator[Document]:
        pieces, held = list[str](), 0
        for number, line in self._lines(file, LONGEST):
            try:
                pieces.append(_checked(line))
            except ValueError as error:
                self._bad(file, number, str(error))
                continue
            held += len(line.encode())
            if held >= self._longest:
                yield Document("".join(pieces), file.source)
                pieces, held = [], 0
        yield Document("".join(pieces), file.source)

    def _json_lines(self, file: TextFile) -> Iterator[Document]:
        too_long = 0
        for number, line in self._lines(file, _LONGEST_LINE):
            if number == too_long or not line.strip():
                continue
            try:
                if len(line) == _LONGEST_LINE and not line.endswith("\n"):
                    too_long = number
                    raise ValueError(f"longer than {_LONGEST_LINE:,} characters")
                yield _document(json.loads(_checked(line)), file.source)
            except RecursionError:
                self._bad(file, number, "nested too deep")
            except ValueError as error:
                self._bad(file, number, str(error))

    def _rows(self, file: TextFile) -> Iterator[Document]:
        number = 0
        with opened(file.path, file.name) as table:
            names = table.schema_arrow.names
            if "text" not in names:
                raise DataError(f"{file.name}: has no column text (it has: {', '.join(names)})")
            wanted = [name for name in ("text", "source") if name in names]
            for batch in table.iter_batches(batch_size=64, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    self._expand(file, len(str(row["text"])))
                    try:
                        yield _document(row, file.source)
                    except ValueError as error:
                        self._bad(file, number, str(error))

    def _lines(self, file: TextFile, limit: int) -> Iterator[tuple[int, str]]:
        """Yield (line number, line), a line longer than `limit` characters in parts.

        In UTF-8 files, invalid bytes become lone surrogates. Raises DataError if the file cannot be read.
        """
        before, number = self.bytes_read, 1
        with _reported(file), trusted.open_regular(file.path.resolve()) as raw:
            stream = _decompressed(raw, file.path)
            encoding = _encoding(stream.peek(_HEAD_BYTES)[:_HEAD_BYTES], file)
            errors = "surrogateescape" if encoding == "utf-8-sig" else "strict"
            text = io.TextIOWrapper(stream, encoding, errors, newline="\n")
            try:
                while line := text.readline(limit):
                    self.bytes_read = before + raw.tell()
                    self._expand(file, len(line))
                    yield number, line
                    number += line.endswith("\n")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{file.path}: begins as {encoding.upper()} and is not that after about byte {raw.tell()} ({error.reason})"
                ) from None

    def _expand(self, file: TextFile, size: int) -> None:
        """Count `size` more characters from a file. Raises DataError if its text is suspiciously large for its size."""
        self._expanded += size
        if self._expanded > max(_FREE_BYTES, _MOST_EXPANDED * file.size()):
            raise DataError(
                f"{file.path}: gives more than {_MOST_EXPANDED} times its {file.size():,} bytes; is it damaged, or made to "
                "fill the disk? decompress it yourself if its content is right"
            )

    def _nul(self, file: TextFile, count: int) -> None:
        self.nul_characters += count
        name = visible(file.name)
        if len(self.files_with_nul) < _NAMED and name not in self.files_with_nul:
            self.files_with_nul.append(name)

    def _bad(self, file: TextFile, number: int, reason: str) -> None:
        self.bad_lines += 1
        if len(self.first_bad_lines) < _NAMED:
            self.first_bad_lines.append(f"{visible(file.name)}:{number}: {reason}")


def label_of(value: Any) -> str | None:
    """Return the value of a field `source` as text (numbers, booleans, nested values as JSON); None if it is empty."""
    if value is None or value == "":
        return None
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


def _document(record: Any, source: str | None) -> Document:
    """Return the document in a JSON object or table row. Raises ValueError if it has no valid text."""
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError("no text in the field `text`")
    label = label_of(record.get("source")) or source
    for part in (text, label or ""):
        part.encode()  # a lone surrogate, legal in JSON, has no UTF-8: UnicodeEncodeError is a ValueError
    return Document(text, label)


def _checked(line: str) -> str:
    """Return `line`. Raises ValueError with the position if it was not UTF-8."""
    try:
        line.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"not UTF-8 (byte 0x{ord(line[error.start]) & 0xFF:02x} at position {error.start + 1} of the line); text in another "
            "encoding has to be converted"
        ) from None
    return line


def _encoding(head: bytes, file: TextFile) -> str:
    """Return the encoding of a file that begins with `head`. Raises DataError for binary files and Git LFS pointers."""
    if head.startswith(trusted.LFS_POINTER):
        trusted.refuse_lfs_pointer(file.path.resolve())
    if encoding := next((name for mark, name in _MARKS.items() if head.startswith(mark)), None):
        return encoding
    if 4 * head.count(b"\0") > len(head):
        raise DataError(
            f"{file.path}: {head.count(0)} of its first {len(head)} bytes are NUL, so it is UTF-16 or UTF-32 without a "
            "byte-order mark, or no text; convert it to UTF-8, or leave it out"
        )
    return "utf-8-sig"


def _cut(document: Document) -> Iterator[Document]:
    """Yield the document in pieces of at most LONGEST characters, cut at a line end if possible."""
    text = document.text
    while len(text) > LONGEST:
        end = text.rfind("\n", 1, LONGEST) + 1 or LONGEST
        yield Document(text[:end], document.source)
        text = text[end:]
    yield Document(text, document.source)


def _decompressed(raw: BinaryIO, path: Path) -> io.BufferedReader:
    compression = _COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        return cast(io.BufferedReader, raw)
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw), compression))


def _kind(path: Path) -> str | None:
    suffixes = path.suffixes[-2:] if path.suffix.lower() in _COMPRESSIONS else path.suffixes[-1:]
    kind = suffixes[0].lower() if suffixes else ""
    allowed = (*_TEXT, *_LINES, _COMPRESSED_LINES) if len(suffixes) == 2 else _TEXT + _LINES + _TABLE
    return kind if kind in allowed else None


def _is_text(path: Path) -> bool:
    return _kind(path) in (*_IN_FOLDERS, _COMPRESSED_LINES)


def _files_at(path: str | Path, not_read: list[tuple[str, str]], outside: list[str]) -> list[TextFile]:
    place = Path(path).expanduser()
    if match := _HUB.fullmatch(str(path)):
        return _on_hub(match["name"], match["revision"], match["folder"] or "", not_read)
    if place.is_dir():
        walked = walk(place, _is_text)
        not_read += walked.not_read
        outside += walked.outside
        relative = {file: file.relative_to(place) for file in walked.files}
        return [TextFile(file, name.as_posix(), _first_folder(name)) for file, name in relative.items()]
    if not os.path.lexists(place):
        raise DataError(f"{place}: there is no such file or folder")
    trusted.require_regular(place.resolve())
    if _kind(place) is None:
        raise DataError(f"{place}: is not of a known kind ({_KINDS})")
    return [TextFile(place, place.name)]


def _on_hub(name: str, revision: str | None, folder: str, not_read: list[tuple[str, str]]) -> list[TextFile]:
    """Download the text files of a data set of the Hub, or only those below `folder` unless it is empty."""
    from picolm.data.hub import list_files

    commit, entries = list_files(name, revision)
    there = [
        Path(path)
        for path in sorted(entries)
        if Path(path).is_relative_to(folder) and not Path(path).name.startswith(".")
    ]
    wanted = [path for path in there if _is_text(path)]
    if not wanted:
        raise DataError(f"{name}: has no text files{f' in {folder}' if folder else ''} ({len(entries)} files in all)")
    not_read += [(path.suffix.lower() or "no ending", path.as_posix()) for path in there if not _is_text(path)]
    local = [fetch(name, path.as_posix(), commit, DataError, repo_type="dataset") for path in wanted]
    return [
        TextFile(file, path.as_posix(), _first_folder(path.relative_to(folder))) for file, path in zip(local, wanted)
    ]


def _first_folder(relative: Path) -> str | None:
    return visible(relative.parts[0]) if len(relative.parts) > 1 else None


@contextmanager
def _reported(file: TextFile) -> Iterator[None]:
    """Convert errors of the file system and of decompression into a DataError that names the file."""
    try:
        yield
    except (OSError, EOFError) as error:
        raise DataError(f"{file.path}: cannot be read ({error}); is it truncated?") from error
