"""Document filters: functions that decide whether to keep a document, found by name.

A filter is a function `(document, **options) -> bool`. Its keyword-only arguments are its options, as in
`length,min_characters=200`. A filter in your own code is named `my_lab.quality:is_prose`.

The text of each filter is part of the recipe of the rows; for your own code, so is the digest of its file.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

from picolm.data.documents import Document, label_of
from picolm.document import parse_yaml
from picolm.errors import DataError
from picolm.registry import Registry

Labels = Sequence[str | int | float | bool]
Keep = Callable[[Document], bool]

FILTERS: Registry[Callable[..., bool]] = Registry("filter")


@FILTERS.add("length")
def length(document: Document, *, min_characters: int = 0, max_characters: int | None = None) -> bool:
    """Keep texts of `min_characters` to `max_characters` characters."""
    return min_characters <= len(document.text) and (max_characters is None or len(document.text) <= max_characters)


@FILTERS.add("letters")
def letters(document: Document, *, min_share: float = 0.5) -> bool:
    """Keep texts in which at least `min_share` of the characters, without white space, are letters of any script."""
    visible = [character for character in document.text if not character.isspace()]
    return sum(map(str.isalpha, visible)) >= min_share * len(visible)


@FILTERS.add("sources")
def sources(document: Document, *, only: Labels | None = None, but: Labels = ()) -> bool:
    """Keep documents of some sources, `sources,only=[books,web]`, or of all except some, `sources,but=[forum]`."""
    wanted, refused = ([label_of(label) for label in given or ()] for given in (only, but))
    return (only is None or document.source in wanted) and document.source not in refused


def load_filter(text: str) -> Keep:
    """Return the function for a filter text such as `length,min_characters=200`. Raises PicoError if it is invalid."""
    name, options = _parse(text)
    part: Any = FILTERS.get(name)
    if inspect.isclass(part):
        raise DataError(
            f"filter {text!r}: is a class; a filter is a function of a document (datatrove's filters are steps of its own "
            "pipeline, whose .ds files are read as they are: docs/how-to/datatrove.md)"
        )
    known = [
        word
        for word, parameter in inspect.signature(part).parameters.items()
        if parameter.kind == parameter.KEYWORD_ONLY
    ]
    for word in options:
        if word not in known:
            raise DataError(f"filter {text!r}: has no option {word!r} (it has: {', '.join(known) or 'none'})")
    _check_types(part, options, text)
    return partial(part, **options)


def _check_types(part: Callable[..., bool], options: dict[str, Any], text: str) -> None:
    """Raise DataError if the value of an option does not have the type that the function declares."""
    from pydantic import TypeAdapter, ValidationError

    hints = get_type_hints(part)
    for word in hints.keys() & options.keys():
        try:
            TypeAdapter(hints[word]).validate_python(options[word], strict=True)
        except ValidationError as failure:
            first = failure.errors()[0]
            reason = first["msg"].replace("Input should", "should")
            if first["type"] == "sequence_str":
                reason = f"takes a list: {word}=[{options[word]}]"
            raise DataError(f"filter {text!r}: {word}={options[word]}: {reason}") from None


def identity(text: str) -> str:
    """Return the identity of a filter in a recipe: its text, plus the digest of its file for the user's own code."""
    name, _ = _parse(text)
    load_filter(text)
    if name in FILTERS:
        return text
    file = inspect.getsourcefile(sys.modules[name.partition(":")[0]])
    content = b"" if file is None else Path(file).read_bytes()
    return f"{text} (sha256 {hashlib.sha256(content).hexdigest()[:16]})"


def _parse(text: str) -> tuple[str, dict[str, Any]]:
    """Split a filter text into name and options, at commas outside brackets."""
    words = list[str]()
    for part in text.split(","):
        if words and words[-1].count("[") > words[-1].count("]"):
            words[-1] += "," + part
        else:
            words.append(part)
    options = dict[str, Any]()
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if not equals:
            raise DataError(f"filter {text!r}: {word!r} is not of the form OPTION=VALUE")
        options[key.strip()] = parse_yaml(value, f"filter {text!r}, option {key.strip()}")
    return words[0].strip(), options
