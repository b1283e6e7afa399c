"""YAML with its places: nested mappings of plain values, the file and line of each key, and every problem found on the way."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from picolm.errors import PicoError
from picolm.registry import did_you_mean

KeyPath = tuple[str | int, ...]

_LONG_WORD = re.compile(r"(\S{80})\S{80,}")


class Problem(NamedTuple):
    """One thing that is wrong with a configuration, and where it stands."""

    place: str
    path: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in self if part)


class ConfigError(PicoError):
    """All problems of one configuration."""

    exit_code = 2

    def __init__(self, problems: Iterable[Problem]):
        self.problems = [
            problem._replace(path=_LONG_WORD.sub(r"\1…", problem.path), message=_LONG_WORD.sub(r"\1…", problem.message))
            for problem in problems
        ]
        super().__init__("\n".join(map(str, self.problems)))


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2 numbers: `3e-4` is a number, a date stays text."""


_MOST = 100_000  # values of a document
_DEEPEST = 50  # levels of a document; the parsers below have limits of their own, and messages of their own
_REPLACED = {"tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp"}
_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)|[0-9][0-9_]*\.[0-9_]*|\.[0-9]+|\.(?:inf|Inf|INF|nan|NaN|NAN))$|^[-+]\.(?:inf|Inf|INF)$"),
    list("-+0123456789."),
)  # fmt: skip


class Document:
    """A YAML document that remembers on which line each key stands."""

    def __init__(self, name: str):
        self.name = name
        self.data: dict[str, Any] = {}
        self.places: dict[KeyPath, str] = {}
        self.found: list[Problem] = []
        self._values = 0

    @classmethod
    def read(cls, path: Path) -> "Document":
        document = cls(str(path))
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ConfigError([Problem(str(path), "", f"there is no such file{_similar_file(path)}")]) from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError([Problem(str(path), "", f"cannot be read: {error}")]) from None
        data = document._parse(text, str(path), ())
        if data is not None and not isinstance(data, dict):
            raise ConfigError([Problem(f"{path}:1", "", "should be a mapping of sections (`model:`, `training:`, …)")])
        document.data = data or {}
        return document

    def override(self, assignment: str) -> None:
        """Apply one `dotted.key=value` of the command line; the value is read as YAML."""
        key, equals, text = assignment.partition("=")
        if not equals or not all(key.split(".")):
            self.found.append(Problem("command line", assignment or "''", "should have the form dotted.key=value"))
            return
        path = tuple(key.split("."))
        node = self.data
        for depth, part in enumerate(path[:-1], start=1):
            if not isinstance(node.get(part), dict):
                node[part] = {}
                self.places[path[:depth]] = "command line"
            node = node[part]
        self.places = {known: place for known, place in self.places.items() if known[: len(path)] != path}
        self.places[path] = "command line"
        node[path[-1]] = self._parse(text, "command line", path)

    def problem_at(self, path: KeyPath, message: str) -> Problem:
        """A problem with the value at `path`, or with what is missing there."""
        known = next(
            (self.places[path[:end]] for end in range(len(path), 0, -1) if path[:end] in self.places), self.name
        )
        return Problem(known, _dotted(path), message)

    def _parse(self, text: str, place: str, path: KeyPath) -> Any:
        try:
            loader = _Loader(text)
            node = loader.get_single_node()
            return self._value(loader, node, place, path, ()) if node is not None else None
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            mark = getattr(error, "problem_mark", None)
            where = f"{place}:{mark.line + 1}" if mark and place == self.name else place
            reason = getattr(error, "problem", None) or str(error).splitlines()[0]
            raise ConfigError([*self.found, Problem(where, "", f"is not valid YAML: {reason}")]) from None

    def _value(
        self, loader: yaml.SafeLoader, node: yaml.Node, place: str, path: KeyPath, above: tuple[yaml.Node, ...]
    ) -> Any:
        if node in above:
            raise yaml.YAMLError("an alias refers to a node that contains it")
        self._values += 1
        if self._values > _MOST:  # a few lines of aliases of aliases are any number of values
            raise yaml.YAMLError(f"more than {_MOST} values")
        if len(path) > _DEEPEST:
            self.found.append(self.problem_at(path[:4], f"holds more than {_DEEPEST} levels of values"))
            return None
        if isinstance(node, yaml.ScalarNode):
            value = loader.construct_object(node)
            if value is not None and not isinstance(value, str | int | float | bool):
                self.found.append(
                    self.problem_at(path, f"a {type(value).__name__} is not a value that can be used here")
                )
                return None
            return value
        above = (*above, node)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(loader, item, place, (*path, i), above) for i, item in enumerate(node.value)]
        assert isinstance(node, yaml.MappingNode)
        loader.flatten_mapping(node)
        return self._mapping(loader, node, place, path, above)

    def _mapping(
        self, loader: yaml.SafeLoader, node: yaml.MappingNode, place: str, path: KeyPath, above: tuple[yaml.Node, ...]
    ) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node, deep=True)
            line = f"{place}:{key_node.start_mark.line + 1}" if place == self.name else place
            if not isinstance(key, str):
                self.found.append(Problem(line, _dotted(path), f"the key {key!r} should be text"))
                continue
            if key in mapping:
                first = self.places.get((*path, key), place)
                self.found.append(Problem(line, _dotted((*path, key)), f"given twice (first at {first})"))
            self.places[(*path, key)] = line
            mapping[key] = self._value(loader, value_node, place, (*path, key), above)
        return mapping


def _dotted(path: KeyPath) -> str:
    """`a.0.b`, as it is written on the command line; a key without a letter is shown in quotes."""
    return ".".join(str(part) or "''" for part in path)


def _similar_file(path: Path) -> str:
    return did_you_mean(path.name, (f.name for f in path.parent.glob("*.y*ml"))) if path.parent.is_dir() else ""
