"""The external sort gives the order of the keys, whatever the memory."""

from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given, settings
from hypothesis import strategies as st

from picolm.data.spill import Spill

RECORDS = st.lists(st.tuples(st.integers(0, 2**63 - 1), st.binary(max_size=20)), max_size=60)


@settings(max_examples=25, deadline=None)
@given(records=RECORDS, memory_bytes=st.sampled_from([100, 400, 1 << 20]))
def test_records_come_in_the_order_of_their_keys(records: list[tuple[int, bytes]], memory_bytes: int) -> None:
    with TemporaryDirectory() as folder:
        spill = Spill(Path(folder) / "spill", memory_bytes=memory_bytes)
        for key, payload in records:
            spill.put(key, payload)
        expected = [payload for _, payload in sorted(records, key=lambda record: record[0])]
        assert list(spill) == expected
        assert list(spill) == expected  # it can be read again
        assert spill.records == len(records)


def test_many_records_with_one_key_keep_their_order(tmp_path: Path) -> None:
    spill = Spill(tmp_path / "spill", memory_bytes=10)
    for number in range(100):
        spill.put(7, bytes([number]))
    assert b"".join(spill) == bytes(range(100))


def test_a_bucket_that_does_not_fit_is_split_and_the_pieces_are_cleared_away(tmp_path: Path) -> None:
    spill = Spill(tmp_path / "spill", memory_bytes=1000)
    for number in range(20_000):
        spill.put((number * 0x9E3779B97F4A7C15) % 2**63, number.to_bytes(4, "big"))
    before = sorted((tmp_path / "spill").iterdir())
    assert len(before) == 64
    reading = iter(spill)
    next(reading)
    pieces = [path for path in (tmp_path / "spill").rglob("*") if path.is_file() and path.parent != tmp_path / "spill"]
    assert pieces
    assert max(path.stat().st_size for path in pieces) <= 1000  # what is in memory at once
    assert sum(1 for _ in reading) == 19_999
    assert sorted((tmp_path / "spill").iterdir()) == before
