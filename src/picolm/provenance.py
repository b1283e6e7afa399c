"""Names of code in configurations: which keys may contain one, and which of them the user typed.

A key whose value may name code declares this in the schema with `NamesCode`. Values that the user typed are trusted. A
configuration from a run, a model or a response of the Hub goes through `mark_untrusted`: its names stay readable, but
`Registry.get` refuses to import them. So a command needs trust only for the code that it uses.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel

from picolm.document import KeyPath
from picolm.registry import Untrusted, names_code, require_trust


@dataclass(frozen=True)
class NamesCode:
    """A marker for a key whose value, or each value of whose list, may name code.

    family: the kind of part that it names. below: the key inside the marked field, if that is a section which is not a
    `Section`. is_code: returns whether a value names code.
    """

    family: str
    below: str = ""
    is_code: Callable[[str], bool] = names_code


def code_keys(schema: type[BaseModel]) -> dict[str, NamesCode]:
    """Return the dotted keys of a schema that may name code, also in sections in lists: `metrics.metric_name`."""
    found: dict[str, NamesCode] = {}
    for name, field in schema.model_fields.items():
        for mark in field.metadata:
            if isinstance(mark, NamesCode):
                found[f"{name}.{mark.below}".removesuffix(".")] = mark
        for section in _sections(field.annotation):
            found |= {f"{name}.{key}": mark for key, mark in code_keys(section).items()}
    return found


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
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
