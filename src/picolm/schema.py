"""Read a YAML file into a typed, frozen configuration: strict, with all problems reported at once by file and line.

A configuration is a tree of pydantic models (or dataclasses) whose fields have docstrings. `load` parses the YAML with
line numbers, applies `key=value` overrides, validates the fields, checks the rules between fields (`problems()`), and
raises one `ConfigError` that lists all problems.

What is declared of a key beside its type is a `Key`. Values that the user typed are trusted. A configuration from
a run, a model or a response of the Hub goes through `mark_untrusted`: its names stay readable, but `Registry.get` refuses to
import them. So a command needs trust only for the code that it uses.
"""

import copy
import dataclasses
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from picolm.document import ConfigError, Document, KeyPath, Problem, expand_path, likely_meant, write_yaml
from picolm.errors import PicoError
from picolm.registry import Untrusted, did_you_mean, find_code_in, names_code, require_trust

Rule = tuple[tuple[str, ...], str]  # the keys involved, and what is wrong with their combination


class Section(BaseModel):
    """A section of a configuration: immutable, without unknown keys, with field docstrings as help text."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, validate_default=False
    )

    def problems(self) -> Iterator[Rule]:
        """Yield the broken rules between fields: (dotted keys relative to this section, message)."""
        yield from ()


Config = TypeVar("Config", bound=Section)

Place = Annotated[str, Field(json_schema_extra={"place": True})]
"""The type of keys that name a file or folder. In the user's own files, `~` and environment variables are expanded."""


RECORDED = "the record of the run"
RESULTS = ("run.json", "results.parquet")  # somebody else may have written a folder that contains one of these


class NoSchema(PicoError):
    """The error of a function that selects the schema: the value at `path` names a part that does not exist."""

    def __init__(self, path: KeyPath, message: str):
        self.path = path
        super().__init__(message)


def load(
    file: str | Path,
    schema: type[Config] | Callable[[Mapping[str, Any]], type[Config]],
    overrides: Iterable[str] = (),
    within: Path | None = None,
    recorded: Iterable[str] = (),
) -> Config:
    """Return the configuration in `file` with `key=value` overrides applied. Raises ConfigError with all problems.

    schema: the configuration class, or a function from the raw mapping to it, if a key decides which parts exist.
    within: the run of `file`, which others may have written; None: the user's own file, unless it is in a run.
    recorded: assignments from the run's record, applied before the overrides and trusted no more than the file.
    """
    document = read_document(Path(file), within)
    for assignment in recorded:
        document.override(assignment, RECORDED)
    for override in overrides:
        document.override(override)
    return resolve(document, schema)


def resolve(document: Document, schema: type[Config] | Callable[[Mapping[str, Any]], type[Config]]) -> Config:
    """Return the typed configuration of a document with its overrides applied. Raises ConfigError like `load`."""
    if not document.own:
        document.data = mark_untrusted(document.data, str(document.within), document.is_typed)
    try:
        chosen = schema if isinstance(schema, type) else schema(document.data)
    except NoSchema as error:
        raise ConfigError([*document.found, document.problem_at(error.path, str(error))]) from error
    return validate(document, chosen)


def read_document(file: Path, within: Path | None = None) -> Document:
    """Read a configuration file. One in a run, or beside the table of an analysis, is not trusted as the user's own."""
    for folder in (file.parent, file.resolve().parent):
        if within is None and any((folder / name).exists() for name in RESULTS):
            within = file.parent
    if within is None:
        find_code_in(file.parent)
    return Document.read(file, within)


def plain(config: BaseModel) -> dict[str, Any]:
    """Return the configuration as nested dictionaries of plain JSON values."""
    return config.model_dump(mode="json")


BREAKS = set("\x85\u2028\u2029")


