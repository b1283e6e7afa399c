"""Read YAML 1.2: nested mappings of plain values, with the file and line of each key and a list of all problems.

Plain words are resolved by the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema): `010` is ten,
`0o10` is eight, and `1:30`, `1_000`, `yes`, `off` and `2024-01-02` are text. In addition, `<<` merges a mapping.

This uses PyYAML with its own resolver, not ruamel.yaml: that reads `1_000` as a number and `2024-01-02` as a date,
stops at the first duplicate key, and writes `yes` without quotes, which readers of YAML 1.1 (such as those of Hub
cards) take for true.
"""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from picolm import trusted
from picolm.errors import FileError, FileMissing, PicoError
from picolm.registry import did_you_mean

KeyPath = tuple[str | int, ...]

_LONG_WORD = re.compile(r"(\S{80})\S{80,}")


class Problem(NamedTuple):
    """A problem in a configuration: its place (file and line, or command line), the dotted key, and a message."""

    place: str
    path: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in self if part)


class ConfigError(PicoError):
    """The error that lists all problems of a configuration."""

    exit_code = 2

    def __init__(self, problems: Iterable[Problem]):
        self.problems = [
            problem._replace(path=_LONG_WORD.sub(r"\1…", problem.path), message=_LONG_WORD.sub(r"\1…", problem.message))
            for problem in problems
        ]
        super().__init__("\n".join(map(str, self.problems)))


