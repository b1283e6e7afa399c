"""One writer per run: an advisory lock (filelock) that is released when its holder ends, even if it crashes."""

import json
import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from picolm.errors import FileError, StoreError
from picolm.store.files import disk_errors
from picolm.store.forms import Holder
from picolm.trusted import open_to_append, read_json

logger = logging.getLogger(__name__)
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
                self._lock.release()

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
