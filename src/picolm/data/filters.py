"""Which documents are kept: functions of one document, found by name.

A filter is a function `(document, **options) -> bool`; its keyword-only arguments are its options, given as
`length,min_characters=200`. A filter of one's own is named `my_lab.quality:is_prose`.

The text of each filter is part of what the rows follow from; of one's own code, the digest of its file too.
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
    """Texts of so many characters."""
    return min_characters <= len(document.text) and (max_characters is None or len(document.text) <= max_characters)


@FILTERS.add("letters")
def letters(document: Document, *, min_share: float = 0.5) -> bool:
    """Texts of which at least this share of the characters that are no white space are letters, of any script."""
    visible = [character for character in document.text if not character.isspace()]
    return sum(map(str.isalpha, visible)) >= min_share * len(visible)


@FILTERS.add("sources")
def sources(document: Document, *, only: Labels | None = None, but: Labels = ()) -> bool:
    """Documents of these sources, `sources,only=[books,web]`, or of all but some, `sources,but=[forum]`."""
    wanted, refused = ([label_of(label) for label in given or ()] for given in (only, but))
    return (only is None or document.source in wanted) and document.source not in refused


def load_filter(text: str) -> Keep:
    """Return the function that a text such as `length,min_characters=200` names. Raises PicoError where it cannot be used."""
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
    """Raise DataError for an option whose value is not of the type that the function declares."""
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
    """Return what stands for a filter in a recipe: its text, and for code from elsewhere the digest of its file."""
    name, _ = _parse(text)
    load_filter(text)
    if name in FILTERS:
        return text
    file = inspect.getsourcefile(sys.modules[name.partition(":")[0]])
    content = b"" if file is None else Path(file).read_bytes()
    return f"{text} (sha256 {hashlib.sha256(content).hexdigest()[:16]})"


def _parse(text: str) -> tuple[str, dict[str, Any]]:
    """Return name and options; a comma within brackets does not separate."""
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
