"""Follow runs while they are trained: new lines of the log, new steps, their end, as events that the page receives.

One task looks at all runs, and only while somebody listens: a few calls of `stat` each second, so that the training beside it is
not slowed.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from typing import Any

from picolm.errors import FileError, StoreError
from picolm.store.manifest import METRICS
from picolm.trusted import open_regular, parse_json
from picolm.view.about import steps_of, tokens_of
from picolm.view.refusal import Refused
from picolm.view.session import to_json
from picolm.view.viewed import Viewed

POLL_S = 1.0
HEARTBEAT_S = 10.0
MOST_LISTENERS = 32
_READ_BYTES = 4 * 2**20  # of a log, at one time
_WAITING = 1000  # events that a page may be behind
Event = dict[str, Any]


class Watch:
    """What was last seen of a run."""

    def __init__(self, viewed: Viewed):
        self.viewed, self._file = viewed, viewed.run.path / METRICS
        self._log, self._offset = self._stat(self._file), 0
        self._offset = self._log[1] if self._log else 0
        self._folder = self._changed()
        self._steps = {each["step"]: each for each in steps_of(viewed, tokens_of(viewed.run))}
        self._live, self._gone = viewed.run.is_live, False

    def look(self) -> Iterator[Event]:
        """Yield what changed since the last time."""
        about = {"run": self.viewed.number}
        if self.viewed.is_gone != self._gone:
            self._gone = self.viewed.is_gone
            yield {"type": "gone" if self._gone else "back", **about}
        if self._gone:
            return
        if lines := self._lines():
            yield {"type": "metrics", **about, "lines": lines}
        if (folder := self._changed()) != self._folder:
            self._folder = folder
            before = self._steps
            self._steps = {each["step"]: each for each in steps_of(self.viewed, tokens_of(self.viewed.run))}
            new = [
                each for step, each in self._steps.items() if each["digest"] != before.get(step, {}).get("digest", "")
            ]
            removed = [step for step in before if step not in self._steps]
            if new or removed:
                yield {"type": "steps", **about, "steps": new, "removed": removed}
        if (live := self.viewed.run.is_live) != self._live:
            self._live = live
            yield {"type": "live", **about, "live": live}

    def _lines(self) -> list[Any]:
        """Return the complete lines that were added to the log; all of a log that was replaced, as when a run is continued."""
        now = self._stat(self._file)
        if now is None or now == self._log:
            return []
        if self._log is None or now[0] != self._log[0] or now[1] < self._offset:
            self._offset = 0
        self._log = now
        with open_regular(self._file, within=self.viewed.run.path) as file:
            file.seek(self._offset)
            whole = file.read(_READ_BYTES).rpartition(b"\n")
        self._offset += len(whole[0]) + len(whole[1])
        if self._offset < now[1]:
            self._log = (now[0], -1)  # there is more to read
        found = list[Any]()
        for line in whole[0].splitlines():
            with suppress(FileError):  # a damaged line is told by the panel of the training
                found.append(parse_json(line, str(self._file), dict[str, Any]))
        return found

    def _changed(self) -> object:
        """Return what changes when a step is added or removed, or made again."""
        made = self.viewed.replayed
        folders = [self.viewed.run.checkpoints_path, *([made.checkpoints_path] if made is not None else [])]
        found = list[object]()
        for folder in folders:
            with suppress(OSError):
                found.append(os.stat(folder).st_mtime_ns)
        return found

    @staticmethod
    def _stat(file: Any) -> tuple[int, int] | None:
        try:
            state = os.lstat(file)
            return state.st_ino, state.st_size
        except OSError:
            return None


class Feed:
    """The events of all runs, to all pages that listen."""

    def __init__(self, runs: Sequence[Viewed]):
        self._runs, self._listeners = runs, set[asyncio.Queue[Event | None]]()
        self._task: asyncio.Task[None] | None = None

    def publish(self, event: Event) -> None:
        """Send an event to all that listen; one that is too far behind is hung up, and reads anew."""
        for queue in list(self._listeners):
            try:
                queue.put_nowait(event)
            except asyncio.QueueFull:
                self._listeners.discard(queue)

    def close(self) -> None:
        """End all streams of events."""
        for queue in self._listeners:
            with suppress(asyncio.QueueFull):
                queue.put_nowait(None)
        self._listeners.clear()

    def listen(self) -> AsyncIterator[bytes]:
        """Return a stream of events. Raises Refused where too many listen."""
        if len(self._listeners) >= MOST_LISTENERS:
            raise Refused("too many pages follow this address; close some", 503)
        queue = asyncio.Queue[Event | None](_WAITING)
        self._listeners.add(queue)
        if self._task is None or self._task.done():
            self._task = asyncio.ensure_future(self._watch())
        return self._events(queue)

    async def _events(self, queue: "asyncio.Queue[Event | None]") -> AsyncIterator[bytes]:
        try:
            yield b": here\n\n"
            while queue in self._listeners or not queue.empty():
                try:
                    event = await asyncio.wait_for(queue.get(), HEARTBEAT_S)
                except TimeoutError:
                    yield b": still here\n\n"
                    continue
                if event is None:
                    return
                yield b"data: " + to_json(event) + b"\n\n"
        finally:
            self._listeners.discard(queue)

    async def _watch(self) -> None:
        """Look at all runs again and again, until nobody listens any more."""
        watches = await asyncio.to_thread(lambda: [Watch(viewed) for viewed in self._runs])
        while self._listeners:
            for watch in watches:
                try:
                    for event in await asyncio.to_thread(lambda watch=watch: list(watch.look())):  # type: ignore[misc]
                        self.publish(event)
                except (StoreError, OSError):
                    continue  # it is being replaced or deleted: the next look tells
            await asyncio.sleep(POLL_S)
