"""Terminal output: its width and abilities, safe text, sparklines and durations; and the log, to the screen and to a file.

A terminal is not required: if output goes to a file or a pipe, TERM is dumb or the encoding is not UTF-8, the same
facts are printed as plain ASCII lines. NO_COLOR and COLUMNS have their usual meaning.
"""

import logging
import math
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from io import TextIOWrapper
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from picolm.errors import FileError, PicoError
from picolm.trusted import open_to_append, refuse_links

if TYPE_CHECKING:
    from rich.console import Console


log = logging.getLogger("picolm")

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII = "_.-~=+*#"
LEAST_WIDTH = 132  # characters; enough for the widest tables
# Characters that control a terminal: C0 (except tab and newline), DEL and C1; line and paragraph separators; marks that
# change the writing direction, byte-order marks and annotations; and lone surrogates, which no encoding can write.
_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


def visible(text: object) -> str:
    r"""Return text that is safe to print: control characters are replaced by escapes (`\x1b`, `\u202e`).

    Somebody else may have written the names, sources, and texts of runs and corpora. Tabs and newlines stay.
    """
    return _OBEYED.sub(lambda found: _escape(ord(found[0])), str(text))


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x20 else f"\\u{code:04x}"


def say(*texts: object, error: bool = False) -> None:
    """Print a line with `visible` text to standard output, or to standard error. Pico prints every line with this."""
    print(*map(visible, texts), file=sys.stderr if error else sys.stdout)


def screen(*, error: bool = False, least_width: int = LEAST_WIDTH, **options: Any) -> "Console":
    """Return a rich Console for tables and progress bars, on standard output or standard error.

    Text is made `visible`, and markup is off. least_width: minimum line width in a file or a pipe. options: of Console.
    """
    console = _screen_type()(stderr=error, markup=False, emoji=False, **options)
    if not console.is_terminal:
        console.width = max(console.width, least_width)
    return console


@cache
def _screen_type() -> Any:
    from rich.console import Console

    class Screen(Console):
        """A rich console that makes the text of cells, headings and lines `visible`."""

        def render_str(self, text: str, **options: Any) -> Any:
            return super().render_str(visible(text), **options)

    return Screen


def can_redraw(console: "Console") -> bool:
    """Return whether progress bars work: the console is a terminal that can overwrite a line."""
    return console.is_terminal and not console.is_dumb_terminal


def shows_blocks(stream: Any = None) -> bool:
    """Return whether `stream` (default: standard output) has a UTF encoding, and so can show block characters."""
    encoding = getattr(sys.stdout if stream is None else stream, "encoding", None) or "ascii"
    return encoding.lower().replace("-", "").startswith("utf")


def tolerate() -> None:
    """Let standard output and error write escapes for characters that their encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def sparkline(values: Sequence[float], width: int = 16, blocks: bool | None = None) -> str:
    """Return a series as at most `width` characters of eight heights, from its minimum to its maximum.

    A longer series is cut into `width` parts, each shown by its mean. Values that are not finite are ignored, and a
    part with only such values is a space. blocks: use block characters instead of ASCII (default: if standard output
    can show them).
    """
    parts = min(width, len(values))
    ends = [len(values) * i // parts for i in range(parts + 1)] if parts else []
    means = [_mean(values[first:last]) for first, last in pairwise(ends)]
    finite = [mean for mean in means if mean is not None]
    if not finite:
        return ""
    peak = max(map(abs, finite)) or 1.0  # scaled by this, differences cannot overflow
    low, high = min(finite) / peak, max(finite) / peak
    levels = BLOCKS if (shows_blocks() if blocks is None else blocks) else ASCII
    scale = 7 / (high - low) if high > low else 0.0
    return "".join(" " if mean is None else levels[round((mean / peak - low) * scale)] for mean in means)


def _mean(values: Sequence[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return sum(value / len(finite) for value in finite) if finite else None


def duration(seconds: float) -> str:
    """Format a duration: `48 s`, `12 min`, `3.5 h`, `2.1 days`."""
    for limit, unit, size in ((90, "s", 1), (5400, "min", 60)):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"


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
