"""How alike two representations of the same inputs are.

Rows are inputs, the same in both; columns are features, not necessarily as many, and are centred first. A matrix with the
same number of rows for another reason (two weight matrices with one output space) may stand for activations.

Notation: X [N, p] and Y [N, q], centred; canonical correlations rho_1 >= rho_2 >= …
"""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from picolm.analyze.matrix import EPSILON, Matrix, Undefined
from picolm.analyze.metrics.metric import metric

# Canonical variates whose correlations differ by less are not determined by the data one by one, only their span is.
TIE = 1e-8


@metric("cka", kind="similarity", needs="rows", symmetric=True)
def cka(x: Matrix, y: Matrix, *, debiased: bool = False) -> float:
    """Centred kernel alignment with a linear kernel: 0 to 1; invariant to rotation and scale.

    norm(Y'X)_F^2 / (norm(X'X)_F norm(Y'Y)_F) (Kornblith et al., ICML 2019). debiased: with the U-statistic of HSIC (Song et al.,
    JMLR 2012), near 0 for independent data where the biased one grows with p / N; it may be negative, and takes 4 rows.
    Undefined when all rows are equal; debiased, when they are equally far apart.
    """
    cross = _squared_cross_norm(x, y)
    if not debiased:
        return min(1.0, cross / x.gram_norm / y.gram_norm)
    if len(x.centred) < 4:
        raise Undefined(f"has {len(x.centred)} rows; debiased cka takes 4 at least")
    own = [_debiased_hsic(matrix.gram_norm**2, matrix, matrix) for matrix in (x, y)]
    if any(hsic <= len(x.centred) * EPSILON * matrix.gram_norm**2 for hsic, matrix in zip(own, (x, y))):
        raise Undefined("rows are equally far apart: nothing is left of their similarities after debiasing")
    return min(1.0, max(-1.0, _debiased_hsic(cross, x, y) / math.sqrt(own[0]) / math.sqrt(own[1])))


def _squared_cross_norm(x: Matrix, y: Matrix) -> float:
    """norm(Y'X)_F^2, which is the sum of products of the N x N Gram matrices too: by the smaller matrices."""
    if len(x.centred) < max(x.centred.shape[1], y.centred.shape[1]):
        return float(x.gram.flatten() @ y.gram.flatten())
    return float((y.centred.mT @ x.centred).square().sum())


def _debiased_hsic(cross: float, x: Matrix, y: Matrix) -> float:
    """The U-statistic times N (N - 3), from the Gram matrices K and L of centred rows without forming them.

    Leaving out the diagonals k and l of matrices whose rows sum to 0 gives tr(K~L~) = norm(Y'X)_F^2 - k.l, 1'K~1 = -sum k and
    1'K~L~1 = k.l; that the rows are centred makes no difference to the U-statistic.
    """
    rows, k, l = len(x.centred), x.squared_lengths, y.squared_lengths  # noqa: E741
    diagonal = float(k @ l)
    return cross - diagonal + float(k.sum() * l.sum()) / ((rows - 1) * (rows - 2)) - 2 * diagonal / (rows - 2)


def _forced(ranks: tuple[int, int], rows: int) -> int:
    """How many canonical correlations are 1 whatever the data: two spaces of these dimensions among the N - 1 of centred rows
    have at least that many directions in common.
    """
    return max(0, sum(ranks) - (rows - 1))


def _check_ranks(ranks: tuple[int, int], rows: int) -> None:
    for place, rank in zip(("first", "second"), ranks, strict=True):
        if rank == rows - 1:
            raise Undefined(
                f"the {place} has rank {rank}, which is all that {rows} centred rows can have: every canonical correlation is 1 "
                "whatever the data; take more rows"
            )


def _ranks(x: Matrix, y: Matrix) -> tuple[int, int]:
    return len(x.directions.scales_d), len(y.directions.scales_d)


def _forced_of_ranks(x: Matrix, y: Matrix) -> int:
    return _forced(_ranks(x, y), x.shape[0])


@metric("cca", kind="similarity", needs="rows", symmetric=True, forced=_forced_of_ranks)
def cca(x: Matrix, y: Matrix) -> float:
    """Mean canonical correlation: 0 to 1; invariant to any invertible linear map of the features.

    Over as many correlations as the smaller of the two ranks. A rank counts the directions above the noise floor of the type that
    the data were stored in. Where the ranks add up to more than N - 1, the excess correlations are 1 whatever the data; their
    number is in the column `forced`. Undefined where a rank is N - 1: then all of them are.
    """
    _check_ranks(_ranks(x, y), x.shape[0])
    return _mean_correlation(x.directions.basis_Nd, y.directions.basis_Nd)


