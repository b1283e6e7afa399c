"""YAML -> typed, frozen configuration: strict, and every problem at once with its file and line.

A configuration is a tree of pydantic models (or dataclasses) whose fields carry docstrings. `load` composes the YAML with
its line numbers, applies `key=value` overrides, validates, asks the configuration for the rules between its fields
(`problems()`), and raises one `ConfigError` that lists everything it found.
"""

import copy
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from picolm.errors import PicoError
from picolm.registry import did_you_mean

KeyPath = tuple[str | int, ...]
Rule = tuple[tuple[str, ...], str]  # the keys involved, and what is wrong with them together


class Section(BaseModel):
    """One section of a configuration: immutable, no unknown keys, docstrings are the help text."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, validate_default=False
    )

    def problems(self) -> Iterator[Rule]:
        """Rules between fields that do not hold: (dotted keys relative to this section, message)."""
        yield from ()


Config = TypeVar("Config", bound=Section)


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
        self.problems = list(problems)
        super().__init__("\n".join(map(str, self.problems)))


def load(
    file: str | Path,
    schema: type[Config] | Callable[[Mapping[str, Any]], type[Config]],
    overrides: Iterable[str] = (),
) -> Config:
    """The configuration in `file` with `key=value` overrides applied. Raises ConfigError with every problem.

    schema: the configuration class, or a function from the raw mapping to it, where a key decides which parts there are.
    """
    document = Document.read(Path(file))
    for override in overrides:
        document.override(override)
    return document.validate(schema if isinstance(schema, type) else schema(document.data))


def plain(config: BaseModel) -> dict[str, Any]:
    """The configuration as nested dictionaries of plain JSON values."""
    return config.model_dump(mode="json")


def dump(config: BaseModel | Mapping[str, Any]) -> str:
    """The configuration as YAML text that `load` reads back to an equal one."""
    mapping = plain(config) if isinstance(config, BaseModel) else dict(config)
    return yaml.safe_dump(mapping, sort_keys=False, allow_unicode=True, width=120)


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one of dotted keys: `{"a": {"b": 1}}` becomes `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        nested = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2 numbers: `3e-4` is a number, a date stays text."""


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
        if not equals or not key:
            self.found.append(Problem("command line", assignment, "should have the form dotted.key=value"))
            return
        path = tuple(key.split("."))
        node = self.data
        for part in path[:-1]:
            if not isinstance(node.get(part), dict):
                node[part] = {}
            node = node[part]
        self.places = {known: place for known, place in self.places.items() if known[: len(path)] != path}
        self.places[path] = "command line"
        node[path[-1]] = self._parse(text, "command line", path)

    def validate(self, schema: type[Config]) -> Config:
        """The typed configuration. Raises ConfigError with the problems of reading, of fields and between fields."""
        config, wrong = self._fields(schema, self.data)
        repaired = copy.deepcopy(self.data)
        for path in sorted(wrong, key=len, reverse=True):
            _remove(repaired, path)
        if config is None:  # the rules are checked on what is left, so that all problems are told at once
            config, _ = self._fields(schema, repaired, report=False)
        self._rules(config, {".".join(map(str, path)) for path in wrong})
        if self.found or config is None:
            raise ConfigError(self.found)
        return config

    def _fields(
        self, schema: type[Config], data: Mapping[str, Any], report: bool = True
    ) -> tuple[Config | None, list[KeyPath]]:
        try:  # through JSON: strict about types, yet a YAML list is welcome where a tuple is meant
            return schema.model_validate_json(json.dumps(data), strict=True), []
        except ValidationError as failure:
            grouped: dict[KeyPath, list[Any]] = {}
            for error in failure.errors(include_url=False):
                grouped.setdefault(_existing(data, error["loc"]), []).append(error)
        if report:
            order = {path: i for i, path in enumerate(self.places)}
            by_line = sorted(grouped, key=lambda path: order.get(path, order.get(path[:-1], -1)))
            self.found += [self._problem(schema, path, grouped[path]) for path in by_line]
        return None, list(grouped)

    def _problem(self, schema: type[BaseModel], path: KeyPath, errors: list[Any]) -> Problem:
        if errors[0]["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            return self._at(path, "unknown key" + _suggestion(schema, path))
        wanted = dict.fromkeys(_lower(error["msg"]) for error in errors)
        value = _shorten(json.dumps(_get(self.data, path), default=str, ensure_ascii=False))
        text = _describe(schema, path)
        return self._at(path, f"{value}: {', or '.join(wanted)}" + (f". {text}" if text else ""))

    def _rules(self, config: Section | None, wrong: set[str]) -> None:
        for keys, message in config.problems() if config is not None else ():
            if not any(key == bad or key.startswith(bad + ".") for key in keys for bad in wrong):
                path = tuple(int(part) if part.isdigit() else part for part in keys[0].split("."))
                self.found.append(self._at(path, message))

    def _at(self, path: KeyPath, message: str) -> Problem:
        known = next(
            (self.places[path[:end]] for end in range(len(path), 0, -1) if path[:end] in self.places), self.name
        )
        return Problem(known, ".".join(map(str, path)), message)

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
        if isinstance(node, yaml.ScalarNode):
            value = loader.construct_object(node)
            if value is not None and not isinstance(value, str | int | float | bool):
                self.found.append(self._at(path, f"a {type(value).__name__} is not a value that can be used here"))
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
                self.found.append(Problem(line, ".".join(map(str, path)), f"the key {key!r} should be text"))
                continue
            if key in mapping:
                first = self.places.get((*path, key), place)
                self.found.append(Problem(line, ".".join(map(str, (*path, key))), f"given twice (first at {first})"))
            self.places[(*path, key)] = line
            mapping[key] = self._value(loader, value_node, place, (*path, key), above)
        return mapping


def _similar_file(path: Path) -> str:
    return did_you_mean(path.name, (f.name for f in path.parent.glob("*.y*ml"))) if path.parent.is_dir() else ""


def _get(data: Any, path: KeyPath) -> Any:
    for part in path:
        if isinstance(data, dict):
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        else:
            return None
    return data


def _existing(data: Any, location: KeyPath) -> KeyPath:
    """The part of a pydantic location that leads through the data: it also names union members, which users do not."""
    path: KeyPath = ()
    for part in location:
        inside = part in data if isinstance(data, dict) else isinstance(data, list) and part in range(len(data))
        if not inside:
            break
        data, path = data[part], (*path, part)
    return path


def _remove(data: Any, path: KeyPath) -> None:
    parent = _get(data, path[:-1])
    if path and isinstance(parent, dict):
        parent.pop(path[-1], None)
    elif path and len(path) > 1:  # an item of a list: the whole list goes
        _remove(data, path[:-1])


@cache
def _json_schema(schema: type[BaseModel]) -> dict[str, Any]:
    return schema.model_json_schema()


def _fields_at(schema: type[BaseModel], path: KeyPath) -> dict[str, Any]:
    """The JSON-schema properties of the section at `path`."""
    whole = _json_schema(schema)
    node: dict[str, Any] = whole
    for part in (None, *path):
        node = node if part is None else node.get("properties", {}).get(part, {})
        while "$ref" in node:
            node = whole["$defs"][node["$ref"].rsplit("/", 1)[1]]
    return node


def _all_keys(schema: type[BaseModel], path: KeyPath = ()) -> Iterator[str]:
    for name in _fields_at(schema, path).get("properties", {}):
        yield ".".join(map(str, (*path, name)))
        yield from _all_keys(schema, (*path, name))


def _suggestion(schema: type[BaseModel], path: KeyPath) -> str:
    siblings = _fields_at(schema, path[:-1]).get("properties", {})
    near = did_you_mean(str(path[-1]), siblings)
    elsewhere = [key for key in _all_keys(schema) if key.rsplit(".", 1)[-1] == path[-1]]
    if not near and elsewhere:
        return f"; did you mean {elsewhere[0]!r}?"
    return near or (f" (there are: {', '.join(siblings)})" if siblings else "")


def _describe(schema: type[BaseModel], path: KeyPath) -> str:
    return re.split(r"(?<=\.)\s", _fields_at(schema, path).get("description", ""), maxsplit=1)[0]


def _lower(message: str) -> str:
    return message.replace("Input should", "should").replace("Value error, ", "")


def _shorten(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[:limit] + "…"
