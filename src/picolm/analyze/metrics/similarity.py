"""Metrics that compare two representations of the same inputs.

Rows are inputs, the same in both matrices. Columns are features; their numbers may differ. All but subspace_overlap
centre the columns first. Other matrices whose rows correspond, such as two weight matrices with the same output space,
can be compared too.

Notation: X [N, p] and Y [N, q], centred; canonical correlations rho_1 >= rho_2 >= …
"""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from picolm.analyze.matrix import EPSILON, Matrix, Undefined
from picolm.analyze.metrics.metric import metric

# If canonical correlations differ by less than this, the data determine only the span of their variates.
TIE = 1e-8


@metric("cka", kind="similarity", needs="rows", symmetric=True)
def cka(x: Matrix, y: Matrix, *, debiased: bool = False) -> float:
    """Centred kernel alignment (CKA) with a linear kernel: 0 to 1, invariant to rotation and scale.

    norm(Y'X)_F^2 / (norm(X'X)_F norm(Y'Y)_F) (Kornblith et al., ICML 2019). debiased: use the U-statistic of HSIC (Song
    et al., JMLR 2012), which is near 0 for independent data, where the biased one grows with p / N; it can be negative,
    and needs 4 rows. Undefined if all rows are equal; if debiased, also if they are equally far apart.
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
    """Return norm(Y'X)_F^2, which is also the sum of products of the entries of the N x N Gram matrices; the smaller
    matrices are used.
    """
    if len(x.centred) < max(x.centred.shape[1], y.centred.shape[1]):
        return float(x.gram.flatten() @ y.gram.flatten())
    return float((y.centred.mT @ x.centred).square().sum())


def _debiased_hsic(cross: float, x: Matrix, y: Matrix) -> float:
    """Return the U-statistic times N (N - 3) for the Gram matrices K and L of centred rows, without forming them.

    cross: norm(Y'X)_F^2. K~ and L~ are K and L without their diagonals k and l. The rows of K and L sum to 0, so
    tr(K~L~) = norm(Y'X)_F^2 - k.l, 1'K~1 = -sum k and 1'K~L~1 = k.l. Centring the rows does not change the U-statistic.
    """
    rows, k, l = len(x.centred), x.squared_lengths, y.squared_lengths  # noqa: E741
    diagonal = float(k @ l)
    return cross - diagonal + float(k.sum() * l.sum()) / ((rows - 1) * (rows - 2)) - 2 * diagonal / (rows - 2)


def _forced(ranks: tuple[int, int], rows: int) -> int:
    """Return how many canonical correlations are 1 whatever the data: two spaces of these dimensions within the N - 1
    dimensions of centred rows share at least that many directions.
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
    """Mean canonical correlation: 0 to 1, invariant to any invertible linear map of the features.

    The mean is over as many correlations as the smaller of the two ranks. A rank counts the directions above the noise
    floor of the type in which the data were stored. Where the ranks add up to more than N - 1, the excess correlations
    are 1 whatever the data; the column `forced` has their number. Undefined where a rank is N - 1, since then all
    correlations are 1.
    """
    _check_ranks(_ranks(x, y), x.shape[0])
    return _mean_correlation(x.directions.basis_Nd, y.directions.basis_Nd)


def _forced_of_principal(x: Matrix, y: Matrix, *, variance: float = 0.99) -> int:
    return _forced((_principal_count(x, variance), _principal_count(y, variance)), x.shape[0])


@metric("svcca", kind="similarity", needs="rows", symmetric=True, forced=_forced_of_principal)
def svcca(x: Matrix, y: Matrix, *, variance: Annotated[float, Field(gt=0, le=1)] = 0.99) -> float:
    """Mean canonical correlation of the top principal directions that hold the share `variance` of the variance.

    Keeps on each side the fewest directions that hold at least that share (Raghu et al., NeurIPS 2017); with 1 it is
    cca. Invariant to rotation and scale only. Correlations that are 1 whatever the data are counted as in cca, among
    the kept directions. Undefined where the last kept direction and the next one hold equal variance (up to the
    rounding of the stored type), and where all N - 1 directions of one side are kept.
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
    """Mean canonical correlation, weighted by how much of the smaller side each variate accounts for: 0 to 1.

    sum a_i rho_i / sum a_i, a_i = sum_j |<h_i, x_j>|, x_j the columns and h_i the orthonormal canonical variates of the
    smaller side: the one with the lower rank, else with fewer columns, else the first (Morcos et al., NeurIPS 2018).
    The order matters only if rank and columns are equal. Of variates with equal correlation (up to 1e-8) the data
    determine only the span: they get the mean weight over all orthonormal bases of it. This occurs where the two ranks
    add up to more than N - 1: the excess correlations are 1 whatever the data; the column `forced` has their number.
    Undefined where a rank is N - 1 (p >= N), since then all correlations are 1. Ranks are counted as in cca.
    """
    _check_ranks(_ranks(x, y), x.shape[0])
    small, large = sorted((x, y), key=lambda side: (len(side.directions.scales_d), side.shape[1]))
    cross = small.directions.basis_Nd.mT @ large.directions.basis_Nd
    variates, correlations, _ = torch.linalg.svd(cross, full_matrices=False)
    correlations = correlations.clamp(max=1)
    weights = _weights(variates.mT @ small.directions.loadings_dp, correlations)
    return min(1.0, float(weights @ correlations / weights.sum()))


def _weights(projections_dp: Tensor, correlations_d: Tensor) -> Tensor:
    """Return the weight of each variate; tied variates get its expectation over all bases of their span.

    In a span of g dimensions, the absolute first coordinate of a random unit vector has the mean Gamma(g/2) / (sqrt pi
    Gamma((g+1)/2)). It is 1 for g = 1, which is nearly always the case; the weight is then a_i.
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
    """Procrustes distance of two matrices at unit norm, after the best rotation: an angle in radians or a distance.

    angle: arccos norm(X'Y)_*, from 0 to pi/2; distance: norm(X - Y Q)_F = sqrt(2 - 2 norm(X'Y)_*), from 0 to sqrt 2
    (Williams et al., NeurIPS 2021). The side with fewer columns is padded with zeros, which does not change the nuclear
    norm. Values below 1e-7 are rounding.
    """
    rows, narrow = len(x.centred), min(x.centred.shape[1], y.centred.shape[1])
    cross = Matrix.product(x.centred.mT, y.centred) if rows < narrow else Matrix(x.centred.mT @ y.centred)
    overlap = min(1.0, float(cross.singular_values.sum()))
    return math.acos(overlap) if form == "angle" else math.sqrt(2 - 2 * overlap)


@metric("rsa", kind="similarity", needs="rows", symmetric=True)
def rsa(x: Matrix, y: Matrix) -> float:
    """Representational similarity: rank correlation of the distances between all pairs of rows, -1 to 1.

    Spearman correlation of the Euclidean distances above the diagonal, with mean ranks for ties (Kriegeskorte et al.,
    2008). Invariant to rotation and scale. Undefined with fewer than 3 rows, and if all distances are equal.
    """
    return min(1.0, max(-1.0, float(x.distance_ranks @ y.distance_ranks)))


@metric("neighbour_overlap", kind="similarity", needs="rows", symmetric=True)
def neighbour_overlap(x: Matrix, y: Matrix, *, k: Annotated[int, Field(ge=1)] = 10) -> float:
    """Shared nearest neighbours: mean Jaccard index of the k nearest rows of each row, by cosine; 0 to 1.

    Cosines are of centred rows (Klabunde et al., arXiv 2305.06329). All rows tied with the k-th nearest count, so that
    the order of rows does not matter. Undefined with k rows or fewer, and where a row equals the mean of all rows. The
    chance level is about k / (2 N).
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
    """Mean squared cosine of the principal angles between the spans of the top k singular vectors: 0 to 1.

    norm(U'V)_F^2 / k; nothing is centred. side: left or right singular vectors; left needs equal numbers of rows, right
    of columns. The chance level is k divided by that number. Undefined where the rank (above the noise floor of the
    stored type) is below k, or where singular values k and k + 1 are equal (up to the rounding of the stored type).
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
