"""Families of interchangeable parts: one decorator to add a part, one name to find it.

A part of this package is found by its short name; a part that lives in the user's own code is named
``my_lab.module:attribute`` and imported when it is asked for. Importing runs code, so a name that was read from a run, which
may be somebody else's, is held against `refuse_foreign_code` first.
"""

import difflib
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

from picolm.errors import PicoError

Part = TypeVar("Part")

_CODE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_trusted: ContextVar[bool] = ContextVar("trusted", default=False)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'n_layers'?"`, or nothing when no known word is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def trust_remote_code(trust: bool) -> None:
    """Whether names of code that stand in a stored run may be imported from now on."""
    _trusted.set(trust)


def refuse_foreign_code(names: Mapping[str, str], where: str) -> None:
    """Raises PicoError when one of the names, by the key it stands under, is that of code and there is no trust in it."""
    for key, name in names.items():
        if _CODE.fullmatch(name) and not _trusted.get():
            raise PicoError(
                f"{where} names code of its own, {key}: {name}; to import is to run it, which is done only with "
                "--trust-remote-code"
            )


class Registry(Generic[Part]):
    """The parts of one family (models, sources, optimizers, …) by name, in the order in which they were added."""

    def __init__(self, family: str):
        self.family = family
        self._parts: dict[str, Part] = {}

    def add(self, name: str) -> Callable[[Part], Part]:
        """Register the decorated class or function under `name`; a name is taken once."""
        if name in self._parts:
            raise ValueError(f"{self.family} {name!r} is registered twice")

        def register(part: Part) -> Part:
            self._parts[name] = part
            return part

        return register

    def get(self, name: str) -> Part:
        """The part called `name`, or the object at `module:attribute`. Raises PicoError with what there is."""
        if name in self._parts:
            return self._parts[name]
        if _CODE.fullmatch(name):
            return self._import(name)
        known = ", ".join(self._parts)
        raise PicoError(f"unknown {self.family} {name!r}{did_you_mean(name, self._parts)} (there are: {known})")

    def _import(self, name: str) -> Any:
        module_name, _, attribute = name.partition(":")
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # a user's own file beside the YAML is importable, as with `python -m`
        try:
            part = getattr(importlib.import_module(module_name), attribute)
        except Exception as error:  # whatever that module does while it is imported
            kind = "" if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: "
            raise PicoError(f"{self.family} {name!r} cannot be imported: {kind}{error}") from error
        if not callable(part):
            raise PicoError(f"{self.family} {name!r} is a {type(part).__name__}; a class or a function was expected")
        return part

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)
