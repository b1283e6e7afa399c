"""The order of rows is a permutation for every pass, a pure function, and costs nothing to enter anywhere."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from picolm.data.batches import permute, rows_in_order


@given(size=st.integers(1, 3000), seed=st.integers(-(2**63), 2**63), number=st.integers(0, 10**9))
def test_every_pass_is_a_permutation(size: int, seed: int, number: int) -> None:
    images = permute(np.arange(size), size, seed, "order", number)
    assert np.array_equal(np.sort(images), np.arange(size))


@pytest.mark.slow
@given(size=st.integers(10**6, 2**40), seed=st.integers(0, 100))
def test_a_part_of_a_large_permutation_stays_inside_and_repeats_nothing(size: int, seed: int) -> None:
    indices = np.unique(np.linspace(0, size - 1, 500).astype(np.int64))
    images = permute(indices, size, seed, "order", 1)
    assert len(np.unique(images)) == len(indices)
    assert images.min() >= 0
    assert images.max() < size


@given(size=st.integers(2, 500), start=st.integers(0, 2000), count=st.integers(1, 40), shuffle=st.booleans())
def test_a_position_has_its_row_whatever_is_asked_beside_it(size: int, start: int, count: int, shuffle: bool) -> None:
    together = rows_in_order(np.arange(start, start + count), size, seed=3, shuffle=shuffle)
    alone = [int(rows_in_order(np.array([p]), size, seed=3, shuffle=shuffle)[0]) for p in range(start, start + count)]
    assert together.tolist() == alone


def test_the_first_pass_is_the_order_on_disk_and_later_ones_are_not() -> None:
    size = 1000
    passes = rows_in_order(np.arange(4 * size), size, seed=0, shuffle=False).reshape(4, size)
    assert np.array_equal(passes[0], np.arange(size))
    assert all(np.array_equal(np.sort(one), np.arange(size)) for one in passes)
    assert len({one.tobytes() for one in passes}) == 4


def test_shuffle_permutes_the_first_pass_by_the_seed() -> None:
    orders = [rows_in_order(np.arange(1000), 1000, seed=seed, shuffle=True) for seed in (0, 0, 1)]
    assert np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2])
    assert not np.array_equal(orders[0], np.arange(1000))


@pytest.mark.slow
@pytest.mark.parametrize("size", [5, 7, 16])
def test_each_row_comes_first_equally_often(size: int) -> None:
    trials = 1500
    images = np.array([permute(np.arange(size), size, seed, "order", 1) for seed in range(trials)])
    counts = np.stack([np.bincount(images[:, place], minlength=size) for place in range(size)])
    expected = trials / size
    chi_squared = ((counts - expected) ** 2 / expected).sum() / (size - 1) ** 2
    assert chi_squared < 2  # about 1 for independent uniform permutations


def test_golden_order() -> None:
    assert permute(np.arange(12), 12, 42, "order", 1).tolist() == [9, 1, 11, 2, 4, 10, 3, 5, 6, 7, 0, 8]
