"""Answers on disk: a model's answer to a question never changes, so each is computed once, also over several starts.

The name of a file is the digest of all that its content depends on. The folder is bounded: what was not used for longest is
deleted.
"""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from picolm.errors import FileError
from picolm.network import cache_folder
from picolm.observe.observed import bound
from picolm.trusted import read_bytes

VERSION = 1  # of the answers; another one makes all that is kept invalid
MOST_BYTES = 2**30  # of the folder
LARGEST = 16 * 2**20  # bytes of an answer that is kept
_BETWEEN = 64 * 2**20  # bytes that are written before the folder is measured again


class Answers:
    """A folder of answers by key."""

    def __init__(self, folder: Path | None = None, most_bytes: int = MOST_BYTES):
        self.folder, self._most_bytes, self._unmeasured = folder or cache_folder() / "view", most_bytes, _BETWEEN

    def get(self, key: str) -> bytes | None:
        """Return an answer, None where it is not kept, or damaged."""
        file = self._file(key)
        with suppress(FileError, OSError):
            content = read_bytes(file, most_bytes=LARGEST + 32)
            if hashlib.sha256(content[32:]).digest() == content[:32]:
                os.utime(file)  # used now
                return content[32:]
        return None

    def put(self, key: str, answer: bytes) -> None:
        """Keep an answer. A full or read-only disk is no error: it is computed again then."""
        if len(answer) > LARGEST:
            return
        file = self._file(key)
        temporary = file.with_suffix(f".{os.getpid()}")
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(hashlib.sha256(answer).digest() + answer)
            os.replace(temporary, file)
            self._unmeasured += len(answer)
            if self._unmeasured >= min(_BETWEEN, self._most_bytes // 8):
                bound(self.folder, self._most_bytes, but=file, ending=".answer")
                self._unmeasured = 0

    def _file(self, key: str) -> Path:
        digest = hashlib.sha256(f"{VERSION}\n{key}".encode()).hexdigest()
        return self.folder / f"{digest}.answer"
