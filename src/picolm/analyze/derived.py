"""A property that is computed once, by whoever asks first."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

Result = TypeVar("Result")


class derived(Generic[Result]):  # read as the decorator that it is
    """`functools.cached_property` without its lock: before Python 3.12 that is one lock for the property of all objects, so
    that threads which look at different matrices wait for each other. Two that ask one object at once compute the same twice.
    """

    def __init__(self, function: Callable[[Any], Result]):
        self.function, self.name, self.__doc__ = function, function.__name__, function.__doc__

    @overload
    def __get__(self, instance: None, owner: type) -> "derived[Result]": ...
    @overload
    def __get__(self, instance: object, owner: type) -> Result: ...
    def __get__(self, instance: object | None, owner: type) -> "derived[Result] | Result":
        if instance is None:
            return self
        value = instance.__dict__[self.name] = self.function(instance)
        return value
