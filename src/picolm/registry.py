"""Registries of interchangeable parts: a decorator registers a part under a name, and `get` finds it by name.

A part of this package is found by its short name. A part in the user's own code is named `my_lab.module:attribute` and
imported when `get` is called. Importing runs code, so it depends on provenance: a name that the user typed, in a
command or in their own YAML file, is imported. A name that was read from a run, a model, rows or a response of the Hub
is `Untrusted`, and is imported only with --trust-remote-code.
"""

import difflib
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, NamedTuple, TypeVar

from picolm.errors import PicoError

Part = TypeVar("Part")

_CODE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'max_steps'?"` with the closest known word, or "" if no known word is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


class Untrusted(str):
    """Text that may name code, from a file that others may have written. where: the file; key: its dotted key."""

    where: str
    key: str

    def __new__(cls, text: str, where: str, key: str) -> "Untrusted":
        made = super().__new__(cls, text)
        made.where, made.key = where, key
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return Untrusted, (str(self), self.where, self.key)


class UntrustedCode(PicoError):
    """The error for code that the user neither named nor allowed with --trust-remote-code."""


class CodePolicy(NamedTuple):
    """The rules for importing code; a process passes them to the processes that it starts.

    trusted: --trust-remote-code. folders: folders, besides the working folder, in which the user's own modules are
    found. named: what the user's own configuration names, which a run that was made with it may name, too.
    """

    trusted: bool = False
    folders: tuple[str, ...] = ()
    named: tuple[str, ...] = ()


_policy = CodePolicy()


def code_policy() -> CodePolicy:
    """Return the policy of this process."""
    return _policy


def set_code_policy(policy: CodePolicy) -> None:
    """Replace the policy of this process."""
    global _policy
    _policy = policy


def trust_remote_code(trust: bool) -> None:
    """Set whether `Untrusted` names may be imported from now on."""
    set_code_policy(_policy._replace(trusted=trust))


def find_code_in(folder: Path) -> None:
    """Add `folder`, which contains the YAML file that the user gave, to the folders in which modules are found."""
    set_code_policy(_policy._replace(folders=tuple(dict.fromkeys([*_policy.folders, str(folder.absolute())]))))


def trust_names(names: Iterable[str]) -> None:
    """Allow these names to be imported from now on, wherever they stand: the user's own configuration states them."""
    set_code_policy(_policy._replace(named=tuple(dict.fromkeys([*_policy.named, *map(str, names)]))))


def names_code(text: str) -> bool:
    """Return whether the text has the form `module:attribute`."""
    return _CODE.fullmatch(text) is not None


def require_trust(name: str) -> None:
    """Raise UntrustedCode if `name`, which will be imported or run, is `Untrusted` and remote code is not trusted."""
    if isinstance(name, Untrusted) and not _policy.trusted and name not in _policy.named:
        raise UntrustedCode(
            f"{name.where} names code of its own, {name.key}: {name}; to import is to run it, which is done only with "
            "--trust-remote-code"
        )


class Registry(Generic[Part]):
    """The parts of one family (models, sources, optimizers, …) by name, in the order in which they were added."""

    def __init__(self, family: str, more: str = ""):
        """more: a package that registers further parts; it is imported when a name is not known yet."""
        self.family, self._more = family, more
        self._parts: dict[str, Part] = {}

    def add(self, name: str) -> Callable[[Part], Part]:
        """Return a decorator that registers a class or function under `name`. Raises ValueError if it is in use."""
        if name in self._parts:
            raise ValueError(f"{self.family} {name!r} is registered twice")

        def register(part: Part) -> Part:
            self._parts[name] = part
            return part

        return register

    def get(self, name: str) -> Part:
        """Return the part called `name`, or the object at `module:attribute`.

        Raises PicoError, listing the known names, if there is no such part, and UntrustedCode if the code must not be
        imported.
        """
        if name not in self._parts and not names_code(name) and self._more:
            importlib.import_module(self._more)
        if name in self._parts:
            return self._parts[name]
        if names_code(name):
            require_trust(name)
            return self._import(name)
        known = ", ".join(self._parts)
        raise PicoError(f"unknown {self.family} {name!r}{did_you_mean(name, self._parts)} (there are: {known})")

    def _import(self, name: str) -> Any:
        module_name, _, attribute = name.partition(":")
        try:
            part = getattr(_USER_MODULES.load(module_name), attribute)
        except Exception as error:  # the import may raise anything
            kind = "" if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: "
            raise PicoError(f"{self.family} {name!r} cannot be imported: {kind}{error}") from error
        if not callable(part):
            raise PicoError(f"{self.family} {name!r} is a {type(part).__name__}; a class or a function was expected")
        return part

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)


class _UserModules(MetaPathFinder):
    """An import finder for the user's own modules in the working folder and the folders of the policy.

    Python calls it last, after its own paths, so no file there replaces an installed module. It finds only the module
    that `Registry.get` imports, and modules imported by modules that it found: nothing else is imported from there.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        self.found: set[str] = set()

    def load(self, module: str) -> ModuleType:
        """Import and return a module by its dotted name."""
        if self not in sys.meta_path:
            sys.meta_path.append(self)
        before, self.asked = self.asked, module.partition(".")[0]
        try:
            return importlib.import_module(module)
        finally:
            self.asked = before

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a top-level module, or None; modules inside packages are found by Python itself."""
        if path is not None or (fullname != self.asked and _importer() not in self.found):
            return None
        spec = PathFinder.find_spec(fullname, [os.getcwd(), *_policy.folders])
        if spec is not None:
            self.found.add(fullname)
        return spec


_USER_MODULES = _UserModules()


def _importer() -> str:
    """Return the top-level name of the module whose import statement is running."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (
        "importlib",
        "_frozen_importlib",
    ):
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
