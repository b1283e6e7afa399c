"""Read files that somebody else may have written: runs, rows, responses of the Hub, tokenizers, caches.

Only regular files are read, never through a link, and never more bytes than a limit. JSON and YAML have a limit of
nesting and are parsed once into a typed form. Each problem is a FileError that names the file, the key, and the
expected value.

A path that the user typed may be a link, or contain links. Files below it may not: pass that path as `within`. Paths in
the cache of huggingface_hub are links by design; `picolm.network` resolves them and checks their targets.
"""

import errno
import os
import shutil
import stat
from collections import Counter
from collections.abc import Iterator
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import Any

from picolm.errors import FileError, FileMissing

TEXT_BYTES = 64 << 20  # most bytes of a file that is read at once: the largest tokenizer.json in use has about 30 MB
LINE_BYTES = 16 << 20  # most bytes of one line of a file that is read line by line
_LINK = "is a link; links inside of a run, corpus or cache are not followed: put the file itself there"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_OPEN = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
_BINARY = getattr(os, "O_BINARY", 0)


def refuse_links(path: Path, within: Path) -> None:
    """Raise FileError if `path` is outside `within`, or if it or a folder between the two is a link.

    `within` itself may be a link. Parts that do not exist are accepted, so a path can be checked before it is written.
    """
    if not path.is_relative_to(within) or ".." in path.relative_to(within).parts:
        raise FileError(f"{path}: lies outside of {within}")
    below = within
    for part in path.relative_to(within).parts:
        below = below / part
        if below.is_symlink():
            raise FileError(f"{below}: {_LINK}")


def require_regular(path: Path, within: Path | None = None) -> os.stat_result:
    """Check a file before a library opens it by its path. Returns its `os.stat_result`.

    Raises FileMissing if it does not exist; FileError if it is a link, a folder, a pipe or a device.
    """
    if within is not None:
        refuse_links(path, within)
    try:
        status = os.lstat(path)
    except (OSError, ValueError) as error:
        raise _cannot_open(path, error) from None
    if stat.S_ISLNK(status.st_mode):
        raise FileError(f"{path}: {_LINK}")
    if not stat.S_ISREG(status.st_mode):
        raise FileError(f"{path}: is not a regular file")
    return status


def open_regular(path: Path, within: Path | None = None) -> BufferedReader:
    """Open a file for reading in binary mode. Raises like `require_regular`; never blocks on a pipe."""
    if within is not None:
        refuse_links(path, within)
    if path.is_symlink():  # systems without O_NOFOLLOW
        raise FileError(f"{path}: {_LINK}")
    try:
        descriptor = os.open(path, _OPEN | _BINARY)
    except (OSError, ValueError) as error:
        raise _cannot_open(path, error) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileError(f"{path}: is not a regular file")
    return os.fdopen(descriptor, "rb")


def open_to_append(path: Path, within: Path | None = None, flags: int = os.O_WRONLY | os.O_APPEND) -> int:
    """Open a file for writing, creating it if it does not exist. Returns its descriptor.

    flags: mode flags for `os.open`. Raises FileError if it is a link, a folder, a pipe or a device, and OSError if the
    system does not allow writing.
    """
    if within is not None:
        refuse_links(path, within)
    if os.path.lexists(path):
        require_regular(path)
    descriptor = os.open(path, flags | os.O_CREAT | _OPEN | _BINARY, 0o644)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileError(f"{path}: is not a regular file")
    return descriptor


def make_folder(path: Path) -> None:
    """Create a folder, and those above it, unless they are there. Raises FileError, for example where a file has its name."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{path}: the folder cannot be made ({error.strerror})") from error


def remove_folder(path: Path) -> None:
    """Delete a folder and all that is in it, as far as possible; anything else of that name stays (rmtree would open a pipe)."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)


def read_bytes(path: Path, within: Path | None = None, most_bytes: int = TEXT_BYTES) -> bytes:
    """Return the content of a file. Raises like `open_regular`, and FileError if it has more than `most_bytes`."""
    with open_regular(path, within) as file:
        try:
            data = file.read(most_bytes + 1)
        except OSError as error:
            raise _cannot_open(path, error) from None
        except MemoryError:
            raise FileError(f"{path}: its {path.stat().st_size:,} bytes do not fit into the memory") from None
    if len(data) > most_bytes:
        raise FileError(f"{path}: holds more than {most_bytes:,} bytes, the most that is read of such a file")
    return data