def _forced_of_principal(x: Matrix, y: Matrix, *, variance: float = 0.99) -> int:
    return _forced((_principal_count(x, variance), _principal_count(y, variance)), x.shape[0])


@metric("svcca", kind="similarity", needs="rows", symmetric=True, forced=_forced_of_principal)
def svcca(x: Matrix, y: Matrix, *, variance: Annotated[float, Field(gt=0, le=1)] = 0.99) -> float:
    """Mean canonical correlation of the principal directions that hold `variance` of each side's variance.

    Raghu et al., NeurIPS 2017: the fewest directions that hold at least that share; with 1 it is cca. Invariant to rotation
    and scale only. Correlations that are 1 whatever the data are counted as for cca, among the directions that are kept.
    Undefined where the last direction kept and the next one hold equal variance (to the rounding of the stored type), and where
    all N - 1 directions of one side are kept.
    """
    counts = _principal_count(x, variance), _principal_count(y, variance)
    _check_ranks(counts, x.shape[0])
    for side, count in zip((x, y), counts, strict=True):
        scales = side.directions.scales_d
        if count < len(scales) and scales[count - 1] - scales[count] <= side.directions.tie:
            raise Undefined(
                f"principal directions {count} and {count + 1} hold equal variance: no {count} directions are those that "
                f"hold {variance:g} of it"
            )
    first, second = (side.directions.basis_Nd[:, :count] for side, count in zip((x, y), counts, strict=True))
    return _mean_correlation(first, second)


def _principal_count(x: Matrix, variance: float) -> int:
    squares = x.directions.scales_d.square()
    held_from_here_on = squares.flip(0).cumsum(0).flip(0)
    return int((held_from_here_on > (1 - variance) * held_from_here_on[0]).sum())


def _mean_correlation(first: Tensor, second: Tensor) -> float:
    return float(torch.linalg.svdvals(first.mT @ second).clamp(max=1).mean())


@metric("pwcca", kind="similarity", needs="rows", forced=_forced_of_ranks)
def pwcca(x: Matrix, y: Matrix) -> float:
    """Canonical correlations averaged by how much of the smaller side each variate accounts for: 0 to 1.

    sum a_i rho_i / sum a_i, a_i = sum_j |<h_i, x_j>|, x_j the columns and h_i the orthonormal canonical variates of the side
    with fewer dimensions: the lower rank, then the fewer columns, then the first (Morcos et al., NeurIPS 2018). The order
    matters only where both are equal. Of variates of equal correlation (to 1e-8) the data determine nothing but the span:
    they get the weight that they have on average over all orthonormal bases of it. There are such where the two ranks add up
    to more than N - 1: that many correlations are 1 whatever the data; their number is in the column `forced`. Undefined where
    a rank is N - 1 (p >= N): then all of them are. Ranks are those of the data as stored, as for cca.
    """
    _check_ranks(_ranks(x, y), x.shape[0])
    small, large = sorted((x, y), key=lambda side: (len(side.directions.scales_d), side.shape[1]))
    cross = small.directions.basis_Nd.mT @ large.directions.basis_Nd
    variates, correlations, _ = torch.linalg.svd(cross, full_matrices=False)
    correlations = correlations.clamp(max=1)
    weights = _weights(variates.mT @ small.directions.loadings_dp, correlations)
    return min(1.0, float(weights @ correlations / weights.sum()))


def _weights(projections_dp: Tensor, correlations_d: Tensor) -> Tensor:
    """Of each variate; those that are tied share the expectation of their sum over all bases of their span.

    In a span of g dimensions, the first coordinate of a random unit vector is in the mean Gamma(g/2) / (sqrt pi Gamma((g+1)/2))
    by magnitude: 1 for g = 1, where a_i remains, which is nearly always the case.
    """
    distinct_d = correlations_d.diff().abs() > TIE
    if distinct_d.all():
        return projections_dp.abs().sum(1)
    group_d = distinct_d.cumsum(0)
    group_d = torch.cat([group_d.new_zeros(1), group_d])
    sizes = group_d.bincount().double()
    squares = projections_dp.new_zeros(len(sizes), projections_dp.shape[1])
    squares.index_add_(0, group_d, projections_dp.square())
    mean_coordinate = ((sizes / 2).lgamma() - ((sizes + 1) / 2).lgamma()).exp() / math.sqrt(math.pi)
    return (mean_coordinate * squares.sqrt().sum(1))[group_d]


