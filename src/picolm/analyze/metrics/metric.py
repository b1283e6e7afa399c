"""The class `Metric`: a function of one or two matrices that returns a number, and what an analysis needs to know.

`@metric("name")` turns a function into a `Metric` and registers it; `as_metric` takes any function of a user.
Parameters annotated `Matrix` receive one, with its cached results; others receive a float64 tensor, or a numpy array if
annotated so. Keyword-only parameters are the options of the metric, in Python and in YAML; they are checked against
their annotation.
"""

import functools
import inspect
import math
import statistics
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from picolm.analyze.matrix import Array, Matrix, Undefined
from picolm.analyze.permuted import Axis, permute
from picolm.errors import PicoError
from picolm.options import Option, Options, type_hints
from picolm.registry import Registry
from picolm.seeds import derive

DATA_TYPES = frozenset({"weights", "gradients", "activations"})
Needs = Literal["none", "rows", "shape"]
Kind = Literal["similarity", "distance", "quantity"]


class Chance(NamedTuple):
    """Mean and standard deviation of a metric over permutations."""

    mean: float
    std: float


class Metric:
    """A callable metric: `cka(x, y, debiased=True)` takes tensors, numpy arrays or matrices and returns a float.

    name; arity: number of matrices, 1 or 2; of: the data types it is defined for; options: by name; needs: what two
    matrices must have in common (the number of `rows`, the `shape`, or `none`); symmetric: whether the order of the two
    does not matter; summary: the first paragraph of the docstring as one line.
    kind: what the value is: a similarity (1 for equal matrices, less for others), a distance (0 for equal matrices,
    more for others), or any other quantity (the default).
    forced: a function of the same matrices and options that returns how many canonical correlations are 1 whatever the
    data.
    paired: a function of the options that returns which axis of the two matrices corresponds, rows (the default) or
    columns; `chance` permutes this axis.
    """

    def __init__(
        self,
        function: Callable[..., float],
        name: str,
        of: Collection[str] = DATA_TYPES,
        needs: Needs = "none",
        symmetric: bool = False,
        kind: Kind = "quantity",
        forced: Callable[..., int] | None = None,
        paired: Callable[[Mapping[str, Any]], Axis] = lambda options: "rows",
    ):
        functools.update_wrapper(self, function)
        self.function, self.name = function, name
        self.of, self.needs, self.symmetric = frozenset(of), needs, symmetric
        self._forced, self._paired = forced, paired
        self.__signature__ = inspect.signature(function)
        matrices, options = _parameters(function, name)
        self._forms = tuple(matrices.values())
        self.arity, self.kind = len(matrices), _checked_kind(kind, name, len(matrices))
        self.options = Options(options)
        self.summary = " ".join((inspect.getdoc(function) or "").partition("\n\n")[0].split())

    def __call__(self, *matrices: Matrix | Array, **options: Any) -> float:
        """Return the value. Raises `Undefined` with the reason where there is none; infinity is a value, NaN is not.
        Raises TypeError for a wrong number of matrices and for wrong options.
        """
        given = self._checked(matrices, options)
        try:
            value = float(self.function(*(form(matrix) for form, matrix in zip(self._forms, given)), **options))
        except torch.linalg.LinAlgError as error:
            raise Undefined(f"the decomposition did not converge: {error}") from error
        if math.isnan(value):
            raise Undefined(f"{self.name} is not a number here")
        return value

    def forced(self, *matrices: Matrix | Array, **options: Any) -> int | None:
        """Return how many canonical correlations are 1 whatever the data, None for a metric without them. Raises `Undefined`."""
        return None if self._forced is None else self._forced(*self._checked(matrices, options), **options)

    def chance(self, x: Matrix | Array, y: Matrix | Array, *, draws: int = 20, **options: Any) -> Chance:
        """Return mean and standard deviation of the value over `draws` permutations of the rows of y (of its columns,
        if the columns correspond). The permutations are the same in each call. Raises `Undefined` if one of them has no
        value, and ValueError for fewer than 2 draws.

        Permutations assume exchangeable rows; positions of one text are only approximately exchangeable.
        """
        if draws < 2:
            raise ValueError(f"{draws} permutation(s) have no standard deviation; 2 at least")
        first, second = self._checked((x, y), options)
        axis = self._paired(options)
        size = (second.dimensions or (1,))[0] if axis == "rows" else second.shape[1]
        values = []
        for draw in range(draws):
            generator = torch.Generator().manual_seed(derive(0, "chance", draw))
            order = torch.randperm(size, generator=generator)
            values.append(self(first, permute(second, order, axis), **options))
        return Chance(statistics.fmean(values), statistics.stdev(values))

    def _checked(self, matrices: tuple[Matrix | Array, ...], options: Mapping[str, Any]) -> list[Matrix]:
        if len(matrices) != self.arity:
            raise TypeError(
                f"{self.name} is a metric of {self.arity} tensor{'s'[: self.arity - 1]}, given {len(matrices)}"
            )
        if problems := self.options.problems(options):
            raise TypeError("; ".join(f"{self.name}: {key}: {complaint}" for key, complaint in problems.items()))
        given = [Matrix.of(matrix) for matrix in matrices]
        self._check(given)
        return given

    def _check(self, given: list[Matrix]) -> None:
        for place, matrix in zip(("the first ", "the second "), given):
            if matrix.fault is not None:
                raise Undefined((place if len(given) > 1 else "") + matrix.fault)
        if self.needs == "rows" and given[0].shape[0] != given[1].shape[0]:
            raise Undefined(
                f"{given[0].shape[0]} rows against {given[1].shape[0]}: {self.name} compares activations of the same inputs, "
                "or matrices with matching rows"
            )
        if self.needs == "shape" and given[0].dimensions != given[1].dimensions:
            shapes = " against ".join(str(matrix.dimensions) for matrix in given)
            raise Undefined(f"{shapes}: {self.name} compares tensors of one shape")

    def __reduce__(self) -> Any:
        """Pickle by name, like a function, if the registry has this object under its name; else by function."""
        registered = METRICS.get(self.name) is self if self.name in METRICS else False
        return self.function.__qualname__ if registered else (as_metric, (self.function, self.name))

    def __repr__(self) -> str:
        return f"<metric {self.name}{self.__signature__}>"