def read_text(path: Path, within: Path | None = None, most_bytes: int = TEXT_BYTES) -> str:
    """Return the content of a UTF-8 file, without a byte-order mark. Raises like `read_bytes`."""
    return decode(read_bytes(path, within, most_bytes), str(path))


def read_lines(path: Path, within: Path | None = None, most_bytes: int = LINE_BYTES) -> Iterator[bytes]:
    """Yield the complete lines of a file without their newline. Raises like `read_bytes`; most_bytes: of one line.

    Text after the last newline is left out: it is a line that is still being written.
    """
    with open_regular(path, within) as file:
        for number in range(1, 1 << 62):
            line = file.readline(most_bytes + 1)
            if len(line) > most_bytes:
                raise FileError(f"{path}:{number}: the line holds more than {most_bytes:,} bytes")
            if not line.endswith(b"\n"):
                return
            yield line[:-1]


def refuse_lfs_pointer(path: Path) -> None:
    """Raise FileError if a file is a Git LFS pointer: the short text in place of a file that was not downloaded."""
    with open_regular(path) as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise FileError(
                f"{path}: is a pointer of Git LFS, not the file itself; run `git lfs pull` in its folder, or fetch it again"
            )


def decode(data: bytes, name: str) -> str:
    """Return UTF-8 `data` as text, without a byte-order mark. Raises FileError with the offset of invalid bytes."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(f"{name}: is not UTF-8 text (byte {error.start})") from None


def read_json(path: Path, form: Any = Any, within: Path | None = None) -> Any:
    """Return the JSON value of a file as `form`. Raises like `read_bytes` and `parse_json`."""
    return parse_json(read_bytes(path, within), str(path), form)


def parse_json(data: bytes | str, name: str, form: Any = Any) -> Any:
    """Return JSON `data` as `form`: a pydantic model, a dataclass, or a type such as `dict[str, Any]`.

    name: the file, for messages. The parser limits the nesting to 200 levels. Text is never converted to a number.
    Raises FileError with every key whose value does not fit `form`.
    """
    from pydantic import ValidationError

    text = decode(data, name) if isinstance(data, bytes) else data
    try:
        return _adapter(form).validate_json(text, strict=True)
    except ValidationError as failure:
        raise FileError("\n".join(_problems(failure, name))) from None


def check_columns(names: list[str], name: str) -> None:
    """Raise FileError when two columns of a table have the same name: reading by name would mean either. name: the file."""
    if repeated := [column for column, count in Counter(names).items() if count > 1]:  # there may be many thousands
        raise FileError(f"{name}: has more than one column {min(repeated)!r}; write it again with one of each name")


def check_form(value: Any, form: Any, name: str) -> None:
    """Raise FileError with every key of a parsed value that does not fit `form`."""
    from pydantic import ValidationError

    try:
        _adapter(form).validate_python(value, strict=True)
    except ValidationError as failure:
        raise FileError("\n".join(_problems(failure, name))) from None


@cache
def _adapter(form: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(form)


def _problems(failure: Any, name: str, most: int = 10) -> Iterator[str]:
    errors = failure.errors(include_url=False, include_context=False, include_input=False)
    for error in errors[:most]:
        key = ".".join(str(part)[:80] for part in error["loc"])
        yield f"{name}: {key}{': ' if key else ''}{_plainly(error['msg'])}"
    if len(errors) > most:
        yield f"{name}: … {len(errors)} problems in all"


def _plainly(message: str) -> str:
    return message.replace("Input should", "should").removeprefix("Value error, ")


def _cannot_open(path: Path, error: OSError | ValueError) -> FileError:
    if isinstance(error, FileNotFoundError | NotADirectoryError | ValueError):  # a ValueError: a NUL in the name
        return FileMissing(f"{path}: there is no such file")
    if error.errno == errno.ELOOP:
        return FileError(f"{path}: {_LINK}")
    return FileError(f"{path}: cannot be read ({error.strerror or error})")
