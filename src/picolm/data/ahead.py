"""Compute one value in advance in a background thread: the next step's rows, the next shard's file.

This changes only when a value is computed: `take` returns what `compute` would return, and raises what it would raise.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Ahead(Generic[Key, Value]):
    """At most one value computed in advance, by at most one daemon thread."""

    def __init__(self, compute: Callable[[Key], Value]):
        self._compute = compute
        self._key: Key | None = None
        self._value: Future[Value] | None = None
        self._lock = threading.Lock()

    def start(self, key: Key) -> None:
        """Start to compute the value of `key`, unless another computation is running or this value is ready."""
        with self._lock:
            if self._value is not None and (self._key == key or not self._value.done()):
                return
            self._key, self._value = key, Future()
            threading.Thread(target=self._run, args=(key, self._value), daemon=True, name=f"ahead {key}").start()

    def take(self, key: Key) -> Value:
        """Return the value of `key`: wait for it if it was started, otherwise compute it now."""
        with self._lock:
            started, value = self._key == key, self._value
            if started:
                self._key, self._value = None, None
        return value.result() if started and value is not None else self._compute(key)

    def _run(self, key: Key, value: Future[Value]) -> None:
        try:
            value.set_result(self._compute(key))
        except BaseException as error:  # `take` raises it
            value.set_exception(error)
