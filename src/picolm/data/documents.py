"""Text in files -> documents, one at a time: .txt and .md (a file is a document), .jsonl (a line), .parquet (a row).

Endings count in any case. `.gz` and `.zst` of all but the last are decompressed on the way; `.json.gz` and `.json.zst` hold lines
too. Text is UTF-8, or UTF-16 or UTF-32 with a byte-order mark. What a document is from, its `source`, is the field or column of
that name, else the first folder below the given path, else nothing. Documents are cut at line ends where they exceed a few
megabytes. A line that cannot be used is counted and named, and left out; a file that cannot be read is an error; files in a
folder that are not read are counted and named.
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
_COMPRESSED_LINES = ".json"  # alone, such a file is more often one object than lines of them
LONGEST_BYTES = 4 << 20
_LONGEST_LINE = 64 << 20  # bytes of a line of JSON
_MOST_EXPANDED, _FREE_BYTES = 300, 64 << 20  # how many times its size a file may give, once it has given so many bytes
_MARKS = {  # byte-order marks, the longer ones first
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
_HEAD_BYTES = 4096
_NAMED_BAD_LINES = 5
_HUB = re.compile(r"hub:(?P<name>[\w-][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<folder>.+))?")


class Remote(NamedTuple):
    """A file of a data set on the Hub at one commit, and what the Hub states of it (sha256 of large files only)."""

    repository: str
    commit: str
    bytes: int
    sha256: str | None


class TextFile(NamedTuple):
    """A file with documents. name: what messages call it; source: that of its documents which name none themselves; held_out:
    whether they are all held out.

    A file on the Hub (its path is the one there) is fetched into the Hub's cache when it is read.
    """

    path: Path
    name: str
    source: str | None = None
    remote: Remote | None = None
    held_out: bool = False

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
        with _reported(self), trusted.open_regular(self.local().resolve()) as content:
            return hashlib.file_digest(content, "sha256").hexdigest()


class Document(NamedTuple):
    """A text and what it is from."""

    text: str
    source: str | None


class Found(NamedTuple):
    """Text files, and what there is besides: files that are not read (how many for each reason, the first names), and links
    that lead out of the given folders.
    """

    files: list[TextFile]
    not_read: dict[str, int]
    first_not_read: list[str]
    outside: list[str]


def find_files(paths: Iterable[str | Path]) -> list[TextFile]:
    """Return the text files at the given paths, see `survey`."""
    return survey(paths).files


def survey(paths: Iterable[str | Path], held_out: Iterable[str | Path] = ()) -> Found:
    """Return the text files at the given paths, those of a folder in the order of their names, and what else there is.

    `hub:owner/name[@revision][:FOLDER]` is a data set of the Hub. A file that is found twice is read once. held_out: paths
    whose documents are held out; these files come first. Raises DataError if one of the two has no files.
    """
    found: dict[Path, TextFile] = {}
    not_read, outside = list[tuple[str, str]](), list[str]()
    for side, places in ((True, list(held_out)), (False, list(paths))):
        before = len(found)
        for place in places:
            for file in _files_at(place, not_read, outside):
                key = file.path.resolve() if file.remote is None else Path(file.remote.repository) / file.path
                found.setdefault(key, file._replace(held_out=side))
        if len(found) == before and (places or not side):
            counts, names = counted(not_read)
            others = f"; not read: {told(counts, names)}" if counts else ""
            raise DataError(f"{', '.join(map(str, places))}: no text files in there ({_KINDS}){others}")
    return Found(list(found.values()), *counted(not_read), [visible(name) for name in outside])


def told(counts: Mapping[str, int], names: Sequence[str]) -> str:
    """Return counts by reason and some names as text for messages."""
    listed = ", ".join(f"{count:,} ({why})" for why, count in counts.items())
    return f"{listed}, such as {', '.join(names)}" if names else listed


def _files_at(path: str | Path, not_read: list[tuple[str, str]], outside: list[str]) -> list[TextFile]:
    place = Path(path).expanduser()
    if match := _HUB.fullmatch(str(path)):
        files, others = _on_hub(match["name"], match["revision"], match["folder"] or "")
        not_read += others
        return files
    if place.is_dir():
        walked = walk(place, _is_text)
        not_read += walked.not_read
        outside += walked.outside
        return [_in_folder(place, file) for file in walked.files]
    if not os.path.lexists(place):
        raise DataError(f"{place}: there is no such file or folder")
    trusted.require_regular(place.resolve())
    if _kind(place) is None:
        raise DataError(f"{place}: is not of a known kind ({_KINDS})")
    return [TextFile(place, place.name)]


def is_remote(path: str | Path) -> bool:
    """Whether it names a data set of the Hub."""
    return _HUB.fullmatch(str(path)) is not None


def digest_files(files: Sequence[TextFile]) -> str:
    """sha-256 over name, source and content of the files, in their order."""
    with ThreadPoolExecutor() as threads:
        return digest_inputs(files, threads.map(TextFile.digest, files))


def digest_inputs(files: Iterable[TextFile], digests: Iterable[str]) -> str:
    """The same where the digests of the files are known."""
    return digest_of(
        [file.name, file.source, digest, *(["held out"] if file.held_out else [])]
        for file, digest in zip(files, digests)
    )


class Reader:
    """Reads documents, and remembers what it could not use and how far it got (bytes_read, of the files' own bytes)."""

    def __init__(self, piece_bytes: int = LONGEST_BYTES):
        """Text files are cut at line ends into documents of about `piece_bytes`."""
        self.bad_lines, self.first_bad_lines, self.bytes_read = 0, list[str](), 0
        self.nul_characters, self.files_with_nul = 0, list[str]()
        self._piece_bytes, self._expanded = piece_bytes, 0

    def documents(self, file: TextFile) -> Iterator[Document]:
        """Yield the documents of a file that hold more than white space."""
        before, self._expanded = self.bytes_read, 0
        kind = _kind(file.path)
        read = self._pieces if kind in _TEXT else self._rows if kind in _TABLE else self._json_lines
        for document in read(file):
            if "\0" in document.text:
                self._nul(file, document.text.count("\0"))
            yield from _cut(document) if document.text.strip() else ()
        self.bytes_read = before + file.size()

    def _pieces(self, file: TextFile) -> Iterator[Document]:
        pieces, held_bytes = list[str](), 0
        for number, line in self._lines(file, LONGEST_BYTES):
            try:
                pieces.append(_text(line, number))
            except ValueError as error:
                self._bad(file, number, str(error))
                continue
            held_bytes += len(line)
            if held_bytes >= self._piece_bytes:
                yield Document("".join(pieces), file.source)
                pieces, held_bytes = [], 0
        yield Document("".join(pieces), file.source)

    def _json_lines(self, file: TextFile) -> Iterator[Document]:
        too_long = 0
        for number, line in self._lines(file, _LONGEST_LINE):
            if number == too_long or not line.strip():
                continue
            try:
                if len(line) > _LONGEST_LINE - 4 and not line.endswith(b"\n"):
                    too_long = number
                    raise ValueError(f"longer than {_LONGEST_LINE >> 20} MiB")
                yield _document(json.loads(_text(line, number)), file.source)
            except RecursionError:
                self._bad(file, number, "nested too deep")
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
                    self._expand(file, len(str(row["text"])))
                    try:
                        yield _document(row, file.source)
                    except ValueError as error:
                        self._bad(file, number, str(error))

    def _lines(self, file: TextFile, limit: int) -> Iterator[tuple[int, bytes]]:
        """(line number, line); a line longer than `limit` bytes comes in parts that end with whole characters."""
        before = self.bytes_read
        with _reported(file), trusted.open_regular(file.local().resolve()) as raw:
            stream, number, rest = _as_utf8(_decompressed(raw, file.path), file), 1, b""
            while line := rest + stream.readline(limit):
                self.bytes_read = before + raw.tell()
                self._expand(file, len(line) - len(rest))
                whole = len(line) if line.endswith(b"\n") or len(line) < limit else _whole_characters(line)
                yield number, line[:whole]
                rest = line[whole:]
                number += line.endswith(b"\n")

    def _expand(self, file: TextFile, size: int) -> None:
        """Count what a file gave. Raises DataError where it is so much more than its size that it would fill the disk."""
        self._expanded += size
        if self._expanded > max(_FREE_BYTES, _MOST_EXPANDED * file.size()):
            raise DataError(
                f"{file.path}: gives more than {_MOST_EXPANDED} times its {file.size():,} bytes; is it damaged, or made to "
                "fill the disk? decompress it yourself if its content is right"
            )

    def _nul(self, file: TextFile, count: int) -> None:
        self.nul_characters += count
        name = visible(file.name)
        if len(self.files_with_nul) < _NAMED_BAD_LINES and name not in self.files_with_nul:
            self.files_with_nul.append(name)

    def _bad(self, file: TextFile, number: int, reason: str) -> None:
        self.bad_lines += 1
        if len(self.first_bad_lines) < _NAMED_BAD_LINES:
            self.first_bad_lines.append(f"{visible(file.name)}:{number}: {reason}")


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


def _text(line: bytes, number: int) -> str:
    """Return a line as text. Raises ValueError saying where it is not UTF-8."""
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")  # a byte-order mark is no text
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8 (byte 0x{line[error.start]:02x} at position {error.start + 1} of the line); text in another encoding "
            "has to be converted"
        ) from None


