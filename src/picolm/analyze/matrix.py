"""One matrix and all that metrics share of it: each derived quantity is computed once, when first asked for, in float64.

A `Matrix` is a tensor; a `Product` is a product of two factors that is never formed. Metrics ask either for `singular_values`,
`points`, `basis`, … and do not know which it is. Activations are rows (inputs) by columns (features).

Notation: matrix m x n, product (m x r)(r x n), attainable rank R; activations N x p; d directions of a centred matrix; u the
unit roundoff of the type that the entries were stored in.
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
# Largest and smallest magnitude accepted: squares of products of two stay within float64, and float32 lies within.
LARGEST, SMALLEST = 1e70, 1e-70
# What is stored in 32 bits or less was computed in float32: a sum of products of 768 numbers is off by some 3 u of float32 in the
# root mean square where its storing is off by 0.4 u (measured: rank-8 data turned in float32, 200 x 32 to 2000 x 768).
ARITHMETIC = 4 * 2.0**-24
UNIT = {torch.bfloat16: 2.0**-9}  # half the distance from 1/2 to the next number; of other types that from 1
TIE = 1e-12  # distances closer than this to each other, relative to the largest, differ by rounding
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # kept as they are until entries are asked for

Array = Tensor | np.ndarray
Noise = Callable[[], float]
Stored = tuple[torch.dtype | None, torch.dtype | None]  # of two factors; None: their own


class Undefined(ValueError):
    """A metric has no value for this input. The message is the reason, ready for the table of results."""


class Directions(NamedTuple):
    """Thin singular value decomposition of centred activations, without the directions below the rank tolerance.

    basis_Nd: orthonormal; scales_d: descending; loadings_dp: scales times the orthonormal directions among the features; tie:
    scales that differ by at most this are equal but for rounding, see `Matrix.tie`.
    """

    basis_Nd: Tensor
    scales_d: Tensor
    loadings_dp: Tensor
    tie: float


class Matrix:
    """A tensor seen as a matrix; a vector is one row, and more than two dimensions have entries but no spectrum.

    Derived quantities stay until `release`. Quantities of activations (`centred` and after it) are of centred columns, scaled
    to a Frobenius norm of 1: all that is measured with them is free of scale. Raises `Undefined` where there is no value.
    """

    def __init__(self, tensor: Array, *, stored: torch.dtype | None = None, noise: Noise | None = None):
        """tensor: floating point or integer, a torch tensor on any device or a numpy array.

        stored: the type its entries were rounded to, where that is coarser than its own (a cast of stored weights).
        noise: computes the noise floor, where it does not follow from the entries.
        """
        self._given = _as_tensor(tensor)
        self.unit = _unit(tensor if isinstance(tensor, Tensor) else self._given, stored)
        self._noise = noise

    @staticmethod
    def of(value: "Matrix | Array") -> "Matrix":
        """`value` itself when it is a Matrix, so that its cached quantities are used."""
        return value if isinstance(value, Matrix) else Matrix(value)

    @staticmethod
    def product(left: Array, right: Array, rank: int | None = None, stored: "Stored" = (None, None)) -> "Product":
        """Return the product of left (m x r) and right (r x n), not formed where that can be avoided. rank: at most that
        (default r). stored: the types that the entries of the factors were rounded to (default: their own).
        """
        return Product(left, right, rank, stored)

    @staticmethod
    def sum_of_products(
        pairs: Sequence[tuple[Array, Array]], rank: int | None = None, stored: Sequence["Stored"] = ()
    ) -> "Product":
        """Return the sum of left times right as one product [left left …] [right; right; …]: gO V + O gV has rank 2 r at most.

        stored: as in `product`, for each pair.
        """
        lefts, rights = ([_as_tensor(factor).double() for factor in side] for side in zip(*pairs, strict=True))
        parts = [Product(*pair, stored=types) for pair, types in zip(pairs, stored or repeat((None, None)))]
        summed = Product(torch.cat(lefts, dim=1), torch.cat(rights, dim=0), rank)
        summed._noise = lambda: math.fsum(part.noise for part in parts)
        return summed

    @property
    def dimensions(self) -> tuple[int, ...]:
        """The shape as given; `shape` is that of the matrix."""
        return tuple(self._given.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n); a vector is 1 x n."""
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
        """The noise floor: singular values up to it may be rounding of the stored entries. 2 u rms (sqrt m + sqrt n).

        Rounding changes an entry by at most u of its magnitude, by less than 0.6 u of it in the root mean square, independently
        of the others; a random m x n matrix with entries of standard deviation s has spectral norm s (sqrt m + sqrt n).
        """
        if self._noise is not None:
            return self._noise()
        rows, columns = self.shape
        return 2 * self.unit * self.frobenius * (1 / math.sqrt(rows) + 1 / math.sqrt(columns))

    @derived
    def tolerance(self) -> float:
        """Singular values up to this cannot be told from 0: the noise floor, or max(m, n) eps s_1, the rounding of the result."""
        return max(self.noise, max(self.shape) * EPSILON * float(self.singular_values[0]))

    @derived
    def tie(self) -> float:
        """Singular values that differ by at most this are equal but for rounding: rounding moves each of them by some u rms, not
        by the noise floor, which it moves the largest by; or by max(m, n) eps s_1 where that is more.
        """
        return max(self._tie_of_noise, max(self.shape) * EPSILON * float(self.singular_values[0]))

    @property
    def _tie_of_noise(self) -> float:
        rows, columns = self.shape
        return 2 * self.noise / (math.sqrt(rows) + math.sqrt(columns))

    @derived
    def fault(self) -> str | None:
        """Why nothing can be computed from the entries (none, NaN, infinity), None when all is well."""
        return _fault(self._given)

    @derived
    def entries(self) -> Tensor:
        """All entries in float64, in the shape given. Only metrics of entries ask a product for them, and then it is formed."""
        return self._given.double()

    def dense(self) -> Tensor:
        """The entries as a matrix, float64 [m, n]."""
        return self.entries.reshape(self.shape)

    @derived
    def singular_values(self) -> Tensor:
        """All R of them, descending, float64."""
        return torch.linalg.svdvals(self.dense())

    @derived
    def singular_spaces(self) -> tuple[Tensor, Tensor]:
        """Left [m, R] and right [n, R] singular vectors, by descending singular value; up to sign."""
        left, _, right = torch.linalg.svd(self.dense(), full_matrices=False)
        return left, right.mT

    @derived
    def frobenius(self) -> float:
        return float(torch.linalg.vector_norm(self.entries))

    def dot(self, other: "Matrix") -> float:
        """The sum of the products of entries."""
        return float(self.entries.flatten() @ other.entries.flatten())

    def minus(self, other: "Matrix") -> "Matrix":
        return Matrix(self.entries - other.entries, noise=lambda: self.noise + other.noise)

    @derived
    def points(self) -> Tensor:
        """The rows up to a rotation of the features [N, p]: inner products and distances of rows are those of the matrix."""
        return self.dense()

    @property
    def centred(self) -> Tensor:
        """The points minus their mean, scaled to unit norm."""
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
        if norm <= self.unit * whole:  # rounding alone may have made that much
            raise Undefined(
                "all rows are equal but for the rounding of the stored type: nothing is left after centring"
            )
        return centred / norm, norm

    @derived
    def directions(self) -> Directions:
        """Singular vectors of the centred points above the noise floor, and above max(N, p) eps s_1."""
        basis, scales, features = torch.linalg.svd(self.centred, full_matrices=False)
        norm, computing = self._centred_and_norm[1], max(self.centred.shape) * EPSILON * float(scales[0])
        count = int((scales > max(self.noise / norm, computing)).sum())
        if not count:
            raise Undefined("no direction stands out of the rounding of the stored type")
        loadings = self._in_features(scales[:count, None] * features[:count])
        return Directions(basis[:, :count], scales[:count], loadings, max(self._tie_of_noise / norm, computing))

    def _in_features(self, rows: Tensor) -> Tensor:
        """From the coordinates of `points` to those of the features."""
        return rows

    @derived
    def gram(self) -> Tensor:
        """Inner products of the centred points [N, N]."""
        return self.centred @ self.centred.mT

    @derived
    def gram_norm(self) -> float:
        """Frobenius norm of the Gram matrix, which is that of the p x p one too; from the smaller of the two."""
        rows, columns = self.centred.shape
        product = self.gram if rows < columns else self.centred.mT @ self.centred
        return float(torch.linalg.vector_norm(product))

    @derived
    def squared_lengths(self) -> Tensor:
        """Of the centred points [N]: the diagonal of the Gram matrix."""
        return self.centred.square().sum(1)

    @derived
    def distance_ranks(self) -> Tensor:
        """Ranks of the distances between all pairs of points, ties shared, centred and of unit norm [N (N - 1) / 2]."""
        ranks = _ranks(torch.pdist(self.centred))
        ranks -= ranks.mean()
        norm = torch.linalg.vector_norm(ranks)
        if norm == 0:
            raise Undefined("all pairs of rows are equally far apart: their distances have no order")
        return ranks.div_(norm)

    def neighbours(self, k: int) -> Tensor:
        """Whether point j is among the k nearest of point i by cosine, itself left out; ties at the border all count [N, N]."""
        if k not in self._neighbours:
            rounding = self.unit * torch.linalg.vector_norm(self.points, dim=1) / self._centred_and_norm[1]
            self._neighbours[k] = _neighbours(self.centred, rounding, k)
        return self._neighbours[k]

    @derived
    def _neighbours(self) -> dict[int, Tensor]:
        return {}

    def release(self) -> Self:
        """Forget all derived quantities, the copy in float64 too; they are computed anew when asked for."""
        for name in list(vars(self)):
            if isinstance(getattr(type(self), name, None), derived):
                delattr(self, name)
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({' x '.join(map(str, self.dimensions))})"


