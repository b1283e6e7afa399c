"""Metrics of the size of a tensor, and of its difference from another tensor of the same shape."""

from typing import Literal

import torch

from picolm.analyze.matrix import Matrix, Undefined
from picolm.analyze.metrics.metric import metric


@metric("norm")
def norm(x: Matrix, *, norm_type: Literal["frobenius", "nuclear", "spectral", "inf", "l1"] = "frobenius") -> float:
    """Norm of a matrix: frobenius, nuclear (sum of singular values), spectral (largest singular value), inf or l1.

    inf is the largest magnitude of an entry and l1 the sum of all magnitudes; these are not the operator norms of the
    same names.
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
    """Cosine similarity of two tensors of the same shape, flattened to vectors: -1 to 1.

    Undefined if one is zero.
    """
    if x.frobenius == 0 or y.frobenius == 0:
        raise Undefined(f"the {'first' if x.frobenius == 0 else 'second'} is zero: it has no direction")
    return min(1.0, max(-1.0, x.dot(y) / x.frobenius / y.frobenius))


@metric("relative_change", kind="distance", needs="shape")
def relative_change(x: Matrix, y: Matrix) -> float:
    """Relative change: norm of the difference of two tensors, divided by the norm of the second.

    norm(x - y)_F / norm(y)_F; y is the tensor that x is compared with. Undefined if y is zero.
    """
    if y.frobenius == 0:
        raise Undefined("the second is zero: a change has nothing to be relative to")
    return x.minus(y).frobenius / y.frobenius
