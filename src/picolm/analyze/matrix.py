"""A matrix and the quantities that metrics share. Each quantity is computed once, on first access, in float64.

A `Matrix` wraps a tensor; a `Product` is a product of two factors that is not multiplied out. Metrics ask either of
them for `singular_values`, `points`, `directions`, … in the same way. Activations are rows (inputs) by columns
(features).

Notation: matrix m x n, product (m x r)(r x n), attainable rank R; activations N x p; d directions of a centred matrix;
u the unit roundoff of the type in which the entries were stored.
"""

import math
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from picolm.analyze.derived import derived

EPSILON = torch.finfo(torch.float64).eps
# Largest and smallest accepted magnitude: squares of products of two stay within float64. They include all of float32.
LARGEST, SMALLEST = 1e70, 1e-70
# What is stored in 32 bits or less was computed in float32: the root mean square error of a dot product of 768 numbers
# is about 3 u of float32, that of storing it 0.4 u (measured: rank-8 data rotated in float32, 200 x 32 to 2000 x 768).
ARITHMETIC = 4 * 2.0**-24
UNIT = {torch.bfloat16: 2.0**-9}  # half the distance from 1/2 to the next number; for other types, from 1
TIE = 1e-12  # distances that differ by less than this, relative to the largest, differ by rounding only
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # kept as they are until `entries` is accessed

Array = Tensor | np.ndarray
Noise = Callable[[], float]
Stored = tuple[torch.dtype | None, torch.dtype | None]  # of two factors as stored; None: their own


class Undefined(ValueError):
    """A metric has no value for this input. The message is the reason, as the table of results shows it."""


class Directions(NamedTuple):
    """Thin singular value decomposition of centred activations, without the directions below the rank tolerance.

    basis_Nd: orthonormal; scales_d: descending; loadings_dp: scales times orthonormal directions in the space of
    features; tie: scales that differ by at most this are equal up to rounding, see `Matrix.tie`.
    """

    basis_Nd: Tensor
    scales_d: Tensor
    loadings_dp: Tensor
    tie: float


