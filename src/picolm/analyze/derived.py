"""A property that is computed on first access and then cached."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

Result = TypeVar("Result")


class derived(Generic[Result]):  # lower case: it is used as a decorator
    """`functools.cached_property` without its lock. Before Python 3.12 one lock covers the property of all objects, so
    threads that use different matrices wait for each other. Without it, two threads that use one object at once compute
    it twice.
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
