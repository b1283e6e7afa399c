"""Logging to the screen and to a file: all modules use the logger "picolm", and the commands configure its output."""

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
    """A formatter that makes messages and tracebacks `visible`: control characters in them become escapes."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


class _Screen(logging.Handler):
    """A handler that writes to the current sys.stderr, which a progress bar may have replaced."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record), error=True)


class _File(logging.FileHandler):
    """A handler that appends to a regular file. If the disk is full or missing, lines are lost only in the file."""

    def _open(self) -> TextIOWrapper:
        return os.fdopen(open_to_append(Path(self.baseFilename)), "a", encoding="utf-8")

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record. If another package that configures logging has closed the file, it is opened again."""
        with suppress(OSError, FileError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with suppress(OSError):
            super().close()


def configure_logging(level: str, file: Path | None = None, within: Path | None = None) -> None:
    """Log plain lines to stderr and, if `file` is given, the same lines with time and level to that file.

    within: the folder below which `file` and its parent folders may not be links. Raises PicoError if the file cannot
    be written.
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