class Matrix:
    """A tensor seen as a matrix. A vector is one row; a tensor of more than two dimensions has entries but no spectrum.

    Derived quantities are cached until `release`. Quantities of activations (`centred` and those after it) are of
    centred columns, scaled to a Frobenius norm of 1, so that nothing measured with them depends on scale. Raises
    `Undefined` where there is no value.
    """

    def __init__(self, tensor: Array, *, stored: torch.dtype | None = None, noise: Noise | None = None):
        """Wrap a floating-point or integer tensor: a torch tensor on any device, or a numpy array.

        stored: the type to which its entries were rounded, if that is coarser than its own (a cast of stored weights).
        noise: a function that returns the noise floor, if that does not follow from the entries.
        """
        self._given = _as_tensor(tensor)
        self.unit = _unit(tensor if isinstance(tensor, Tensor) else self._given, stored)
        self._noise = noise

    @staticmethod
    def of(value: "Matrix | Array") -> "Matrix":
        """Return `value` itself if it is a Matrix, so that its cached quantities are used; else a new Matrix."""
        return value if isinstance(value, Matrix) else Matrix(value)

    @staticmethod
    def product(left: Array, right: Array, rank: int | None = None, stored: "Stored" = (None, None)) -> "Product":
        """Return the product of left (m x r) and right (r x n), multiplied out only if unavoidable. rank: an upper
        bound of its rank (default r). stored: the types to which the entries of the factors were rounded (default:
        their own).
        """
        return Product(left, right, rank, stored)

    @staticmethod
    def sum_of_products(
        pairs: Sequence[tuple[Array, Array]], rank: int | None = None, stored: Sequence["Stored"] = ()
    ) -> "Product":
        """Return the sum of left times right as one product [left left …] [right; right; …]. Example: gO V + O gV has a
        rank of at most 2 r.

        stored: as in `product`, for each pair.
        """
        lefts, rights = ([_as_tensor(factor).double() for factor in side] for side in zip(*pairs, strict=True))
        parts = [Product(*pair, stored=types) for pair, types in zip(pairs, stored or repeat((None, None)))]
        summed = Product(torch.cat(lefts, dim=1), torch.cat(rights, dim=0), rank)
        summed._noise = lambda: math.fsum(part.noise for part in parts)
        return summed

    @property
    def dimensions(self) -> tuple[int, ...]:
        """The shape as given; `shape` is the shape of the matrix."""
        return tuple(self._given.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n); a vector is 1 x n. Raises `Undefined` for more than two dimensions."""
        if len(self.dimensions) > 2:
            raise Undefined(f"has {len(self.dimensions)} dimensions {self.dimensions}; a matrix has two")
        rows, columns = (1, 1, *self.dimensions)[-2:]
        return rows, columns

    @property
    def rank(self) -> int:
        """The attainable rank R: min(m, n), or less for a product."""
        return min(self.shape)

    @derived
    def noise(self) -> float:
        """The noise floor 2 u rms (sqrt m + sqrt n): singular values up to it may be rounding of the stored entries.

        Rounding changes an entry by at most u of its magnitude, by less than 0.6 u of it in the root mean square,
        independently of other entries; a random m x n matrix with entries of standard deviation s has spectral norm s
        (sqrt m + sqrt n).
        """
        if self._noise is not None:
            return self._noise()
        rows, columns = self.shape
        return 2 * self.unit * self.frobenius * (1 / math.sqrt(rows) + 1 / math.sqrt(columns))

    @derived
    def tolerance(self) -> float:
        """Singular values up to this cannot be distinguished from 0: the noise floor, or max(m, n) eps s_1, the
        rounding of the decomposition, if that is larger.
        """
        return max(self.noise, max(self.shape) * EPSILON * float(self.singular_values[0]))

    @derived
    def tie(self) -> float:
        """Singular values that differ by at most this are equal up to rounding. It is a few u rms, by which rounding
        moves a singular value, and not the noise floor, which is the bound of that change; or max(m, n) eps s_1, if
        that is larger.
        """
        return max(self._tie_of_noise, max(self.shape) * EPSILON * float(self.singular_values[0]))

    @property
    def _tie_of_noise(self) -> float:
        rows, columns = self.shape
        return 2 * self.noise / (math.sqrt(rows) + math.sqrt(columns))

    @derived
    def fault(self) -> str | None:
        """Why nothing can be computed from the entries (none, NaN, infinity, out of range), None if they are valid."""
        return _fault(self._given)

    @derived
    def entries(self) -> Tensor:
        """All entries in float64, in the shape given. A product is multiplied out here, for metrics of entries only."""
        return self._given.double()

    def dense(self) -> Tensor:
        """Return the entries as a matrix, float64 [m, n]."""
        return self.entries.reshape(self.shape)

    @derived
    def singular_values(self) -> Tensor:
        """All R singular values, descending, float64."""
        return torch.linalg.svdvals(self.dense())

    @derived
    def singular_spaces(self) -> tuple[Tensor, Tensor]:
        """Left [m, R] and right [n, R] singular vectors, by descending singular value; their signs are arbitrary."""
        left, _, right = torch.linalg.svd(self.dense(), full_matrices=False)
        return left, right.mT

    @derived
    def frobenius(self) -> float:
        return float(torch.linalg.vector_norm(self.entries))

    def dot(self, other: "Matrix") -> float:
        """Return the sum of the products of the entries of both."""
        return float(self.entries.flatten() @ other.entries.flatten())

    def minus(self, other: "Matrix") -> "Matrix":
        return Matrix(self.entries - other.entries, noise=lambda: self.noise + other.noise)

    @derived
    def points(self) -> Tensor:
        """The rows up to a rotation of the features [N, p]; inner products and distances are those of the matrix."""
        return self.dense()

    @property
    def centred(self) -> Tensor:
        """The points minus their mean, scaled to unit norm [N, p]."""
        return self._centred_and_norm[0]

    @derived
    def _centred_and_norm(self) -> tuple[Tensor, float]:
        points = self.points
        if len(points) < 2:
            raise Undefined(f"has {len(points)} row; activations are rows (inputs) by columns (features), two at least")
        centred = points - points.mean(0)
        norm, whole = float(torch.linalg.vector_norm(centred)), float(torch.linalg.vector_norm(points))
        if norm <= len(points) * EPSILON * whole:
            raise Undefined("all rows are equal: nothing is left after centring")
        if norm <= self.unit * whole:  # rounding alone can be this large
            raise Undefined(
                "all rows are equal but for the rounding of the stored type: nothing is left after centring"
            )
        return centred / norm, norm

    @derived
    def directions(self) -> Directions:
        """Singular vectors of the centred points, those above the noise floor and above max(N, p) eps s_1."""
        basis, scales, features = torch.linalg.svd(self.centred, full_matrices=False)
        norm, computing = self._centred_and_norm[1], max(self.centred.shape) * EPSILON * float(scales[0])
        count = int((scales > max(self.noise / norm, computing)).sum())
        if not count:
            raise Undefined("no direction stands out of the rounding of the stored type")
        loadings = self._in_features(scales[:count, None] * features[:count])
        return Directions(basis[:, :count], scales[:count], loadings, max(self._tie_of_noise / norm, computing))

    def _in_features(self, rows: Tensor) -> Tensor:
        """Return `rows`, in the coordinates of `points`, in those of the features."""
        return rows

    @derived
    def gram(self) -> Tensor:
        """Inner products of the centred points [N, N]."""
        return self.centred @ self.centred.mT

    @derived
    def gram_norm(self) -> float:
        """Frobenius norm of the Gram matrix, N x N or p x p (they are equal); computed from the smaller one."""
        rows, columns = self.centred.shape
        product = self.gram if rows < columns else self.centred.mT @ self.centred
        return float(torch.linalg.vector_norm(product))

    @derived
    def squared_lengths(self) -> Tensor:
        """Squared lengths of the centred points [N]: the diagonal of the Gram matrix."""
        return self.centred.square().sum(1)

    @derived
    def distance_ranks(self) -> Tensor:
        """Ranks of the distances between all pairs of points, ties averaged, centred, unit norm [N (N - 1) / 2]."""
        ranks = _ranks(torch.pdist(self.centred))
        ranks -= ranks.mean()
        norm = torch.linalg.vector_norm(ranks)
        if norm == 0:
            raise Undefined("all pairs of rows are equally far apart: their distances have no order")
        return ranks.div_(norm)

    def neighbours(self, k: int) -> Tensor:
        """Return whether point j is among the k nearest of point i by cosine, without i itself [N, N]. All points that
        are tied with the k-th count.
        """
        if k not in self._neighbours:
            rounding = self.unit * torch.linalg.vector_norm(self.points, dim=1) / self._centred_and_norm[1]
            self._neighbours[k] = _neighbours(self.centred, rounding, k)
        return self._neighbours[k]

    @derived
    def _neighbours(self) -> dict[int, Tensor]:
        return {}

    def release(self) -> Self:
        """Delete all cached quantities and the float64 copy; they are computed again on access. Returns self."""
        for name in list(vars(self)):
            if isinstance(getattr(type(self), name, None), derived):
                delattr(self, name)
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({' x '.join(map(str, self.dimensions))})"


class Product(Matrix):
    """left (m x r) times right (r x n), not multiplied out: QR of both factors leaves an r x r core with the same
    singular values.
    """

    def __init__(self, left: Array, right: Array, rank: int | None = None, stored: "Stored" = (None, None)):
        self.left, self.right = _as_tensor(left), _as_tensor(right)
        factors = zip((left, right), (self.left, self.right), stored)
        self._units = [_unit(value if isinstance(value, Tensor) else tensor, kind) for value, tensor, kind in factors]
        self.unit, self._noise = max(self._units), None
        if self.left.ndim != 2 or self.right.ndim != 2 or self.left.shape[1] != self.right.shape[0]:
            raise ValueError(f"{tuple(self.left.shape)} times {tuple(self.right.shape)} is not a product of matrices")
        self._rank = rank

    @property
    def dimensions(self) -> tuple[int, ...]:
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        attainable = min(*self.left.shape, self.right.shape[1])
        return attainable if self._rank is None else min(self._rank, attainable)

    @derived
    def fault(self) -> str | None:
        return _fault(self.left, self.right)

    @derived
    def entries(self) -> Tensor:
        return self.left.double() @ self.right.double()

    @derived
    def noise(self) -> float:
        """The noise floor: that of each factor times the spectral norm of the other one, its effect in first order."""
        if self._noise is not None:
            return self._noise()
        floors, largest = [], []
        for factor, unit, triangle in zip(
            (self.left, self.right), self._units, (self._left_triangle, self._right_qr[1]), strict=True
        ):
            size, norm = sum(1 / math.sqrt(side) for side in factor.shape), float(torch.linalg.vector_norm(triangle))
            floors.append(2 * unit * norm * size)
            largest.append(float(torch.linalg.matrix_norm(triangle, 2)))
        return floors[0] * largest[1] + largest[0] * floors[1]

    @derived
    def _left_triangle(self) -> Tensor:
        return torch.linalg.qr(self.left.double(), mode="r").R

    @derived
    def _right_qr(self) -> tuple[Tensor, Tensor]:
        q, r = torch.linalg.qr(self.right.double().mT)
        return q, r

    @derived
    def core(self) -> Tensor:
        """A matrix with the singular values of the product; r x r, or smaller if a factor has fewer rows or columns."""
        return self._left_triangle @ self._right_qr[1].mT

    @derived
    def singular_values(self) -> Tensor:
        return torch.linalg.svdvals(self.core)[: self.rank]

    @derived
    def singular_spaces(self) -> tuple[Tensor, Tensor]:
        q_left, triangle = torch.linalg.qr(self.left.double())
        q_right, triangle_right = self._right_qr
        left, _, right = torch.linalg.svd(triangle @ triangle_right.mT, full_matrices=False)
        return (q_left @ left)[:, : self.rank], (q_right @ right.mT)[:, : self.rank]

    @derived
    def frobenius(self) -> float:
        return float(torch.linalg.vector_norm(self.core))

    def dot(self, other: Matrix) -> float:
        if not isinstance(other, Product):
            return super().dot(other)
        lefts = self.left.double().mT @ other.left.double()
        return float((lefts * (self.right.double() @ other.right.double().mT)).sum())

    def minus(self, other: Matrix) -> Matrix:
        if not isinstance(other, Product):
            return super().minus(other)
        difference = Matrix.sum_of_products([(self.left, self.right), (-other.left, other.right)])
        difference._noise = lambda: self.noise + other.noise
        return difference

    @derived
    def points(self) -> Tensor:
        """The matrix left R' [N, min(r, p)], with right' = Q R: the rows of the product are these times Q'."""
        return self.left.double() @ self._right_qr[1].mT

    def _in_features(self, rows: Tensor) -> Tensor:
        return rows @ self._right_qr[0].mT


