"""Records come in the order of their keys, however they were put into runs and in however many parts they are read."""

from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from picolm.data.runs import bounds, read_between, read_keys, write_run

RECORDS = st.lists(st.tuples(st.integers(0, 2**63 - 1) | st.just(7), st.binary(max_size=20)), max_size=60)


@settings(max_examples=30, deadline=None)
@given(runs=st.lists(RECORDS, max_size=5), parts=st.integers(1, 5))
def test_records_come_in_the_order_of_their_keys(runs: list[list[tuple[int, bytes]]], parts: int) -> None:
    with TemporaryDirectory() as folder:
        paths = [Path(folder) / str(number) for number in range(len(runs))]
        for path, records in zip(paths, runs):
            write_run(path, [key for key, _ in records], [content for _, content in records])
            assert read_keys(path).tolist() == sorted(key for key, _ in records)
        expected = sorted((record for records in runs for record in records), key=lambda record: record[0])
        found = [record for part in range(parts) for record in read_between(paths, *bounds(part, parts))]
        assert found == [
            content for _, content in expected
        ]  # of equal keys the earlier run, and in it the earlier record


def test_a_range_holds_its_own_keys_alone(tmp_path: Path) -> None:
    write_run(tmp_path / "run", [5, 3, 9, 7], [b"5", b"3", b"9", b"7"])
    assert list(read_between([tmp_path / "run"], 5, 9)) == [b"5", b"7"]
    assert list(read_between([tmp_path / "run"], 10, 2**63)) == []


def test_parts_cover_all_keys_once() -> None:
    for parts in (1, 3, 64, 1000):
        edges = [bounds(part, parts) for part in range(parts)]
        assert (edges[0][0], edges[-1][1]) == (0, 2**63)
        assert all(low == high for (_, high), (low, _) in pairwise(edges))
    sizes = np.diff([low for low, _ in (bounds(part, 7) for part in range(7))])
    assert sizes.max() - sizes.min() <= 1
