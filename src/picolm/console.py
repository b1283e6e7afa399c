"""What a screen can show: how wide it is, whether a line can be drawn again, a series of numbers or a time in few characters.

Nobody needs a terminal: where output goes to a file or a pipe, where TERM is dumb or the encoding is not UTF-8, the same facts
come as plain lines in ASCII. NO_COLOR and COLUMNS mean what they mean elsewhere.
"""

import math
import re
import sys
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII = "_.-~=+*#"
LEAST_WIDTH = 132  # characters for which the widest tables have room
# What a terminal obeys instead of showing: C0 (but tab and newline), DEL and C1; line and paragraph separators; marks that turn
# the direction of writing, byte-order marks and annotations; and lone surrogates, which no encoding can write.
_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


def visible(text: object) -> str:
    r"""Return text that a terminal shows as it is: each character that it would obey becomes an escape (`\x1b`, `\u202e`).

    Names, sources, and texts of runs and corpora may have been chosen by somebody else. Tabs and newlines stay.
    """
    return _OBEYED.sub(lambda found: _escape(ord(found[0])), str(text))


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x20 else f"\\u{code:04x}"


def say(*texts: object, error: bool = False) -> None:
    """Print a line to standard output, or standard error, with `visible` text. Nothing else in Pico prints lines."""
    print(*map(visible, texts), file=sys.stderr if error else sys.stdout)


def screen(*, error: bool = False, least_width: int = LEAST_WIDTH, **options: Any) -> "Console":
    """Standard output, or standard error, for tables and progress bars; text in them is made `visible` and has no markup.

    least_width: that of lines in a file or a pipe, where no window cuts them. options: of rich's Console.
    """
    console = _screen_type()(stderr=error, markup=False, emoji=False, **options)
    if not console.is_terminal:
        console.width = max(console.width, least_width)
    return console


@cache
def _screen_type() -> Any:
    from rich.console import Console

    class Screen(Console):
        """A console of rich for which cells of tables, headings and lines are what they say."""

        def render_str(self, text: str, **options: Any) -> Any:
            return super().render_str(visible(text), **options)

    return Screen


def can_redraw(console: "Console") -> bool:
    """Whether a progress bar has a place to be: a terminal that can go back to the beginning of a line."""
    return console.is_terminal and not console.is_dumb_terminal


def shows_blocks(stream: Any = None) -> bool:
    """Whether the encoding of `stream` (default: standard output) has characters beyond ASCII."""
    encoding = getattr(sys.stdout if stream is None else stream, "encoding", None) or "ascii"
    return encoding.lower().replace("-", "").startswith("utf")


def tolerate() -> None:
    """Characters that the encoding of the output lacks are written as an escape rather than ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def sparkline(values: Sequence[float], width: int = 16, blocks: bool | None = None) -> str:
    """A series in at most `width` characters of eight heights, from its least value to its greatest.

    A longer series is cut into `width` parts, each shown by its mean. Values that are not finite are left out, and a part
    without any other is a space. blocks: block characters rather than ASCII (default: as standard output can).
    """
    parts = min(width, len(values))
    ends = [len(values) * i // parts for i in range(parts + 1)] if parts else []
    means = [_mean(values[first:last]) for first, last in pairwise(ends)]
    finite = [mean for mean in means if mean is not None]
    if not finite:
        return ""
    peak = max(map(abs, finite)) or 1.0  # so that no difference overflows
    low, high = min(finite) / peak, max(finite) / peak
    levels = BLOCKS if (shows_blocks() if blocks is None else blocks) else ASCII
    scale = 7 / (high - low) if high > low else 0.0
    return "".join(" " if mean is None else levels[round((mean / peak - low) * scale)] for mean in means)


def _mean(values: Sequence[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return sum(value / len(finite) for value in finite) if finite else None


def duration(seconds: float) -> str:
    """`48 s`, `12 min`, `3.5 h`, `2.1 days`."""
    for limit, unit, size in ((90, "s", 1), (5400, "min", 60)):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"