def _unit(tensor: Tensor, stored: torch.dtype | None) -> float:
    """Return u of the coarser of the tensor's type and `stored`, plus ARITHMETIC for all types but float64. Integers
    are exact.

    u is 2^-24 for float32, 2^-11 for float16, 2^-9 for bfloat16: the noise floor is 2 to 5 times the measured effect of
    storing.
    """
    types = [kind for kind in (tensor.dtype, stored, torch.float64) if kind is not None and kind.is_floating_point]
    coarsest = max(UNIT.get(kind, torch.finfo(kind).eps / 2) for kind in types)
    return coarsest if coarsest < EPSILON else coarsest + ARITHMETIC


def _as_tensor(value: Any) -> Tensor:
    tensor = value.detach().cpu() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    if tensor.is_complex():
        raise TypeError(f"a tensor of {tensor.dtype} has no metrics here; give its real and imaginary parts")
    return tensor if tensor.dtype in _FLOATS else tensor.double()


def _fault(*tensors: Tensor) -> str | None:
    if any(tensor.numel() == 0 for tensor in tensors):
        return "holds no entries"
    # The maxima are enough: NaN and infinity propagate to them, and no tensor of booleans is allocated.
    largest = [float(tensor.abs().max()) for tensor in tensors]
    if all(value == 0 or SMALLEST <= value <= LARGEST for value in largest):
        return None
    total = sum(tensor.numel() for tensor in tensors)
    for name, test in (("NaN", torch.isnan), ("infinity", torch.isinf)):
        count = sum(int(test(tensor).sum()) for tensor in tensors)
        if count:
            return f"holds {name} at {count} of {total} entries"
    extreme = max(largest) if max(largest) > LARGEST else min(filter(None, largest))
    return f"has {extreme:.0e} for its largest entry: beyond what can be squared in float64; rescale it"


