"""A matrix with permuted rows or columns, from which the chance level of a metric is measured."""

from typing import Literal

import torch
from torch import Tensor

from picolm.analyze.derived import derived
from picolm.analyze.matrix import Directions, Matrix

Axis = Literal["rows", "columns"]


def permute(matrix: Matrix, order: Tensor, axis: Axis = "rows") -> Matrix:
    """Return `matrix` with permuted rows (or columns); quantities that are cached in `matrix` are reused.

    order: of the first dimension if there are not two dimensions, so that the entries of a vector are permuted.
    """
    if len(matrix.dimensions) != 2:
        return Matrix(matrix.entries[order] if matrix.dimensions else matrix.entries)
    return Permuted(matrix, order, axis)


class Permuted(Matrix):
    """A matrix with the rows or columns of `source` in another order; it reuses what was computed of `source`."""

    def __init__(self, source: Matrix, order: Tensor, axis: Axis):
        self.source, self.order, self.axis = source, order, axis
        self.unit, self._noise = source.unit, source._noise

    @property
    def dimensions(self) -> tuple[int, ...]:
        return self.source.dimensions

    @property
    def rank(self) -> int:
        return self.source.rank

    @derived
    def fault(self) -> str | None:
        return self.source.fault

    @derived
    def noise(self) -> float:
        return self.source.noise

    @derived
    def entries(self) -> Tensor:
        return self.source.entries[self.order] if self.axis == "rows" else self.source.entries[:, self.order]

    @derived
    def singular_values(self) -> Tensor:
        return self.source.singular_values

    @derived
    def singular_spaces(self) -> tuple[Tensor, Tensor]:
        left, right = self.source.singular_spaces
        return (left[self.order], right) if self.axis == "rows" else (left, right[self.order])

    @derived
    def frobenius(self) -> float:
        return self.source.frobenius

    @derived
    def points(self) -> Tensor:
        return self.source.points[self.order] if self.axis == "rows" else self.dense()

    @derived
    def _centred_and_norm(self) -> tuple[Tensor, float]:
        if self.axis == "columns":
            return super()._centred_and_norm
        centred, norm = self.source._centred_and_norm
        return centred[self.order], norm

    @derived
    def directions(self) -> Directions:
        known = self.source.directions
        if self.axis == "rows":
            return known._replace(basis_Nd=known.basis_Nd[self.order])
        return known._replace(loadings_dp=known.loadings_dp[:, self.order])

    @derived
    def gram(self) -> Tensor:
        return self.source.gram[self.order][:, self.order] if self.axis == "rows" else self.source.gram

    @derived
    def gram_norm(self) -> float:
        return self.source.gram_norm

    @derived
    def distance_ranks(self) -> Tensor:
        if self.axis == "columns":
            return self.source.distance_ranks
        count = len(self.order)
        first, second = self.order[torch.triu_indices(count, count, offset=1)].sort(0).values
        return self.source.distance_ranks[first * (2 * count - first - 1) // 2 + second - first - 1]

    def neighbours(self, k: int) -> Tensor:
        known = self.source.neighbours(k)
        return known[self.order][:, self.order] if self.axis == "rows" else known
