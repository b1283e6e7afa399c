"""Files with digests: written once, hashed while writing, flushed to disk; JSON that every reader accepts; and locks."""

import errno
import hashlib
import json
import logging
import math
import os
import shutil
import socket
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from picolm.errors import FileError, StoreError
from picolm.store.forms import Holder
from picolm.trusted import check_form, open_regular, open_to_append, parse_json, read_json

logger = logging.getLogger(__name__)
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
LOCK = ".lock"
GONE = "is gone; was it deleted or moved while in use?"
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True)
class FileRecord:
    """Size and sha-256 of a file, as in a manifest."""

    bytes: int
    sha256: str


class DigestingFile:
    """A new file that is hashed (sha-256) while it is written. Closing it flushes it to disk, unless writing failed."""

    def __init__(self, path: Path):
        self._file: BinaryIO = open(path, "xb")  # noqa: SIM115 (closed by __exit__)
        self._digest = hashlib.sha256()
        self._bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self._file.write(data)
        self._bytes += len(data)

    def __enter__(self) -> "DigestingFile":
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if failed is None:
                self._file.flush()
                os.fsync(self._file.fileno())

    @property
    def record(self) -> FileRecord:
        return FileRecord(self._bytes, self._digest.hexdigest())


def write_bytes(path: Path, data: bytes) -> FileRecord:
    with DigestingFile(path) as file:
        file.write(data)
    return file.record


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the content of a small file atomically: a reader sees either the old or the new content."""
    with replacement(path) as temporary:
        write_bytes(temporary, data)


@contextmanager
def replacement(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; at the end it replaces `path`. Nothing of it remains when writing fails."""
    temporary = path.with_name(f".{path.name[:100]}.partial-{uuid.uuid4().hex[:8]}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Flush the names in a directory to disk, which a file's own fsync does not do. Does nothing on Windows."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file; on a file system without hard links, copy it and flush the copy to disk."""
    try:
        os.link(source, target)
    except OSError:
        with open_regular(source) as file, DigestingFile(target) as copy:
            while block := file.read(1 << 20):
                copy.write(block)


def digest_file(path: Path) -> FileRecord:
    """Return the size and the sha-256 of a regular file. Raises like `trusted.open_regular`, and OSError."""
    with open_regular(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(file.tell(), digest)


def dump_json(value: object, indent: int | None = None) -> str:
    """Return a value as JSON for any reader.

    NaN and infinities, which JSON does not have, are written as "NaN", "Infinity", "-Infinity". Numbers keep every
    digit; numpy and torch values become numbers and lists; keys become text. Raises StoreError for a text equal to one
    of those three.
    """
    separators = (",", ":") if indent is None else None
    return json.dumps(_plain(value), ensure_ascii=False, indent=indent, separators=separators, allow_nan=False)


def load_json(text: str | bytes, name: str, form: Any = dict[str, Any]) -> Any:
    """Return the value that was given to `dump_json`, checked against `form`.

    Raises FileError that lists each key that does not fit. name: the file, for messages.
    """
    value = _restored(parse_json(text, name))
    check_form(value, form, name)
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if hasattr(value, "tolist"):  # numpy, torch
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, str) and value in _NOT_FINITE:
        raise StoreError(f"the text {value!r} cannot be stored: it would be read back as a number")
    return value


def _restored(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _restored(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_restored(entry) for entry in value]
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


@contextmanager
def disk_errors(what: str, path: Path, needed_bytes: int = 0) -> Iterator[None]:
    """Turn an OSError raised while writing `what` under `path` into a StoreError that says what to do."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"{what} cannot be written to {path}: {_reason(error, path, needed_bytes)}") from error


def _reason(error: OSError, path: Path, needed_bytes: int) -> str:
    if error.errno in _FULL:
        return f"no space left; it needs {size(needed_bytes)}, {_free(path)}. What was stored before is intact"
    if error.errno in _FORBIDDEN:
        return f"no permission ({error.filename or path}); check its owner and mode, or choose another directory"
    if error.errno == errno.ENOENT:
        return f"{error.filename or path} {GONE}"
    return f"{error.strerror or error} ({error.filename or path})"


def _free(path: Path) -> str:
    try:
        return f"{size(shutil.disk_usage(path).free)} are free there"
    except OSError:
        return "the free space is unknown"


def size(count: int) -> str:
    """Return a number of bytes as text: `12.3 MB` (powers of 1000)."""
    if count < 1000:
        return f"{count} B"
    power = min(int(math.log10(count) / 3), 4)
    return f"{count / 1000**power:.1f} {['B', 'kB', 'MB', 'GB', 'TB'][power]}"


_UNSUPPORTED = "the file system of %s has no locks (%s); nothing stops a second process from writing this %s"


class RunLock:
    """The lock of the directory of a run, or of an analysis. The object that holds it may acquire it again.

    what, key: what is written, and the key of the configuration that names its directory; for messages.
    """

    def __init__(self, path: Path, what: str = "run", key: str = "run_name"):
        self.path, self.what, self.key = path, what, key
        self._is_unsupported = False
        self._guard = threading.Lock()  # the training thread and the writer thread share one RunLock
        # The file stays when the lock is released: removing it could take away the lock of the next holder.
        self._lock = FileLock(
            path, blocking=False, thread_local=False, preserve_lock_file=True, on_acquired=self._write_holder
        )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock. Raises StoreError, naming the holder, when another process or another Run object holds it."""
        with self._guard:
            self._acquire()
        try:
            yield
        finally:
            with self._guard:
                if self._lock.lock_counter == 1:
                    with suppress(OSError):
                        os.truncate(self.path, 0)  # a process that lives on, such as a notebook, holds it no more
                self._lock.release()

    @property
    def is_alive(self) -> bool:
        """Whether a process of this machine holds the lock: it wrote its name, has not removed it, and is alive."""
        try:
            holder = read_json(self.path, Holder, within=self.path.parent)
            if holder.host != socket.gethostname() or sys.platform == "win32":  # there, signal 0 is Ctrl-C
                return False
            os.kill(holder.pid, 0)
            return True
        except PermissionError:
            return True  # somebody else's process
        except (FileError, OSError):
            return False

    def _acquire(self) -> None:
        if not self._lock.is_locked:
            with disk_errors("the lock", self.path.parent):
                os.close(open_to_append(self.path))  # refuses a link, and does not create the parent folder again
        try:
            self._lock.acquire()
        except Timeout:
            message = f"{self.path.parent}: another process is writing this {self.what} ({_describe(self.path)})"
            raise StoreError(f"{message}; wait for it to end, or choose another {self.key}") from None
        except OSError as error:
            if not self._is_unsupported:
                logger.warning(_UNSUPPORTED, self.path.parent, error.strerror, self.what)
            self._is_unsupported = True

    def _write_holder(self, descriptor: int) -> None:
        """Write the holder of the lock into its file, for the error message of others."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": now}
        try:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps(holder).encode())
        except OSError as error:  # a full disk: the lock holds without a name
            logger.warning("%s: the holder's name cannot be written (%s)", self.path, error.strerror)


def _describe(path: Path) -> str:
    try:
        holder = read_json(path, Holder)
    except FileError:  # also on Windows, where a locked file cannot be read
        return "its holder has not yet written its name"
    return f"process {holder.pid} on {holder.host} since {holder.since}"
