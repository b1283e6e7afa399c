"""Pages of reference that follow from the code: `<!-- generated: WHAT -->` in a page becomes tables of what the code says.

WHAT: train, analyze, suite (every key of a configuration), command-line, metrics, components, probes. Links to files of the
repository that are no pages (`../examples/…`) lead somewhere where the repository is browsed; in the site they are their text.
"""

import inspect
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import BaseModel

_OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+(?:examples|src|tests|configs|benchmarks|[A-Z]+\.md)[^)]*\)")
_MARK = re.compile(r"^<!-- generated: ([\w-]+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """What mkdocs calls for each page."""
    return _MARK.sub(lambda match: "\n".join(GENERATED[match[1]]()), _OUTSIDE.sub(r"\1", markdown))


def configuration_keys(schema: type[BaseModel]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(dotted key, its JSON schema) of a configuration, sections included, in the order of the source."""
    whole = schema.model_json_schema()
    yield from _keys(whole, whole, "")


def _keys(whole: dict[str, Any], node: dict[str, Any], prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, field in node["properties"].items():
        key = prefix + name
        section = _resolved(whole, field)
        yield key, field | {"section": "properties" in section, "text": section.get("description", "")}
        if "properties" in section:
            yield from _keys(whole, section, key + ".")


def _resolved(whole: dict[str, Any], field: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in field:
        field = whole["$defs"][field["$ref"].rsplit("/", 1)[1]]
    return field


def _train() -> Iterator[str]:
    from picolm.train.canaries import CanaryGroup
    from picolm.train.config import TrainConfig

    yield from _tables(TrainConfig)
    yield from _table(CanaryGroup, "A group of data.canaries", "canaries.")


def _statespace() -> Iterator[str]:
    from pydantic import create_model

    from picolm.models import StateSpaceConfig

    yield from _table(create_model("Model", model=(StateSpaceConfig, ...)), "model of pico_statespace", "statespace.")


def _suite() -> Iterator[str]:
    from picolm.suite.config import SuiteConfig

    yield from _tables(SuiteConfig)


_ON_RESUME = {
    "refused": "Cannot change within a run.",
    "ignored": "Another value on resume changes nothing.",
    "kept": "A run keeps the value it began with.",
}


def _declared(key: str, declared: Any) -> str:
    """What the schema declares of a key, in a sentence or two."""
    from picolm.schema import Key, on_resume

    since = declared.get(key, Key()).since
    words = _ON_RESUME.get(on_resume(key, declared)), "" if since == Key().since else f"Since version {since}."
    return "".join(f" {sentence}" for sentence in words if sentence)


def _tables(schema: type[BaseModel]) -> Iterator[str]:
    from picolm.schema import declared_keys

    whole, declared = schema.model_json_schema(), declared_keys(schema)
    by_section: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for key, field in configuration_keys(schema):
        if not field["section"]:
            by_section.setdefault(key.rpartition(".")[0], []).append((key, field))
    for section, fields in by_section.items():
        yield from ("", f"## {section or 'On top'}", "", "| key | default | values | meaning |", "|---|---|---|---|")
        for key, field in fields:
            field = field | {"description": field.get("description", "") + _declared(key, declared)}
            yield _row(key, field, whole)


def _row(key: str, field: dict[str, Any], whole: dict[str, Any], within: str = "") -> str:
    """A row of a table; its anchor is the whole key."""
    default = _code(json.dumps(field["default"])) if "default" in field else "*must be given*"
    name = f'<a id="{within}{key}"></a>`{key.rpartition(".")[2] if not within else key}`'
    return f"| {name} | {default} | {_values(field, whole)} | {_cell(field.get('description', ''))} |"


def _values(field: dict[str, Any], whole: dict[str, Any]) -> str:
    """What may be given, in words: `whole number > 0`, `all or last`, …"""
    field = _resolved(whole, field)
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_values(option, whole) for option in field["anyOf"]))
    if "enum" in field or "const" in field:
        return " or ".join(_code(str(value)) for value in field.get("enum", [field.get("const")]))
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limit = ", ".join(f"{sign} {field[name]:g}" for name, sign in limits.items() if name in field)
    if field.get("type") == "array":
        inner = field.get("items") or next(iter(field.get("prefixItems", [])), None)
        return f"list of ({_values(inner, whole)})" if inner else "list"
    names = {
        "integer": "whole number",
        "number": "number",
        "string": "text",
        "boolean": "`true` or `false`",
        "null": "`null`",
    }
    name = f"text like {_code(field['pattern'])}" if "pattern" in field else names.get(field.get("type", ""), "section")
    return f"{name} {limit}".strip()


def _analyze() -> Iterator[str]:
    from picolm.analyze import config

    titles = {
        config.AnalysisConfig: ("The file", "file."),
        config.Entry: ("An entry of metrics", "metrics."),
        config.Component: ("A component of an entry", "components."),
        config.Suffixes: ("layer_suffixes of a circuit", "layer_suffixes."),
        config.Target: ("target of an entry", "target."),
        config.StepRange: ("steps as a range", "steps."),
        config.EachStep: ("steps by a distance", "steps."),
    }
    for schema, (title, within) in titles.items():
        yield from _table(schema, title, within)


def _table(schema: type[BaseModel], title: str, within: str) -> Iterator[str]:
    """The keys of a section that stands in a list, or on top of a file."""
    whole = schema.model_json_schema()
    yield from ("", f"## {title}", "", "| key | default | values | meaning |", "|---|---|---|---|")
    for key, field in configuration_keys(schema):
        if not field["section"]:
            yield _row(key, field, whole, within)


def _command_line() -> Iterator[str]:
    import typer.main

    from picolm.cli import app

    group: Any = typer.main.get_command(app)
    yield from _command("pico", group)


def _command(name: str, command: Any) -> Iterator[str]:
    members = getattr(command, "commands", None)
    if members is not None:
        for word, member in members.items():
            yield from _command(f"{name} {word}", member)
        return
    yield from ("", f"## {name}", "", _cell(command.help or ""), "")
    yield from ("| argument or option | default | meaning |", "|---|---|---|")
    for parameter in command.params:
        if parameter.name == "help" or getattr(parameter, "hidden", False):
            continue
        if parameter.param_type_name == "argument":
            label = _code(parameter.metavar or parameter.name.upper())
        else:
            label = ", ".join(map(_code, [*parameter.opts, *parameter.secondary_opts]))
        default = parameter.default
        shown = (
            ""
            if default is None or default is False or callable(default) or parameter.required
            else _code(str(default))
        )
        yield f"| {label} | {'*must be given*' if parameter.required else shown} | {_cell(parameter.help or '')} |"


def _metrics() -> Iterator[str]:
    from picolm.analyze.metrics import METRICS

    for name in METRICS:
        metric = METRICS.get(name)
        yield from ("", f"## {name}", "", _paragraphs(metric.function), "")
        kinds = ", ".join(sorted(metric.of))
        needs = {"rows": " with as many rows", "shape": " of one shape"}.get(metric.needs, "")
        yield f"A {metric.kind}. Measures {'one matrix' if metric.arity == 1 else f'two matrices{needs}'}: {kinds}."
        yield from _options(metric.options)


def _probes() -> Iterator[str]:
    from picolm.probes import PROBES

    for name in PROBES:
        probe = PROBES.get(name)
        yield from ("", f"## {name}", "", _paragraphs(probe.function), "")
        yield from _options(probe.options)
        yield from ("", "| reading | units | definition |", "|---|---|---|")
        for reading, quantity in probe.gives.items():
            yield f"| `{name}.{reading}` | {quantity.units} | {_cell(quantity.definition)} |"


def _options(options: Any) -> Iterator[str]:
    for option in options.values():
        default = "must be given" if option.required else f"default {_code(json.dumps(option.default))}"
        yield f"Option `{option.name}` ({_annotation(option.annotation)}; {default})."


def _annotation(annotation: Any) -> str:
    from pydantic import TypeAdapter

    schema = TypeAdapter(annotation).json_schema()
    return _values(schema, schema)


def _components() -> Iterator[str]:
    from picolm.analyze.components import COMPONENTS

    for name in COMPONENTS:
        part = COMPONENTS.get(name)
        yield from (
            "",
            f"## {name}",
            "",
            _paragraphs(part),
            "",
            f"Of {', '.join(part.kinds or ('anything a checkpoint holds',))}.",
        )


def _paragraphs(part: Any) -> str:
    return re.sub(r"([*_])", r"\\\1", inspect.getdoc(part) or "").replace("<", "&lt;")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|").replace("<", "&lt;")


def _code(text: str) -> str:
    return f"`{text}`".replace("|", r"\|")


GENERATED: dict[str, Callable[[], Iterator[str]]] = {
    "train": _train,
    "analyze": _analyze,
    "statespace": _statespace,
    "suite": _suite,
    "command-line": _command_line,
    "metrics": _metrics,
    "components": _components,
    "probes": _probes,
}