COMMAND_LINE = "command line"
_MOST = 100_000  # most values of a document
_DEEPEST = 50  # most levels of a document; the parsers that follow have their own limits and messages
_TAG = "tag:yaml.org,2002:"
_CORE = {  # tag: the words that resolve to it, the letters with which they begin
    "null": (re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    "bool": (re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    "int": (re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"), list("-+0123456789")),
    "float": (
        re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
        list("-+.0123456789"),
    ),
}
_ELSEWHERE = {"yes": "true", "y": "true", "on": "true", "no": "false", "n": "false", "off": "false"}  # in YAML 1.1
_VARIABLE = re.compile(r"\$(?:(\$)|([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the core schema of YAML 1.2 instead of the types of YAML 1.1."""

    def core_value(self, node: yaml.ScalarNode) -> Any:
        """Return the value of a scalar node with a tag of the core schema. Raises ConstructorError if it is invalid."""
        kind = node.tag.removeprefix(_TAG)
        if not _CORE[kind][0].fullmatch(node.value):
            raise yaml.constructor.ConstructorError(None, None, f"{node.value!r} is no {kind}", node.start_mark)
        if kind == "null":
            return None
        if kind == "bool":
            return node.value.lower() == "true"
        if kind == "int":
            return int(node.value, {"0o": 8, "0x": 16}.get(node.value[:2], 10))
        return float(re.sub(r"\.(inf|nan)", r"\1", node.value.lower()))


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which also quotes text that YAML 1.2 would read as a number."""


_Loader.yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}
for _name, (_pattern, _first) in _CORE.items():
    _anchored = re.compile(rf"(?:{_pattern.pattern})\Z")
    _Loader.add_implicit_resolver(_TAG + _name, _anchored, _first)
    _Loader.add_constructor(_TAG + _name, _Loader.core_value)
    if _name in ("int", "float"):
        _Dumper.add_implicit_resolver(_TAG + _name, _anchored, _first)


def write_yaml(values: Mapping[str, Any], **options: Any) -> str:
    """Return a mapping of plain values as YAML text that has the same meaning in YAML 1.1 and 1.2."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, **options)


def parse_yaml(text: str, name: str) -> Any:
    """Return the plain values in YAML text. Raises ConfigError with every problem; `name` is the text in messages.

    The number of values and levels is limited, so that a few lines of aliases cannot fill the memory.
    """
    document = Document(name)
    values = document.parse(text, name, ())
    if document.found:
        raise ConfigError(document.found)
    return values


def likely_meant(value: Any, wanted: str) -> str:
    """Return advice on how to write a value as the type of the pydantic error `wanted` (such as `bool_type`), or "".

    It covers text that YAML 1.1 reads as that type, and integers written with a point or an exponent (`1e5`).
    """
    if isinstance(value, float) and wanted.startswith("int") and value.is_integer() and abs(value) < 2**53:
        return f"; write {int(value)}"
    if not isinstance(value, str):
        return ""
    if wanted.startswith("bool") and value.lower() in _ELSEWHERE:
        return f"; write {_ELSEWHERE[value.lower()]}"
    if wanted.startswith(("int", "float")) and re.fullmatch(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?", value):
        return f"; write {value.replace('_', '')}, without {'_' if '_' in value else 'quotes'}"
    return ""


def expand_path(text: str) -> str:
    """Return a path with `~`, `$NAME` and `${NAME}` expanded; `$$` gives one `$`. Raises ValueError for unset names."""

    def value_of(match: re.Match[str]) -> str:
        name = match[2] or match[3]
        if match[1]:
            return "$"
        if not os.environ.get(name):
            raise ValueError(f"the environment variable {name} is not set; set it, or write $$ for a dollar sign")
        return os.environ[name]

    expanded = _VARIABLE.sub(value_of, text)
    if expanded.startswith("~"):
        home = os.path.expanduser(expanded)
        if home.startswith("~") and expanded[1:2] in ("", "/"):
            raise ValueError("the home folder is not known; set HOME, or give the whole path")
        return expanded if home.startswith("~") else home
    return expanded


class Document:
    """A YAML document with the line of each key.

    within: the run that it belongs to, which others may have written; None if the user wrote it: then environment
    variables in it may be expanded, and code that it names may be imported.
    """

    def __init__(self, name: str, within: Path | None = None):
        self.name, self.within, self.own = name, within, within is None
        self.data: dict[str, Any] = {}
        self.places: dict[KeyPath, str] = {}
        self.found: list[Problem] = []
        self._values = 0

    @classmethod
    def read(cls, path: Path, within: Path | None = None) -> "Document":
        """Read a document from a file. Raises ConfigError if it cannot be read or is not a mapping.

        within: the run that the file belongs to, which others may have written (see `trusted`); None: the user's own
        file.
        """
        document = cls(str(path), within)
        data = document.parse(_text_of(path, within), str(path), ())
        if data is not None and not isinstance(data, dict):
            raise ConfigError([Problem(f"{path}:1", "", "should be a mapping of sections (`model:`, `training:`, …)")])
        document.data = data or {}
        return document

    def override(self, assignment: str, place: str = COMMAND_LINE) -> None:
        """Apply one `dotted.key=value` assignment from `place`; the value is parsed as YAML."""
        key, equals, text = assignment.partition("=")
        if not equals or not all(key.split(".")):
            self.found.append(Problem(place, assignment or "''", "should have the form dotted.key=value"))
            return
        path = tuple(key.split("."))
        self.assign(path, self.parse(text, place, path), place)

    def assign(self, path: tuple[str, ...], value: Any, place: str) -> None:
        """Set the value at `path`. place: where the value comes from, for messages."""
        node = self.data
        for depth, part in enumerate(path[:-1], start=1):
            if not isinstance(node.get(part), dict):
                node[part] = {}
                self.places[path[:depth]] = place
            node = node[part]
        self.places = {known: place for known, place in self.places.items() if known[: len(path)] != path}
        self.places[path] = place
        node[path[-1]] = value

    def problem_at(self, path: KeyPath, message: str) -> Problem:
        """Return a problem with the value, or the missing value, at `path`."""
        return Problem(self.place_of(path), _dotted(path), message)

    def is_typed(self, path: KeyPath) -> bool:
        """Return whether the user wrote the value at `path`: in their own file, or on the command line."""
        return self.own or self.place_of(path) == COMMAND_LINE

    def place_of(self, path: KeyPath) -> str:
        """Return the file and line of the key at `path`, or of the nearest key above it."""
        return next(
            (self.places[path[:end]] for end in range(len(path), 0, -1) if path[:end] in self.places), self.name
        )

    def parse(self, text: str, place: str, path: KeyPath) -> Any:
        """Parse YAML text for the value at `path` and return it.

        Adds problems with single values to `found`. Raises ConfigError if the text is not valid YAML.
        """
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
        if self._values > _MOST:  # a few lines with nested aliases can expand to any number of values
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
        if node.tag not in (f"{_TAG}seq", f"{_TAG}map"):
            raise yaml.constructor.ConstructorError(
                None, None, f"{node.tag} is no plain list or mapping", node.start_mark
            )
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


def _text_of(path: Path, within: Path | None) -> str:
    try:
        if within is not None:
            return trusted.read_text(path, within)
        return path.read_text(encoding="utf-8-sig")
    except (FileMissing, FileNotFoundError):
        raise ConfigError([Problem(str(path), "", f"there is no such file{_similar_file(path)}")]) from None
    except FileError as error:
        raise ConfigError([Problem(str(path), "", str(error).removeprefix(f"{path}: "))]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([Problem(str(path), "", f"cannot be read: {error}")]) from None


def _dotted(path: KeyPath) -> str:
    """Return a path as written on the command line, `a.0.b`; an empty key is shown as quotes."""
    return ".".join(str(part) or "''" for part in path)


def _similar_file(path: Path) -> str:
    return did_you_mean(path.name, (f.name for f in path.parent.glob("*.y*ml"))) if path.parent.is_dir() else ""
