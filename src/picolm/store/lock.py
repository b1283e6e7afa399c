"""One writer per run: an advisory lock that ends with its holder, however the holder ends."""

import fcntl
import json
import logging
import os
import socket
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from picolm.errors import FileError, StoreError
from picolm.store.files import disk_errors
from picolm.store.forms import Holder
from picolm.trusted import open_to_append, parse_json

logger = logging.getLogger(__name__)
_UNSUPPORTED = "the file system of %s has no locks (%s); nothing stops a second process from writing this %s"


class RunLock:
    """The lock of the directory of a run, or of an analysis. Entered again by the object that holds it, it only counts.

    what, key: what is being written, and the key of the configuration that names its directory; for messages.
    """

    def __init__(self, path: Path, what: str = "run", key: str = "run_name"):
        self.path, self.what, self.key = path, what, key
        self._depth = 0
        self._descriptor: int | None = None
        self._guard = threading.Lock()  # the training thread and the writer thread share one RunLock
        _locks.add(self)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Raises StoreError, naming the holder, when another process (or another Run object) writes this run."""
        with self._guard:
            if self._depth == 0:
                self._acquire()
            self._depth += 1
        try:
            yield
        finally:
            with self._guard:
                self._depth -= 1
                if self._depth == 0:
                    self._release()

    def _acquire(self) -> None:
        with disk_errors("the lock", self.path.parent):
            descriptor = open_to_append(self.path, flags=os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _describe(os.pread(descriptor, 1000, 0))
            os.close(descriptor)
            message = f"{self.path.parent}: another process is writing this {self.what} ({holder})"
            raise StoreError(f"{message}; wait for it to end, or choose another {self.key}") from None
        except OSError as error:
            logger.warning(_UNSUPPORTED, self.path.parent, error.strerror, self.what)
        self._descriptor = descriptor
        self._sign(descriptor)

    def _sign(self, descriptor: int) -> None:
        """Leave the name of the holder for those who are refused."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": now}
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        except OSError as error:  # a full disk: the lock holds without its name
            logger.warning("%s: the holder's name cannot be written (%s)", self.path, error.strerror)

    def _release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)  # the file stays: removing it could take away the lock of the next holder
            self._descriptor = None

    def forget(self) -> None:
        """In a forked child, which must not keep the lock of a parent that died."""
        self._release()
        self._depth = 0
        self._guard = threading.Lock()


def _forget_all() -> None:
    for lock in _locks:
        lock.forget()


_locks: "weakref.WeakSet[RunLock]" = weakref.WeakSet()
os.register_at_fork(after_in_child=_forget_all)


def _describe(content: bytes) -> str:
    try:
        holder = parse_json(content, "the lock", Holder)
    except FileError:
        return "its holder has not yet written its name"
    return f"process {holder.pid} on {holder.host} since {holder.since}"
