"""Canaries: which rows a step shows, and where, is a function of its number; nothing else of the batches changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.data.test_batches import SMALL, in_global_order

from picolm.data.batches import Batches
from picolm.data.canaries import Canaries, Group, Planted, random_rows, rows_from_file, steps_shown
from picolm.errors import DataError

CANARIES_CS = 500 + np.arange(3 * 9).reshape(3, 9)


def planted(*shown: Any, tokens_CS: np.ndarray = CANARIES_CS, rows: int = 12) -> Canaries:
    return Canaries([Group("", tokens_CS[: len(shown)], tuple(shown), np.arange(1000))], rows)


def test_a_canary_is_in_the_batches_of_its_steps_and_in_no_other(make_source: Any) -> None:
    with_them = Batches(make_source(100), **SMALL, canaries=planted((3, 7), range(5, 9), range(0, 2**60, 4)))
    without = Batches(make_source(100), **SMALL)
    expected = {0: [2], 3: [0], 4: [2], 5: [1], 6: [1], 7: [0, 1], 8: [1, 2]}
    for step in range(11):
        whole, plain = with_them(step)[0], without(step)[0]
        found = [c for c in range(3) for row in whole if row.tolist() == CANARIES_CS[c].tolist()]
        assert sorted(found) == expected.get(step, [])
        changed = (whole != plain).any(1)
        assert int(changed.sum()) == len(found)  # each takes the place of one row; the others stay where they are
        assert with_them.row_numbers(step)[~changed].tolist() == without.row_numbers(step)[~changed].tolist()
        assert sorted(with_them.row_numbers(step)[changed]) == [100 + c for c in sorted(found)]


@pytest.mark.parametrize("split", [(2, 1), (3, 2), (1, 4), (12, 1)])
@pytest.mark.parametrize("step", [5, 7])
def test_any_number_of_processes_and_micro_batches_has_the_same_canaries(
    make_source: Any, split: tuple[int, int], step: int
) -> None:
    world, accumulation = split
    canaries = planted((5, 7), (7,), (7,))
    one = Batches(make_source(100), **SMALL, canaries=canaries)
    many = [
        Batches(make_source(100), **SMALL, canaries=canaries, rank=rank, world=world, accumulation=accumulation)
        for rank in range(world)
    ]
    assert torch.equal(in_global_order(many, step), one(step)[0])


def test_the_places_follow_from_seed_and_step(make_source: Any) -> None:
    def places(seed: int) -> list[tuple[int, ...]]:
        batches = Batches(make_source(100), **SMALL | {"seed": seed}, canaries=planted(range(99), range(99)))
        return [tuple(np.flatnonzero(batches.row_numbers(step) >= 100)) for step in range(40)]

    assert places(7) == places(7) != places(8)
    assert all(len(each) == 2 for each in places(7))
    assert {place for each in places(7) for place in each} == set(range(12))


def test_a_batch_may_hold_nothing_but_canaries(make_source: Any) -> None:
    tokens_CS = random_rows(12, 9, np.arange(1000), 0, "test")
    batches = Batches(make_source(100), **SMALL, canaries=planted(*[(2,)] * 12, tokens_CS=tokens_CS))
    assert sorted(batches(2)[0].tolist()) == sorted(tokens_CS.tolist())
    assert not set(range(24, 36)) & set(batches.source.own.asked)  # the rows in whose places they are


def test_the_fingerprint_is_as_without_canaries_where_there_are_none_and_tells_of_each_change(make_source: Any) -> None:
    def fingerprint(canaries: Canaries | None) -> str:
        return Batches(make_source(100), **SMALL, canaries=canaries).fingerprint

    other = CANARIES_CS.copy()
    other[0, 8] += 1
    known = "722bb8793d677509e57e7cceceff4bde8c3601cf1faa7b302cb5b230d57d30c0"
    assert fingerprint(None) == known
    kinds = [planted((3,)), planted((4,)), planted((3, 4)), planted((3,), (3,)), planted((3,), tokens_CS=other)]
    assert len({fingerprint(None), *map(fingerprint, kinds)}) == 6
    assert fingerprint(planted((3, 5, 7))) == fingerprint(planted(range(3, 9, 2)))  # the same steps, written otherwise
    assert fingerprint(planted(range(3, 9))) != fingerprint(planted(range(3, 2**63 - 1)))


def test_rows_are_shown_one_after_the_other(make_source: Any) -> None:
    shown = list(steps_shown(3, start=40, every=4, times=25, apart=1))
    assert [(*steps[:3], steps[-1], len(steps)) for steps in shown] == [
        (40, 44, 48, 136, 25), (41, 45, 49, 137, 25), (42, 46, 50, 138, 25),
    ]  # fmt: skip
    assert next(steps_shown(1, start=2, every=3, times=None, apart=0))[10**9] == 2 + 3 * 10**9


def test_random_rows_follow_from_the_seed_alone() -> None:
    alphabet = np.array([3, 5, 8, 13])
    rows = random_rows(50, 200, alphabet, 1, "canary", 0)
    assert rows[0, :8].tolist() == random_rows(1, 8, alphabet, 1, "canary", 0)[0].tolist()
    assert rows[0, :8].tolist() == [8, 5, 3, 13, 5, 3, 3, 8]  # of all versions of numpy
    counts = [(rows == token).sum() for token in alphabet]
    assert sum(counts) == rows.size
    assert all(abs(count - 2500) < 4 * (2500 * 0.75) ** 0.5 for count in counts)
    for other in (random_rows(50, 200, alphabet, 2, "canary", 0), random_rows(50, 200, alphabet, 1, "canary", 1)):
        assert (rows != other).any(1).all()


@pytest.mark.parametrize(("write", "name"), [(np.save, "rows.npy"), (None, "rows.parquet:ids")])
def test_rows_come_from_a_file(tmp_path: Path, write: Callable[..., Any] | None, name: str) -> None:
    if write is not None:
        write(tmp_path / name, CANARIES_CS)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"ids": list(CANARIES_CS)}), tmp_path / name.partition(":")[0])
    tokens_CS, alphabet = rows_from_file(f"{tmp_path}/{name}", 9)
    assert tokens_CS.tolist() == CANARIES_CS.tolist()
    assert alphabet.tolist() == sorted(set(CANARIES_CS.flatten().tolist()))
    for length in (8, 10):
        with pytest.raises(DataError, match=rf"row 0 of .* has 9 tokens, and a row of training has {length}"):
            rows_from_file(f"{tmp_path}/{name}", length)


@pytest.mark.parametrize("name", ["rows.txt", "none.npy", "empty.npy"])
def test_a_file_without_rows_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "rows.txt").write_text("text")
    np.save(tmp_path / "empty.npy", np.empty((0, 9), dtype=np.int64))
    with pytest.raises(DataError, match=name):
        rows_from_file(f"{tmp_path}/{name}", 9)


@pytest.mark.parametrize(
    ("canaries", "vocab", "message"),
    [
        (planted((3,), (3,), rows=1), 1000, r"step 3 shows 2 canaries, and its batch has 1 rows"),
        (planted(range(0, 2**60, 3), range(0, 2**60, 5), (1,), rows=1), 1000, r"step 0 shows 2 canaries"),
        (planted(range(1, 2**60, 3), range(3, 2**60, 5), rows=1), 1000, r"step 13 shows 2 canaries"),
        (planted((3,)), 508, r"canary 0, token 8: id 508 is outside of the vocabulary of 508 \(0 to 507\)"),
        (planted((3,), tokens_CS=CANARIES_CS - 501), 1000, r"canary 0, token 0: id -1 is outside"),
    ],
)
def test_canaries_that_do_not_fit_are_refused_before_the_first_step(
    canaries: Canaries, vocab: int, message: str
) -> None:
    with pytest.raises(DataError, match=f"data.canaries: {message}"):
        canaries.check(vocab, 20)


def test_more_canaries_than_rows_after_the_last_step_are_no_problem() -> None:
    canaries = planted((21,), (21,), range(13, 2**60), rows=1)
    canaries.check(1000, 20)
    with pytest.raises(DataError, match="step 21 shows 3 canaries"):
        canaries.at(21)


def test_canaries_are_rows_of_the_source(make_source: Any) -> None:
    class Labelled(make_source):  # type: ignore[misc, valid-type]
        def labels(self, indices: np.ndarray) -> list[str]:
            return [f"label {index}" for index in indices]

    source = Planted(Labelled(100, 12), planted((1,), (2,)))
    assert len(source) == 100
    assert source.row_length == 9
    numbers = np.array([4, 101, 7, 100])
    assert source.rows(numbers).tolist() == [
        list(range(4, 13)), CANARIES_CS[1].tolist(), list(range(7, 16)), CANARIES_CS[0].tolist(),
    ]  # fmt: skip
    assert source.labels(numbers) == ["label 4", "canary", "label 7", "canary"]
    assert [source.locate(int(number)) for number in numbers[:2]] == ["memory row 4", "canary 1"]
    assert Planted(make_source(100), planted((1,))).labels(numbers) is None
