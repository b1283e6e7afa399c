"""The batch of a step is a function of its number."""

import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from picolm.data.batches import Batches
from picolm.errors import DataError

SMALL = {"rows_per_step": 12, "seed": 7, "length": 8, "vocab_size": 1000}


def in_global_order(ranks: list[Batches], step: int) -> torch.Tensor:
    """The whole batch of a step put together from all processes."""
    whole = torch.full((12, 9), -1, dtype=torch.int64)
    for batches in ranks:
        for places, tokens_BT in zip(batches.rank_rows(step), batches(step)):
            whole[torch.from_numpy(places)] = tokens_BT
    return whole


@pytest.mark.slow
@given(
    step=st.integers(0, 60),
    split=st.sampled_from([(1, 2), (2, 1), (2, 3), (3, 1), (4, 3), (6, 2), (12, 1), (1, 12)]),
    shuffle=st.booleans(),
)
def test_any_number_of_ranks_and_micro_batches_sees_the_same_batch(
    make_source: Any, step: int, split: tuple[int, int], shuffle: bool
) -> None:
    world, accumulation = split
    source = make_source(100)
    one = Batches(source, **SMALL, shuffle=shuffle)
    many = [
        Batches(source, **SMALL, shuffle=shuffle, rank=r, world=world, accumulation=accumulation) for r in range(world)
    ]
    expected = torch.from_numpy(source.rows(one.row_numbers(step)))
    assert torch.equal(one(step)[0], expected)
    assert torch.equal(in_global_order(many, step), expected)
    assert all(len(batches(step)) == accumulation for batches in many)


def test_a_rank_takes_every_world_th_row(make_source: Any) -> None:
    batches = Batches(make_source(100), **SMALL, rank=1, world=3, accumulation=2)
    assert [places.tolist() for places in batches.rank_rows(5)] == [[1, 4], [7, 10]]


def test_the_first_pass_follows_the_disk_and_the_step_counts_rows(make_source: Any) -> None:
    batches = Batches(make_source(100), **SMALL)
    assert batches.row_numbers(3).tolist() == list(range(36, 48))
    assert [batches.pass_of(step) for step in (0, 8, 9, 17)] == [0, 0, 1, 2]
    assert [batches.is_permuted(step) for step in (0, 8, 9)] == [False, False, True]
    assert Batches(make_source(100), **SMALL, shuffle=True).is_permuted(0)


def test_every_row_comes_once_in_each_pass(make_source: Any) -> None:
    batches = Batches(make_source(30), **SMALL)
    numbers = np.concatenate([batches.row_numbers(step) for step in range(5)]).reshape(2, 30)  # 60 rows: two passes
    assert all(sorted(one) == list(range(30)) for one in numbers.tolist())


def test_a_million_steps_in_costs_what_the_start_costs(make_source: Any) -> None:
    first, late = make_source(10_000), make_source(10_000)
    Batches(first, **SMALL)._ahead.take(0)
    Batches(late, **SMALL)._ahead.take(1_000_000)
    assert len(first.asked) == len(late.asked) == 12


def test_steps_in_any_order_are_the_same_as_in_sequence(make_source: Any) -> None:
    one, other = (Batches(make_source(100), **SMALL, shuffle=True) for _ in range(2))
    sequence = [one(step)[0] for step in range(20)]
    for step in (7, 3, 19, 4, 5, 5, 6, 0, 18):
        assert torch.equal(other(step)[0], sequence[step])


def test_the_next_step_is_read_in_the_background(make_source: Any) -> None:
    source, done = make_source(100), threading.Event()
    read, names = source.rows, list[str]()

    def rows(indices: np.ndarray) -> np.ndarray:
        names.append(threading.current_thread().name)
        if indices[0] == 12:
            done.set()
        return read(indices)

    source.rows = rows
    batches = Batches(source, **SMALL)
    batches(0)
    assert done.wait(5)
    batches(1)
    assert names[0] == threading.main_thread().name
    assert names[1] != threading.main_thread().name
    assert source.asked.count(12) == 1


def test_trouble_in_the_background_is_raised_at_its_own_step(make_source: Any) -> None:
    batches = Batches(make_source(100), **{**SMALL, "vocab_size": 40})
    batches(0), batches(1)  # rows 24 … 31 of step 2 are in the vocabulary, row 32 is not
    with pytest.raises(DataError, match="memory row 32, token 8: token id 40 is outside of the vocabulary of 40"):
        batches(2)
    assert batches(1)[0][0, 0] == 12


@pytest.mark.parametrize("bad", [-1, 1000, 2**31 - 1])
def test_a_token_outside_of_the_vocabulary_names_its_place(make_source: Any, bad: int) -> None:
    source = make_source(100)
    read = source.rows
    source.rows = lambda indices: np.where(indices[:, None] == 5, bad, read(indices))
    with pytest.raises(DataError, match=rf"memory row 5, token 0: token id {bad} is outside .* another tokenizer"):
        Batches(source, **SMALL)(0)


def test_a_token_outside_of_the_vocabulary_is_known_from_the_manifest(make_source: Any) -> None:
    source = make_source(100)
    source.max_token, source.max_token_file = 1000, "train-00001-of-00002.parquet"
    with pytest.raises(
        DataError, match=r"train-00001-of-00002.parquet: token id 1000 is outside of the vocabulary of 1000"
    ):
        Batches(source, **SMALL)
    assert source.asked == []


def test_rows_shorter_than_the_model_are_refused_and_longer_ones_cut(make_source: Any) -> None:
    with pytest.raises(DataError, match=r"memory row 0: 9 tokens, and a row of training takes 10; lower .* by 1"):
        Batches(make_source(100), **{**SMALL, "length": 9})
    assert Batches(make_source(100), **{**SMALL, "length": 4})(0)[0].shape == (12, 5)


def test_a_batch_that_cannot_be_shared_out_is_refused(make_source: Any) -> None:
    with pytest.raises(DataError, match=r"12 rows a step cannot be shared out over 5 processes x 2 .* multiple of 10"):
        Batches(make_source(100), **SMALL, world=5, accumulation=2)


def test_no_rows_are_refused(make_source: Any) -> None:
    with pytest.raises(DataError, match="no rows"):
        Batches(make_source(0), **SMALL)


def test_the_fingerprint_tells_what_decides_a_batch(make_source: Any) -> None:
    def fingerprint(**changes: Any) -> str:
        return Batches(make_source(100), **SMALL | changes).fingerprint

    other = make_source(100)
    other.fingerprint = "other"
    assert fingerprint() == fingerprint(world=2, rank=1, accumulation=3, vocab_size=2000)
    changed = [fingerprint(rows_per_step=6), fingerprint(seed=8), fingerprint(length=4), fingerprint(shuffle=True)]
    assert len({fingerprint(), *changed, Batches(other, **SMALL).fingerprint}) == 6


def test_the_batch_is_what_the_model_takes(make_source: Any) -> None:
    micro_batches = Batches(make_source(100), **SMALL, accumulation=3)(0)
    assert [(b.shape, b.dtype, b.is_contiguous()) for b in micro_batches] == [((4, 9), torch.int64, True)] * 3
