"""Plain sentences on the screen and in a file: every part logs to "picolm", the commands say where it goes."""

import logging
import os
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path

from picolm.console import say, visible
from picolm.errors import FileError, PicoError
from picolm.trusted import open_to_append, refuse_links

log = logging.getLogger("picolm")


class _Visible(logging.Formatter):
    """Names and texts in a message, and in the traceback of an error, are shown instead of obeyed."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


class _Screen(logging.Handler):
    """Writes to whatever sys.stderr is at the time: a progress bar puts itself in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record), error=True)


class _File(logging.FileHandler):
    """Appends to a regular file. A disk that is full, or gone, costs lines of the log and nothing else: the screen has them."""

    def _open(self) -> TextIOWrapper:
        return os.fdopen(open_to_append(Path(self.baseFilename)), "a", encoding="utf-8")

    def emit(self, record: logging.LogRecord) -> None:
        """Another package that configures logging closes every file of the process: ours is opened again, where it can be."""
        with suppress(OSError, FileError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with suppress(OSError):
            super().close()


def configure_logging(level: str, file: Path | None = None, within: Path | None = None) -> None:
    """Write plain lines to stderr and, where `file` is given, the same with the time to that file.

    within: the folder below which `file` and the folders on the way to it may not be links. Raises PicoError where the file
    cannot be written.
    """
    log.setLevel(level)
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    screen = _Screen()
    screen.setFormatter(_Visible("%(message)s"))
    log.addHandler(screen)
    if file is not None:
        try:
            refuse_links(file, within or file.parent)
            file.parent.mkdir(parents=True, exist_ok=True)
            written = _File(file, encoding="utf-8")
        except OSError as error:
            raise PicoError(f"{file}: the log cannot be written ({error.strerror})") from error
        written.setFormatter(_Visible("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(written)
    log.propagate = False