METRICS: Registry[Metric] = Registry("metric")


def metric(
    name: str,
    *,
    kind: Kind = "quantity",
    of: Collection[str] = DATA_TYPES,
    needs: Needs = "none",
    symmetric: bool = False,
    forced: Callable[..., int] | None = None,
    paired: Callable[[Mapping[str, Any]], Axis] = lambda options: "rows",
) -> Callable[[Callable[..., float]], Metric]:
    """Return a decorator that registers a function as the metric `name`; the other arguments are those of `Metric`."""

    def register(function: Callable[..., float]) -> Metric:
        return METRICS.add(name)(Metric(function, name, of, needs, symmetric, kind, forced, paired))

    return register


def find_metric(name: str) -> Metric:
    """Return the metric `name` of a configuration. Raises PicoError. A plain function keeps its whole name,
    `my_lab.module:gini`, so that no other metric has the same name.
    """
    return as_metric(METRICS.get(name), name)


def as_metric(part: Any, name: str = "") -> Metric:
    """Return `part` itself if it is a Metric; else make one of a plain function of one or two tensors. Raises PicoError
    for anything else.

    name: name of the metric (default: that of the function). An attribute `kind` of the function is the kind of the
    metric.
    """
    if isinstance(part, Metric):
        return part
    if not callable(part):
        raise PicoError(f"{part!r} is no metric: a metric is a function of one or two tensors that returns a number")
    kind: Any = getattr(part, "kind", "quantity")
    return Metric(part, name or getattr(part, "__name__", type(part).__name__), kind=kind)


def _checked_kind(kind: Any, name: str, arity: int) -> Kind:
    if kind not in typing.get_args(Kind):
        raise PicoError(f"metric {name}: kind is {kind!r}; expected {', '.join(map(repr, typing.get_args(Kind)))}")
    if arity == 1 and kind != "quantity":
        raise PicoError(f"metric {name}: a {kind} compares two tensors; this one takes one and is a 'quantity'")
    return kind


def _parameters(
    function: Callable[..., Any], name: str
) -> tuple[dict[str, Callable[[Matrix], Any]], dict[str, Option]]:
    """Return, by parameter, how to pass each matrix, and the options. Raises PicoError if this is not the signature of
    a metric.
    """
    hints = type_hints(function)
    matrices: dict[str, Callable[[Matrix], Any]] = {}
    options: dict[str, Option] = {}
    for key, parameter in inspect.signature(function).parameters.items():
        annotation = hints.get(key, parameter.annotation)
        if parameter.kind is parameter.KEYWORD_ONLY:
            options[key] = Option(key, annotation, parameter.default)
        elif parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise PicoError(
                f"metric {name}: {parameter} tells neither how many tensors it takes nor which options it has"
            )
        elif parameter.default is not parameter.empty:
            raise PicoError(f"metric {name}: {key} has a default; an option stands behind a `*`: (x, *, {parameter})")
        else:
            matrices[key] = _form(annotation)
    if len(matrices) not in (1, 2):
        raise PicoError(f"metric {name} takes {len(matrices)} tensors; a metric takes one, or two to compare")
    return matrices, options


def _form(annotation: Any) -> Callable[[Matrix], Any]:
    if annotation is Matrix:
        return lambda matrix: matrix
    if annotation is np.ndarray or typing.get_origin(annotation) is np.ndarray:
        return lambda matrix: matrix.entries.numpy()
    return lambda matrix: matrix.entries
