"""Metrics of the singular values of a matrix: effective ranks, condition number, exponent of the tail.

Notation: singular values s_1 >= … >= s_R of a matrix of attainable rank R; a vector is a matrix with one row.
"""

import math
from typing import Annotated

from pydantic import Field
from torch import Tensor
from torch.special import entr

from picolm.analyze.matrix import EPSILON, Matrix, Undefined
from picolm.analyze.metrics.metric import metric

SMALLEST_FIT = 50


def _relative(x: Matrix) -> Tensor:
    """Return the singular values divided by the largest. Raises `Undefined` for a zero matrix."""
    values = x.singular_values
    if values[0] == 0:
        raise Undefined("is zero: all singular values are 0")
    return values / values[0]


@metric("effective_rank")
def effective_rank(x: Matrix) -> float:
    """Effective rank: exponential of the entropy of the normalized singular values, from 1 to R.

    exp(-sum p ln p), p = s / sum s, 0 ln 0 = 0 (Roy and Vetterli, EUSIPCO 2007). Undefined for a zero matrix.
    """
    values = _relative(x)
    return min(math.exp(float(entr(values / values.sum()).sum())), float(x.rank))


@metric("per")
def per(x: Matrix) -> float:
    """Proportional effective rank: effective rank divided by the attainable rank R, from 1/R to 1.

    R is min(m, n); for a product of the factors of a head it is the head size, and only s_1..s_R count (Diehl Martinez
    et al., Tending Towards Stability, 2024). Undefined for a zero matrix.
    """
    return effective_rank(x) / x.rank


@metric("stable_rank")
def stable_rank(x: Matrix) -> float:
    """Stable rank: squared Frobenius norm divided by squared spectral norm, from 1 to R.

    sum s^2 / s_1^2 (Rudelson and Vershynin, J. ACM 2007). Undefined for a zero matrix.
    """
    return float(_relative(x).square().sum())


@metric("participation_ratio")
def participation_ratio(x: Matrix) -> float:
    """Participation ratio: how many singular values the squared norm is spread over, from 1 to R.

    (sum s^2)^2 / sum s^4 (Gao et al., bioRxiv 214262, 2017, who use it for a covariance matrix; nothing is centred
    here). Undefined for a zero matrix.
    """
    squares = _relative(x).square()
    return float(squares.sum() ** 2 / squares.square().sum())


@metric("condition_number")
def condition_number(x: Matrix) -> float:
    """Condition number: largest divided by smallest of the R singular values; infinity for a singular or zero matrix.

    s_1 / s_R of the stored numbers. A matrix is singular if s_R is at most max(m, n) eps s_1, the rounding of s_1 in
    float64. A matrix of lower rank that was stored in a narrower type is not singular: its s_R is the rounding of that
    type, and the value shows how coarse the type is.
    """
    values = x.singular_values
    if values[-1] <= max(x.shape) * EPSILON * values[0]:
        return math.inf
    return float(values[0] / values[-1])


@metric("spectral_alpha")
def spectral_alpha(x: Matrix, *, k: Annotated[int, Field(ge=SMALLEST_FIT)]) -> float:
    """Power-law exponent of the tail of the squared singular values, by Hill's estimator on the k largest.

    1 + k / sum_{i<=k} ln(lambda_i / lambda_{k+1}), lambda = s^2: the exponent of the density, which is Hill's tail
    index plus 1 (Annals of Statistics 3, 1975; of spectra: Zhou et al., Temperature Balancing, NeurIPS 2023, whose
    program also counts lambda_{k+1}: k + 1 over the same sum). No k suits all matrices, so it must be given, and be 50
    or more. Undefined where R <= k, where the rank is below k + 1 (singular value k + 1 is not above the noise floor of
    the stored type), and where the k + 1 largest are equal.
    """
    if x.rank <= k:
        raise Undefined(f"has {x.rank} singular values; a fit on the {k} largest takes {k + 1}")
    values = _relative(x)[: k + 1]
    if x.singular_values[k] <= x.tolerance:
        raise Undefined(f"singular value {k + 1} is 0 or rounding of the stored type: the {k} largest have no border")
    logs = 2 * (values[:k] / values[k]).log().sum()
    if values[0] - values[k] <= x.tie / x.singular_values[0]:
        raise Undefined(f"the {k + 1} largest singular values are equal: there is no tail to fit")
    return float(1 + k / logs)
