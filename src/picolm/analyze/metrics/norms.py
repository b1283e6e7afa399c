"""How large a tensor is, and how far it is from another of the same shape."""

from typing import Literal

import torch

from picolm.analyze.matrix import Matrix, Undefined
from picolm.analyze.metrics.metric import metric


@metric("norm")
def norm(x: Matrix, *, norm_type: Literal["frobenius", "nuclear", "spectral", "inf", "l1"] = "frobenius") -> float:
    """Norm of a matrix: frobenius, nuclear (sum of singular values), spectral (the largest), inf, l1.

    inf is the largest magnitude of an entry and l1 the sum of magnitudes, not the operator norms of these names.
    """
    if norm_type == "frobenius":
        return x.frobenius
    if norm_type == "nuclear":
        return float(x.singular_values.sum())
    if norm_type == "spectral":
        return float(x.singular_values[0])
    return float(torch.linalg.vector_norm(x.entries, ord=torch.inf if norm_type == "inf" else 1))


@metric("cosine", kind="similarity", needs="shape", symmetric=True)
def cosine(x: Matrix, y: Matrix) -> float:
    """Cosine of the angle between two tensors of one shape, seen as vectors. Undefined when one is zero."""
    if x.frobenius == 0 or y.frobenius == 0:
        raise Undefined(f"the {'first' if x.frobenius == 0 else 'second'} is zero: it has no direction")
    return min(1.0, max(-1.0, x.dot(y) / x.frobenius / y.frobenius))


@metric("relative_change", kind="distance", needs="shape")
def relative_change(x: Matrix, y: Matrix) -> float:
    """Distance of a tensor from the one it is compared with, over the norm of the latter. Undefined when that is zero.

    norm(x - y)_F / norm(y)_F.
    """
    if y.frobenius == 0:
        raise Undefined("the second is zero: a change has nothing to be relative to")
    return x.minus(y).frobenius / y.frobenius
