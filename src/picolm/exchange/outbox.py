"""The upload queue of a run, in its folder `.hub`:

outbox.json     the branch that the run is uploaded to
step_N/         hard links to the files of a queued step, so that `checkpointing.keep` may delete the step meanwhile

Which steps were uploaded is asked of the Hub, so losing this folder only costs a check of each step of the run.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from picolm.errors import FileError, StoreError
from picolm.store.checkpoint import SealedCheckpoint
from picolm.store.files import RunLock, disk_errors, write_atomically
from picolm.store.forms import Queue
from picolm.store.manifest import MANIFEST, inside, step_directory, step_of
from picolm.store.run import Run
from picolm.trusted import read_json, refuse_links, remove_folder, require_regular

log = logging.getLogger("picolm")

FOLDER = ".hub"
_FILE = "outbox.json"


class Damaged(StoreError):
    """The error for a step that can never be uploaded, because its files are not those that were written."""


class Outbox:
    """The upload queue of a run. Raises StoreError when its folder is a link, or its file is not a regular file."""

    def __init__(self, run: Run):
        self.run, self.path = run, inside(run.path, FOLDER)
        file = inside(run.path, f"{FOLDER}/{_FILE}")
        if os.path.lexists(file):
            require_regular(file)
        try:
            self.place: str = read_json(file, Queue).place
        except FileError:
            self.place = ""

    @property
    def held(self) -> list[int]:
        """Return the steps in the queue that have hard links, ascending."""
        found = (step_of(path.name) for path in self.path.glob("step_*"))
        return sorted(step for step in found if step is not None)

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Hold the lock of the queue while uploading. Raises StoreError when another process holds it."""
        with ExitStack() as stack:
            with disk_errors("what waits for the Hub", self.path):
                self.path.mkdir(exist_ok=True)
            try:
                stack.enter_context(RunLock(inside(self.run.path, f"{FOLDER}/lock")).held())
            except FileError:
                raise
            except StoreError as error:
                raise StoreError(
                    f"{self.run.path}: another process is sending its steps to the Hub; wait for it to end"
                ) from error
            yield

    def remember(self, place: str) -> None:
        """Record where the run is uploaded to, for the next `pico push`."""
        if place != self.place:
            with disk_errors("where the run is sent to", self.path):
                self.path.mkdir(exist_ok=True)
                write_atomically(self.path / _FILE, json.dumps({"place": place, "steps": []}).encode() + b"\n")
            self.place = place

    def hold(self, step: int) -> None:
        """Hard-link the files of a step into the queue.

        When disk space is short, all links are deleted instead: the run needs the space more.
        """
        checkpoint = SealedCheckpoint(self.run.step_path(step))
        self.path.mkdir(exist_ok=True)
        if shutil.disk_usage(self.path).free < 2 * sum(record.bytes for record in checkpoint.files.values()):
            for other in self.held:
                self.release(other)
            log.warning("Little space is left: steps wait for the Hub only until checkpointing.keep deletes them.")
            return
        target, temporary = self.path / step_directory(step), self.path / f".{step_directory(step)}"
        remove_folder(temporary)
        try:
            for name in (*checkpoint.files, MANIFEST):
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                os.link(checkpoint.locate(name), temporary / name)
            remove_folder(target)
            os.rename(temporary, target)
        except OSError as error:  # no hard links on this file system; a copy would take space that the run may need
            remove_folder(temporary)
            log.debug("Step %d waits for the Hub without a second name: %s", step, error)

    def release(self, step: int) -> None:
        """Delete the hard links of a step."""
        remove_folder(self.path / step_directory(step))

    def checkpoint(self, step: int) -> SealedCheckpoint | None:
        """Return a step, from its hard links or else from the run; None when it was deleted. Raises Damaged."""
        for path in (self.path / step_directory(step), self.run.step_path(step)):
            if os.path.lexists(path / MANIFEST):
                try:
                    refuse_links(path, self.run.path)
                    return SealedCheckpoint(path)
                except StoreError as error:
                    raise Damaged(f"step {step} is not sent: {error}") from error
        return None