class Product(Matrix):
    """left (m x r) times right (r x n), through an r x r core: QR of both factors, and the product of what is not orthogonal."""

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
        """The noise floor: that of each factor times the spectral norm of the other one, which is the effect in first order."""
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
        """Has the singular values of the product; r x r, or less where a factor has fewer rows or columns."""
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
        """Rows of left R' [N, min(r, p)]: with right' = Q R, those of the product are these, turned by Q'."""
        return self.left.double() @ self._right_qr[1].mT

    def _in_features(self, rows: Tensor) -> Tensor:
        return rows @ self._right_qr[0].mT


def _unit(tensor: Tensor, stored: torch.dtype | None) -> float:
    """Return u of the coarser of a tensor's type and `stored`, with ARITHMETIC for all types but float64. Integers are exact.

    u is 2^-24 for float32, 2^-11 for float16, 2^-9 for bfloat16: the floor is 2 to 5 times what storing measures.
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
    # The extremes alone tell: NaN and infinity pass through them, and no tensor of booleans is made.
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
    """Ranks from 0, float64; values that are equal but for rounding share the mean of theirs."""
    ordered, order = values.sort()
    group = torch.zeros_like(order)
    group[1:] = (ordered.diff() > TIE * ordered[-1:]).cumsum(0)
    counts = group.bincount().double()  # integers divide in float32
    mean_ranks = counts.cumsum(0) - (counts + 1) / 2
    return torch.empty(values.shape, dtype=torch.float64).scatter_(0, order, mean_ranks[group])


def _neighbours(centred: Tensor, rounding: Tensor, k: int) -> Tensor:
    """rounding: how far that of the stored type may have moved each row."""
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