def _ranks(values: Tensor) -> Tensor:
    """Return ranks from 0, float64; values that are equal up to rounding share their mean rank."""
    ordered, order = values.sort()
    group = torch.zeros_like(order)
    group[1:] = (ordered.diff() > TIE * ordered[-1:]).cumsum(0)
    counts = group.bincount().double()  # integers divide in float32
    mean_ranks = counts.cumsum(0) - (counts + 1) / 2
    return torch.empty(values.shape, dtype=torch.float64).scatter_(0, order, mean_ranks[group])


def _neighbours(centred: Tensor, rounding: Tensor, k: int) -> Tensor:
    """Return `Matrix.neighbours`. rounding: how far rounding to the stored type may have moved each row [N]."""
    if k >= len(centred):
        raise Undefined(f"has {len(centred)} rows; {k} neighbours of a row take {k + 1} at least")
    lengths = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    nowhere = lengths[:, 0] <= rounding.clamp(min=len(centred) * EPSILON)
    if nowhere.any():
        raise Undefined(f"row {int(nowhere.int().argmax())} is the mean of all rows: it has no direction")
    directions = centred / lengths
    cosines = (directions @ directions.mT).fill_diagonal_(-torch.inf)
    border = cosines.topk(k, dim=1).values[:, -1:]
    return cosines >= border - centred.shape[1] * EPSILON  # equal rows may differ in the last bit