def dump(config: BaseModel | Mapping[str, Any]) -> str:
    """Return the configuration as YAML text, from which `load` returns an equal configuration."""
    mapping = plain(config) if isinstance(config, BaseModel) else dict(config)
    text = write_yaml(mapping, allow_unicode=True, width=120)
    if BREAKS & set(text):  # PyYAML writes them unescaped, but reads them as line ends
        text = write_yaml(mapping, width=120)
    return text


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to one with dotted keys: `{"a": {"b": 1}}` becomes `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        nested = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def validate(document: Document, schema: type[Config]) -> Config:
    """Return the typed configuration. Raises ConfigError with the problems of parsing, of fields and between fields."""
    if document.own:
        whole = _json_schema(schema)
        document.data = _with_places(document, whole, whole, document.data, ())
    config, wrong = _fields(document, schema, document.data)
    repaired = copy.deepcopy(document.data)
    for path in sorted(wrong, key=len, reverse=True):
        _remove(repaired, path)
    if config is None:  # check the rules without the wrong values, so that all problems are reported at once
        config, _ = _fields(document, schema, repaired, report=False)
    _rules(document, config, {".".join(map(str, path)) for path in wrong})
    if document.found or config is None:
        raise ConfigError(document.found)
    return config


def _with_places(document: Document, whole: Any, node: Any, value: Any, path: KeyPath) -> Any:
    """Return `value`, described by `node` of the JSON schema `whole`, with variables expanded in each `Place`."""
    options = [_resolved(whole, option) for option in (node, *_resolved(whole, node).get("anyOf", ()))]
    if isinstance(value, str) and any(option.get("place") for option in options):
        try:
            return expand_path(value)
        except ValueError as error:
            document.found.append(document.problem_at(path, f"{value!r}: {error}"))
    for option in options:
        if isinstance(value, list) and "items" in option:
            return [_with_places(document, whole, option["items"], item, (*path, i)) for i, item in enumerate(value)]
        if isinstance(value, dict) and "properties" in option:
            known = option["properties"]
            return {k: _with_places(document, whole, known.get(k, {}), v, (*path, k)) for k, v in value.items()}
    return value


def _resolved(whole: Any, node: Any) -> Any:
    while "$ref" in node:
        node = whole["$defs"][node["$ref"].rsplit("/", 1)[1]]
    return node


def _fields(
    document: Document, schema: type[Config], data: Mapping[str, Any], report: bool = True
) -> tuple[Config | None, list[KeyPath]]:
    try:  # through JSON: strict about types, but a list is accepted for a tuple
        config = schema.model_validate_json(json.dumps(data), strict=True)
        if not document.own:
            config = mark_untrusted(config, str(document.within), document.is_typed, code_keys(schema))
        return config, []
    except ValidationError as failure:
        grouped: dict[KeyPath, list[Any]] = {}
        for error in failure.errors(include_url=False):
            grouped.setdefault(_place(data, error), []).append(error)
    if report:
        order = {path: i for i, path in enumerate(document.places)}
        by_line = sorted(grouped, key=lambda path: order.get(path, order.get(path[:-1], -1)))
        document.found += [_problem(document, schema, path, grouped[path]) for path in by_line]
    return None, [_existing(data, path) for path in grouped]


def _problem(document: Document, schema: type[BaseModel], path: KeyPath, errors: list[Any]) -> Problem:
    if errors[0]["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return document.problem_at(path, "unknown key" + _suggestion(schema, path))
    if errors[0]["type"] == "missing" and len(errors[0]["loc"]) == len(path):
        return document.problem_at(path, f"is missing. {_describe(schema, path)}".removesuffix(" "))
    wanted = dict.fromkeys(_lower(error["msg"]) for error in errors)
    given = _get(document.data, path)
    value = _shorten(json.dumps(given, default=str, ensure_ascii=False))
    meant = "".join(dict.fromkeys(likely_meant(given, error["type"]) for error in errors))
    text = _describe(schema, path)
    return document.problem_at(path, f"{value}: {', or '.join(wanted)}{meant}" + (f". {text}" if text else ""))


def _rules(document: Document, config: Section | None, wrong: set[str]) -> None:
    for keys, message in config.problems() if config is not None else ():
        if not any(key == bad or key.startswith(bad + ".") for key in keys for bad in wrong):
            path = tuple(int(part) if part.isdigit() else part for part in keys[0].split("."))
            document.found.append(document.problem_at(path, message))


def _get(data: Any, path: KeyPath) -> Any:
    for part in path:
        if isinstance(data, dict):
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        else:
            return None
    return data


def _place(data: Any, error: Mapping[str, Any]) -> KeyPath:
    """Return the path of a pydantic error: in the data, or that of the missing key."""
    path = _existing(data, error["loc"])
    inside_a_union = len(error["loc"]) > len(path) + 1
    return error["loc"] if error["type"] == "missing" and not inside_a_union else path


def _existing(data: Any, location: KeyPath) -> KeyPath:
    """Return the part of a pydantic location that exists in the data: the location also names members of unions."""
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
    elif path and len(path) > 1:  # an item of a list: remove the whole list
        _remove(data, path[:-1])


@cache
def _json_schema(schema: type[BaseModel]) -> dict[str, Any]:
    return schema.model_json_schema()


def _fields_at(schema: type[BaseModel], path: KeyPath) -> dict[str, Any]:
    """Return the JSON schema of the section or field at `path`."""
    whole = _json_schema(schema)
    node: dict[str, Any] = whole
    for part in (None, *path):
        node = _resolved(whole, node if part is None else node.get("properties", {}).get(part, {}))
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
    text = _fields_at(schema, path).get("description", "") or _inherited(schema, path)
    return re.split(r"(?<=\.)\s", text, maxsplit=1)[0]


def _inherited(schema: type[BaseModel], path: KeyPath) -> str:
    """Return the help of a key that the dataclass of a section inherits; pydantic reads the docstrings of the class alone."""
    section = schema.model_fields[str(path[0])].annotation if path and path[0] in schema.model_fields else None
    for base in getattr(section, "__mro__", ())[1:] if len(path) == 2 else ():
        described = TypeAdapter(base).json_schema()["properties"] if dataclasses.is_dataclass(base) else {}
        if text := described.get(str(path[1]), {}).get("description"):
            return str(text)
    return ""


def _lower(message: str) -> str:
    return message.replace("Input should", "should").replace("Value error, ", "")


def _shorten(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[:limit] + "…"


OnResume = Literal["noted", "refused", "ignored", "kept"]


@dataclass(frozen=True)
class Key:
    """What the schema declares of a key, or of a section, beside its type: `Annotated[str, Key("optimizer")]`.

    names: the kind of part that its value, or each value of its list, may name as code; empty for none. below: the key inside the
    section that names it, if that is no `Section` of its own. is_code: returns whether a value names code. on_resume: what
    happens to another value where a run is resumed: it is followed and noted, refused (it makes another experiment), ignored
    (it changes nothing of the run), or the run keeps the value it began with; None: as the section around it, else noted.
    since: the version in which it came; a run of an earlier one has its default.
    """

    names: str = ""
    below: str = ""
    is_code: Callable[[str], bool] = names_code
    on_resume: OnResume | None = None
    since: str = "0.1"


def declared_keys(schema: Any) -> dict[str, Key]:
    """Return what is declared of dotted keys and sections, also of sections in lists: `metrics.metric_name`.

    A dataclass, as the section of a model is one, declares `on_resume` in the metadata of its fields.
    """
    found: dict[str, Key] = {}
    for name, annotation, marks in _fields_of(schema):
        for mark in marks:
            if isinstance(mark, Key):
                found[name] = mark
        for section in _sections(annotation):
            found |= {f"{name}.{key}": mark for key, mark in declared_keys(section).items()}
    return found


def code_keys(schema: type[BaseModel]) -> dict[str, Key]:
    """Return the dotted keys of a schema that may name code."""
    declared = declared_keys(schema).items()
    return {f"{name}.{key.below}".removesuffix("."): key for name, key in declared if key.names}


def on_resume(key: str, declared: Mapping[str, Key]) -> OnResume:
    """Return what happens to another value of a dotted key on resume: its own declaration, or that of the closest section."""
    parts = key.split(".")
    around = (declared.get(".".join(parts[:end])) for end in range(len(parts), 0, -1))
    return next((found.on_resume for found in around if found is not None and found.on_resume is not None), "noted")


def _fields_of(schema: Any) -> Iterator[tuple[str, Any, Sequence[Any]]]:
    if issubclass(schema, BaseModel):
        for name, field in schema.model_fields.items():
            yield name, field.annotation, field.metadata
    else:
        for entry in dataclasses.fields(schema):
            rule = entry.metadata.get("on_resume")
            yield entry.name, entry.type, [Key(on_resume=rule)] if rule else []


def _sections(annotation: Any) -> Iterator[type]:
    if isinstance(annotation, type) and (issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation)):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections(inner)


def nothing_typed(path: KeyPath) -> bool:
    """Return False: no value of the configuration was typed by the user."""
    return False


def mark_untrusted(
    value: Any,
    where: str,
    typed: Callable[[KeyPath], bool] = nothing_typed,
    declared: Collection[str] = (),
    path: KeyPath = (),
) -> Any:
    """Return a raw or typed configuration in which text that may name code is `Untrusted` unless the user typed it.

    where: the run or file that it comes from. typed: returns whether the user typed the value at a path. declared: keys
    that may name code; in other keys, text of the form `module:attribute` counts.
    """

    def marked(inner: Any, part: str | int) -> Any:
        return mark_untrusted(inner, where, typed, declared, (*path, part))

    if isinstance(value, str):
        key = ".".join(part for part in path if isinstance(part, str))
        return Untrusted(value, where, key) if (key in declared or names_code(value)) and not typed(path) else value
    if isinstance(value, dict):
        return {key: marked(inner, key) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(marked(inner, number) for number, inner in enumerate(value))
    if isinstance(value, BaseModel):
        fields = vars(value) | (value.model_extra or {})
        return value.model_copy(update={key: marked(inner, key) for key, inner in fields.items()})
    return value


def refuse_untrusted(config: BaseModel, but: tuple[str, ...] = ()) -> None:
    """Raise UntrustedCode if a key of `config` names code that the user did not type and that is not trusted.

    but: prefixes of keys that are not checked, because the command does not use them.
    """
    declared = code_keys(type(config))
    for name in _untrusted(config):
        if name.key in declared and declared[name.key].is_code(name) and not name.key.startswith(but):
            require_trust(name)


def _untrusted(value: Any) -> Iterator[Untrusted]:
    if isinstance(value, Untrusted):
        yield value
    elif isinstance(value, BaseModel):
        yield from _untrusted([*vars(value).values()])
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _untrusted(inner)