@metric("procrustes", kind="distance", needs="rows", symmetric=True)
def procrustes(x: Matrix, y: Matrix, *, form: Literal["angle", "distance"] = "angle") -> float:
    """Distance after the best rotation, both scaled to unit norm: an angle in radians from 0 to pi/2, or a distance.

    angle arccos norm(X'Y)_*; distance norm(X - Y Q)_F = sqrt(2 - 2 norm(X'Y)_*), from 0 to sqrt 2 (Williams et al., NeurIPS
    2021). Fewer columns are filled up with zeros, which the nuclear norm does not see. Below 1e-7 it is rounding.
    """
    rows, narrow = len(x.centred), min(x.centred.shape[1], y.centred.shape[1])
    cross = Matrix.product(x.centred.mT, y.centred) if rows < narrow else Matrix(x.centred.mT @ y.centred)
    overlap = min(1.0, float(cross.singular_values.sum()))
    return math.acos(overlap) if form == "angle" else math.sqrt(2 - 2 * overlap)


@metric("rsa", kind="similarity", needs="rows", symmetric=True)
def rsa(x: Matrix, y: Matrix) -> float:
    """Representational similarity: rank correlation of the distances between all pairs of rows, -1 to 1.

    Spearman correlation of the Euclidean distances above the diagonal, ties sharing their mean rank (Kriegeskorte et al.,
    2008). Invariant to rotation and scale. Undefined with fewer than 3 rows, or distances that are all equal.
    """
    return min(1.0, max(-1.0, float(x.distance_ranks @ y.distance_ranks)))


@metric("neighbour_overlap", kind="similarity", needs="rows", symmetric=True)
def neighbour_overlap(x: Matrix, y: Matrix, *, k: Annotated[int, Field(ge=1)] = 10) -> float:
    """Share of nearest neighbours in common: mean Jaccard index of the k nearest rows of each row, by cosine; 0 to 1.

    Cosines of centred rows (Klabunde et al., arXiv 2305.06329). Rows as near as the k-th count too, so that the order of rows
    makes no difference. Undefined with k rows or fewer, and where a row is the mean of all. Chance level is about k / (2 N).
    """
    first, second = x.neighbours(k), y.neighbours(k)
    shared, either = (first & second).sum(1).double(), (first | second).sum(1).double()  # integers divide in float32
    return float((shared / either).mean())


@metric(
    "subspace_overlap",
    kind="similarity",
    symmetric=True,
    paired=lambda options: "columns" if options.get("side") == "right" else "rows",
)
def subspace_overlap(
    x: Matrix, y: Matrix, *, k: Annotated[int, Field(ge=1)] = 10, side: Literal["left", "right"] = "left"
) -> float:
    """Mean squared cosine of the principal angles between the spaces of the k top singular vectors, left or right; 0 to 1.

    norm(U'V)_F^2 / k; nothing is centred. Left takes equal numbers of rows, right of columns. Chance level is k over that
    number. Undefined where the rank (above the noise floor of the stored type) is below k, or where the k-th and the next
    singular value are equal (to the rounding of the stored type).
    """
    first, second = (_top_space(matrix, k, side) for matrix in (x, y))
    if len(first) != len(second):
        kind = "rows" if side == "left" else "columns"
        raise Undefined(f"{len(first)} {kind} against {len(second)}: {side} singular vectors take equal numbers")
    return min(1.0, float((first.mT @ second).square().sum()) / k)


def _top_space(x: Matrix, k: int, side: str) -> Tensor:
    values = x.singular_values
    rank = int((values > x.tolerance).sum())
    if rank < k:
        raise Undefined(f"has rank {rank}: there are no {k} top singular vectors")
    if k < len(values) and values[k - 1] - values[k] <= x.tie:
        raise Undefined(f"singular values {k} and {k + 1} are equal: no {k} singular vectors are the top ones")
    return x.singular_spaces[side == "right"][:, :k]
