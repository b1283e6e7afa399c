"""Escape text for Markdown: markup in the names of runs, sources and models stays plain text."""

import re

_SPECIAL = re.compile(r"([\\`*_\[\]()#|~@:])")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]+")


def plain(text: object) -> str:
    """Return text on one line, escaped for a paragraph, a heading or a table cell."""
    escaped = _SPECIAL.sub(r"\\\1", _one_line(text))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def code(text: object) -> str:
    """Return text on one line as inline code, even if it contains backticks."""
    line = _one_line(text)
    fence = "`" * (_longest(line) + 1)
    pad = " " if line.startswith(("`", " ")) or line.endswith(("`", " ")) or not line else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def block(text: str, language: str = "") -> str:
    """Return lines of text as a code block; the fence is longer than any sequence of backticks in the text."""
    fence = "`" * max(3, _longest(text) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"


def _one_line(text: object) -> str:
    return _CONTROL.sub(" ", str(text))


def _longest(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
