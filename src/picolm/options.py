"""The options of a metric or a probe: the keyword-only parameters of its function, checked against their annotations."""

import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from picolm.registry import did_you_mean


@dataclass(frozen=True)
class Option:
    """One option. annotation: its type, with limits; default: `inspect.Parameter.empty` if required."""

    name: str
    annotation: Any
    default: Any

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty

    @functools.cached_property
    def _type(self) -> TypeAdapter[Any]:
        return TypeAdapter(Any if self.annotation is inspect.Parameter.empty else self.annotation)

    def problem(self, value: Any) -> str | None:
        """Return what is wrong with `value`, such as `should be 'left' or 'right', not 'top'`; None if it is valid."""
        try:
            self._type.validate_python(value, strict=True)
        except ValidationError as error:
            message = error.errors()[0]["msg"].replace("Input should", "should")
            return f"{message}, not {value!r}"
        return None


class Options(dict[str, Option]):
    """Options by name."""

    @property
    def required(self) -> tuple[str, ...]:
        """Names of the options that must be given."""
        return tuple(name for name, option in self.items() if option.required)

    def problem(self, name: str, value: Any) -> str | None:
        """Return what is wrong with the value of one option, None if it is valid."""
        if name not in self:
            return f"unknown option{did_you_mean(name, self)} (there are: {', '.join(self) or 'none'})"
        return self[name].problem(value)

    def problems(self, given: Mapping[str, Any]) -> dict[str, str]:
        """Return all that is wrong with the given values, by name: unknown options, invalid values, missing options."""
        found = {name: self.problem(name, value) for name, value in given.items()}
        missing = {name: "must be given" for name in self.required if name not in given}
        return {name: complaint for name, complaint in found.items() if complaint is not None} | missing


def type_hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations of a function with their limits; those that cannot be resolved are left out."""
    try:
        return typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError, AttributeError):  # names that only a type checker sees, or a callable object
        return {}
