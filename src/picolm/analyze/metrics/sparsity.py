"""Metrics of how unequal the magnitudes of the entries of a tensor are. None depends on scale; products of factors are
multiplied out.
"""

import math
from typing import Annotated

import numpy as np
from pydantic import Field

from picolm.analyze.matrix import Matrix, Undefined
from picolm.analyze.metrics.metric import metric


@metric("gini")
def gini(x: Matrix) -> float:
    """Gini coefficient of the magnitudes: 0 if all are equal, 1 - 1/n if only one of n entries is not zero.

    sum_i (2 i - n - 1) x_(i) / (n sum x), x_(1) <= … <= x_(n) (Hurley and Rickard, IEEE Trans. Inf. Theory 2009). 0 if
    all entries are zero.
    """
    magnitudes = np.sort(x.entries.abs().numpy(), axis=None)
    total, count = magnitudes.sum(), len(magnitudes)
    if total == 0:
        return 0.0
    return max(0.0, float(np.arange(1 - count, count + 1, 2.0) @ magnitudes / (count * total)))


@metric("hoyer")
def hoyer(x: Matrix) -> float:
    """Hoyer sparsity: 0 if all magnitudes are equal, 1 if only one entry is not zero.

    (sqrt n - l1 / l2) / (sqrt n - 1) (Hoyer, JMLR 2004). Undefined if all entries are zero, and for a single entry.
    """
    root = math.sqrt(x.entries.numel())
    if root == 1:
        raise Undefined("has a single entry: it is neither sparse nor dense")
    length = float(x.entries.norm())
    if length == 0:
        raise Undefined("is zero: the ratio of its norms is 0 / 0")
    return min(1.0, max(0.0, (root - float(x.entries.abs().sum()) / length) / (root - 1)))


@metric("kurtosis")
def kurtosis(x: Matrix) -> float:
    """Kurtosis of the entries (not the excess kurtosis): 3 for a normal distribution, at least 1.

    Fourth central moment divided by the square of the second, both with 1/n. Undefined if all entries are equal.
    """
    entries = x.entries
    if entries.min() == entries.max():
        raise Undefined("all entries are equal: they have no spread")
    deviations = entries - entries.mean()
    squares = (deviations / deviations.abs().max()).square()
    return float(squares.square().mean() / squares.mean() ** 2)


@metric("near_zero_fraction")
def near_zero_fraction(x: Matrix, *, eps: Annotated[float, Field(gt=0, le=1)] = 1e-3) -> float:
    """Fraction of the entries with a magnitude below `eps` times the largest magnitude.

    1 if all entries are zero.
    """
    magnitudes = x.entries.abs()
    largest = magnitudes.max()
    return 1.0 if largest == 0 else float((magnitudes < eps * largest).double().mean())
