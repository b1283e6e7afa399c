"""Families of interchangeable parts: one decorator to add a part, one name to find it.

A part of this package is found by its short name; a part that lives in the user's own code is named
``my_lab.module:attribute`` and imported when it is asked for.
"""

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

from picolm.errors import PicoError

Part = TypeVar("Part")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'n_layers'?"`, or nothing when no known word is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


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
        if ":" in name:
            return self._import(name)
        known = ", ".join(self._parts)
        raise PicoError(f"unknown {self.family} {name!r}{did_you_mean(name, self._parts)} (there are: {known})")

    def _import(self, name: str) -> Any:
        module_name, _, attribute = name.partition(":")
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # a user's own file beside the YAML is importable, as with `python -m`
        try:
            return getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError) as error:
            raise PicoError(f"{self.family} {name!r} cannot be imported: {error}") from error

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)