def _as_utf8(stream: io.BufferedReader, file: TextFile) -> BinaryIO:
    """Return a stream of UTF-8: what has another byte-order mark is decoded. Raises DataError for what is no text."""
    head = stream.peek(_HEAD_BYTES)[:_HEAD_BYTES]
    if head.startswith(trusted.LFS_POINTER):
        trusted.refuse_lfs_pointer(file.local().resolve())
    if encoding := next((name for mark, name in _MARKS.items() if head.startswith(mark)), None):
        return io.BufferedReader(_Recoded(stream, encoding, file.path))
    if 4 * head.count(b"\0") > len(head):
        raise DataError(
            f"{file.path}: {head.count(0)} of its first {len(head)} bytes are NUL, so it is UTF-16 or UTF-32 without a "
            "byte-order mark, or no text; convert it to UTF-8, or leave it out"
        )
    return stream


class _Recoded(io.RawIOBase):
    """A stream in another encoding as UTF-8."""

    def __init__(self, stream: BinaryIO, encoding: str, path: Path):
        self._stream, self._encoding, self._path = stream, encoding, path
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._bytes, self._read, self._ended = b"", 0, False

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer. Raises DataError with the place of what cannot be decoded."""
        while not self._bytes and not self._ended:
            block = self._stream.read(1 << 16)
            self._ended = not block
            try:
                self._bytes = self._decoder.decode(block, final=self._ended).encode()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{self._path}: begins as {self._encoding.upper()} and is not that after about byte "
                    f"{self._read + error.start} ({error.reason})"
                ) from None
            self._read += len(block)
        size = min(len(buffer), len(self._bytes))
        buffer[:size], self._bytes = self._bytes[:size], self._bytes[size:]
        return size


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


def _on_hub(name: str, revision: str | None, folder: str) -> tuple[list[TextFile], list[tuple[str, str]]]:
    """The text files of a data set on the Hub, those within a folder where one is named, and the other files there."""
    from picolm.data.hub import list_files

    commit, entries = list_files(name, revision)
    there = [
        path for path in sorted(entries) if Path(path).is_relative_to(folder) and not Path(path).name.startswith(".")
    ]
    wanted = [path for path in there if _is_text(Path(path))]
    if not wanted:
        raise DataError(f"{name}: has no text files{f' in {folder}' if folder else ''} ({len(entries)} files in all)")
    others = [(Path(path).suffix.lower() or "no ending", path) for path in there if not _is_text(Path(path))]
    return [
        TextFile(Path(path), path, _first_folder(Path(path).relative_to(folder)), Remote(name, commit, *entries[path]))
        for path in wanted
    ], others


def _first_folder(relative: Path) -> str | None:
    return visible(relative.parts[0]) if len(relative.parts) > 1 else None


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
