"""Plain sentences on the screen and in a file: every part logs to "picolm", the commands say where it goes."""

import logging
import sys
from pathlib import Path

log = logging.getLogger("picolm")


class _Screen(logging.Handler):
    """Writes to whatever sys.stderr is at the time: a progress bar puts itself in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def configure_logging(level: str, file: Path | None = None) -> None:
    """Plain lines on stderr and, where `file` is given, the same with the time in that file."""
    log.setLevel(level)
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    screen = _Screen()
    screen.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(screen)
    if file is not None:
        written = logging.FileHandler(file, encoding="utf-8")
        written.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(written)
    log.propagate = False
