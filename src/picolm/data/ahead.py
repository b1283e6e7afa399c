"""One value computed ahead of its time by a background thread: the next step's rows, the next shard's file.

It changes when something is computed, never what: `take` returns what `compute` would return, and raises what it would raise.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Ahead(Generic[Key, Value]):
    """At most one value ahead, and so at most one thread, which does not keep the process alive."""

    def __init__(self, compute: Callable[[Key], Value]):
        self._compute = compute
        self._key: Key | None = None
        self._value: Future[Value] | None = None
        self._lock = threading.Lock()

    def start(self, key: Key) -> None:
        """Begin to compute the value of `key`, unless another one is still being computed or this one is there."""
        with self._lock:
            if self._value is not None and (self._key == key or not self._value.done()):
                return
            self._key, self._value = key, Future()
            threading.Thread(target=self._run, args=(key, self._value), daemon=True, name=f"ahead {key}").start()

    def take(self, key: Key) -> Value:
        """The value of `key`: waited for when it was started, else computed here and now."""
        with self._lock:
            started, value = self._key == key, self._value
            if started:
                self._key, self._value = None, None
        return value.result() if started and value is not None else self._compute(key)

    def _run(self, key: Key, value: Future[Value]) -> None:
        try:
            value.set_result(self._compute(key))
        except BaseException as error:  # it is raised where the value is taken
            value.set_exception(error)
