"""What rounding of the stored type makes of a matrix is not taken for signal, and signal is not taken for rounding."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from picolm.analyze.matrix import Matrix, Undefined
from picolm.analyze.metrics import (
    cca,
    condition_number,
    neighbour_overlap,
    pwcca,
    spectral_alpha,
    subspace_overlap,
    svcca,
)

TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
short = {torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
types = pytest.mark.parametrize("dtype", TYPES, ids=short.get)
pairs = pytest.mark.parametrize(
    ("dtype", "other"), list(itertools.product(TYPES, TYPES)), ids=lambda dtype: short[dtype]
)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(2, 80), columns=st.integers(2, 80), scale=st.floats(0.01, 100))
@types
def test_rounding_stays_below_the_floor_and_the_floor_near_it(
    normal: Any, dtype: torch.dtype, seed: int, rows: int, columns: int, scale: float
) -> None:
    x = (scale * normal(seed, rows, columns)).to(torch.float32 if dtype == torch.float64 else torch.float64)
    if dtype != torch.float64:
        rounding = torch.linalg.matrix_norm(x.to(dtype).double() - x, 2)
        assert rounding < Matrix(x.to(dtype)).noise < 400 * rounding
    exact = 2 * 2.0**-53 * x.double().square().mean().sqrt() * (math.sqrt(rows) + math.sqrt(columns))
    assert Matrix(x.double()).noise == pytest.approx(float(exact))


@pytest.mark.slow
@pairs
@pytest.mark.parametrize(("rows", "columns", "rank"), [(200, 32, 8), (300, 200, 8), (64, 60, 3)])
def test_data_of_low_rank_are_alike_their_rotated_copy(
    normal: Any, orthogonal: Any, dtype: torch.dtype, other: torch.dtype, rows: int, columns: int, rank: int
) -> None:
    x = normal(1, rows, rank) @ normal(2, rank, columns)
    stored, copy = x.to(dtype), (x @ orthogonal(3, columns)).to(other)
    assert [len(Matrix(side).directions.scales_d) for side in (stored, copy)] == [rank, rank]
    for metric in (cca, svcca, pwcca):
        assert metric(stored, copy) == pytest.approx(1, abs=1e-4 if torch.bfloat16 in (dtype, other) else 1e-6)


@types
def test_a_rotation_that_was_computed_in_the_stored_type_changes_no_rank(
    normal: Any, orthogonal: Any, dtype: torch.dtype
) -> None:
    x = (normal(1, 400, 8) @ normal(2, 8, 256)).to(dtype)
    assert cca(x, x @ orthogonal(3, 256).to(dtype)) == pytest.approx(1, abs=1e-4)


@types
def test_data_of_full_rank_keep_it(normal: Any, dtype: torch.dtype) -> None:
    x = normal(0, 400, 100).to(dtype)
    assert len(Matrix(x).directions.scales_d) == 100
    assert condition_number(x) == pytest.approx(float(torch.linalg.cond(x.double())), rel=1e-6)
    smallest = math.log10(max(40 * torch.finfo(dtype).eps, 1e-10))
    faint = x.double() @ torch.diag(torch.logspace(0, smallest, 100, dtype=torch.float64))
    assert len(Matrix(faint).directions.scales_d) == 100  # the same data, had they been stored in float64


@pytest.mark.parametrize("stored", list(itertools.product(TYPES[1:], TYPES[1:])), ids=lambda kinds: f"{kinds}")
def test_a_product_has_the_rank_of_its_factors_as_stored(normal: Any, stored: Any) -> None:
    """Values of rank 5 through an output projection: the rank of what a head writes is 5, however the factors are stored."""
    values, projection = (normal(1, 120, 5) @ normal(2, 5, 16)).to(stored[0]), normal(3, 16, 48).to(stored[1])
    product = Matrix.product(values, projection)
    assert len(product.directions.scales_d) == 5
    cast = Matrix.product(values.double(), projection.double(), stored=stored)
    assert cast.noise == pytest.approx(product.noise)
    for one in (product, cast):
        assert cca(one, product.dense().to(stored[0])) == pytest.approx(1, abs=1e-3)
    summed = Matrix.sum_of_products([(values.double(), projection.double())] * 2, stored=[stored] * 2)
    assert summed.noise == pytest.approx(2 * product.noise)


@types
def test_a_cast_keeps_the_noise_floor_of_what_was_stored(normal: Any, dtype: torch.dtype) -> None:
    x = (normal(1, 90, 4) @ normal(2, 4, 30)).to(dtype)
    assert Matrix(x.double(), stored=dtype).noise == pytest.approx(Matrix(x).noise)
    assert len(Matrix(x.double(), stored=dtype).directions.scales_d) == 4
    assert Matrix(x).minus(Matrix(x)).noise == pytest.approx(2 * Matrix(x).noise)


@types
def test_whatever_divides_by_small_singular_values_takes_rounding_for_none(normal: Any, dtype: torch.dtype) -> None:
    x = (normal(1, 90, 55) @ normal(2, 55, 80)).to(dtype)
    with pytest.raises(Undefined, match="singular value 61 is 0 or rounding of the stored type"):
        spectral_alpha(x, k=60)
    with pytest.raises(Undefined, match="has rank 55: there are no 60 top singular vectors"):
        subspace_overlap(x, x, k=60)
    assert spectral_alpha(x, k=50) == pytest.approx(spectral_alpha(x.double(), k=50))
    assert subspace_overlap(x, x, k=50) == pytest.approx(1)


@pytest.mark.parametrize("dtype", TYPES[1:], ids=short.get)
def test_what_is_nothing_but_rounding_has_no_value(normal: Any, dtype: torch.dtype) -> None:
    flat = (100 + torch.finfo(dtype).eps * normal(0, 40, 6)).to(dtype)
    flat[0, 0] = 100 * (1 + torch.finfo(dtype).eps)  # one entry to the next number
    with pytest.raises(Undefined, match="all rows are equal but for the rounding of the stored type"):
        cca(flat, normal(1, 40, 6))
    x = (1 + 0.1 * normal(2, 40, 6)).to(dtype)
    for _ in range(20):
        x[7] = x.double().mean(0).to(dtype)
    with pytest.raises(Undefined, match="row 7 is the mean of all rows"):
        neighbour_overlap(x, normal(1, 40, 6), k=3)


@types
def test_principal_directions_that_are_tied_are_not_chosen_between(
    normal: Any, orthogonal: Any, dtype: torch.dtype
) -> None:
    basis = torch.linalg.qr(normal(0, 80, 6) - normal(0, 80, 6).mean(0)).Q
    tied = ((basis * torch.tensor([5.0, 3.0, 3.0, 1.0, 0.5, 0.1])) @ orthogonal(1, 6)).to(dtype)  # 25, 9, 9 of 44.26
    with pytest.raises(
        Undefined, match=r"^principal directions 2 and 3 hold equal variance: no 2 directions are those that hold 0\.7"
    ):
        svcca(tied, normal(2, 80, 6), variance=0.7)
    for variance in (0.5, 0.9, 1.0):  # cuts beside the tie
        assert svcca(tied, tied.double() @ orthogonal(3, 6), variance=variance) == pytest.approx(1, abs=1e-4)
