"""Rows in local shards: found by number, cut to length, and every fault named with its file."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from picolm.data import open_source
from picolm.data.documents import Reader, find_files
from picolm.data.parquet import ByteBoundedCache, ShardedRows
from picolm.errors import DataError

Write = Callable[..., Path]


def expected(indices: np.ndarray, length: int = 9) -> np.ndarray:
    return (np.asarray(indices)[:, None] + np.arange(length)) % 1000


def test_rows_are_found_by_number_in_any_order(write_shards: Write) -> None:
    source = open_source(str(write_shards([20, 20, 7])))
    assert (len(source), source.row_length) == (47, 9)
    indices = np.random.default_rng(0).integers(0, 47, 200)
    assert np.array_equal(source.rows(indices), expected(indices))
    assert source.rows(np.array([], dtype=np.int64)).shape == (0, 9)
    assert source.rows(indices).dtype == np.int32


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.int64()), pa.large_list(pa.int32()), pa.list_(pa.uint16()), pa.list_(pa.int64(), 9)]
)
def test_any_list_of_integers_will_do(write_shards: Write, kind: Any) -> None:
    source = open_source(str(write_shards([10, 3], kind=kind)))
    assert np.array_equal(source.rows(np.arange(13)), expected(np.arange(13)))


def test_a_folder_its_data_folder_a_glob_a_file_and_the_full_name_hold_the_same(write_shards: Write) -> None:
    folder = write_shards([5, 4], folder="repository/data")
    shard = folder / "train-00000-of-00002.parquet"
    places = [f"{folder}", f"{folder.parent}", f"parquet:{folder}", f"{folder}/*.parquet", f"{folder}/train-*"]
    sources = [open_source(place) for place in places]
    assert [len(source) for source in sources] == [9] * 5
    assert len({source.fingerprint for source in sources}) == 1
    assert len(open_source(str(shard))) == 5


def test_splits_are_told_from_file_names(write_shards: Write) -> None:
    folder = write_shards([6])
    write_shards([4], split="val")
    assert len(open_source(str(folder))) == 6
    assert len(open_source(str(folder), split="val")) == 4
    with pytest.raises(
        DataError, match=r"no parquet shards of the split 'test'; it has shards of train, val \(expected test-\*"
    ):
        open_source(str(folder), split="test")


def test_a_source_without_held_out_rows_says_so(write_shards: Write) -> None:
    with pytest.raises(DataError, match="no parquet shards of the split 'val'"):
        open_source(str(write_shards([6])), split="val")


def test_longer_rows_are_cut_and_any_length_is_taken_on_request(write_shards: Write) -> None:
    folder = write_shards([20], length=12)
    cut = open_source(str(folder), row_length=9)
    assert np.array_equal(cut.rows(np.arange(20)), expected(np.arange(20)))
    assert open_source(str(folder)).row_length == 12


def test_shorter_rows_are_refused_with_both_lengths(write_shards: Write) -> None:
    with pytest.raises(
        DataError,
        match=r"train-00000-of-00001.parquet: rows of 9 tokens, and a row of training takes 17; lower model.max_seq_len by 8, .*",
    ):
        open_source(str(write_shards([20])), row_length=17)


def test_labels_are_those_of_the_source_column(write_shards: Write) -> None:
    assert open_source(str(write_shards([4, 4]))).labels(np.arange(3)) is None
    labelled = open_source(str(write_shards([4, 4], folder="labelled", labels=True)))
    assert labelled.labels(np.array([7, 0, 4])) == ["s1", "s0", "s1"]


def test_a_row_is_located_in_its_shard(write_shards: Write) -> None:
    source = open_source(str(write_shards([20, 20])))
    assert source.locate(23).endswith("train-00001-of-00002.parquet row 3")
    with pytest.raises(DataError, match="row 40 of a data set of 40 rows"):
        source.rows(np.array([40]))
    with pytest.raises(DataError, match="row -1 of a data set of 40 rows"):
        source.rows(np.array([-1]))


def test_only_the_row_groups_that_are_needed_are_decoded(write_shards: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    from picolm.data import parquet

    source = open_source(str(write_shards([64, 64], group=8)), row_length=9)
    decoded = list[tuple[str, int]]()
    read = parquet.read_tokens
    monkeypatch.setattr(
        parquet, "read_tokens", lambda path, name, group: decoded.append((path.name, group)) or read(path, name, group)
    )
    source.rows(np.array([64 + 17, 3, 64 + 18, 4]))
    assert sorted(decoded) == [("train-00000-of-00002.parquet", 0), ("train-00001-of-00002.parquet", 2)]
    source.rows(np.array([5]))
    assert len(decoded) == 2


def test_the_cache_is_bounded_in_bytes_and_drops_what_was_used_longest_ago() -> None:
    cache, computed = ByteBoundedCache(100), list[str]()

    def value(name: str, size: int) -> np.ndarray:
        return cache.get(name, lambda: (computed.append(name) or np.zeros(size, np.uint8), size))

    for name in ("a", "b", "a", "c", "a", "b"):  # c drives out b, which was used longest ago
        value(name, 40)
        assert cache.held_bytes <= 100
    assert computed == ["a", "b", "c", "b"]
    value("huge", 500)
    value("huge", 500)
    assert computed[-1:] == ["huge"]  # one value is kept however large


@pytest.mark.slow
def test_threads_get_the_same_rows(write_shards: Write) -> None:
    folder = write_shards([200] * 3, group=4)
    source = open_source(str(folder))
    source._cache._limit_bytes = 1000  # a few row groups: constant eviction
    wrong = list[int]()

    def read(seed: int) -> None:
        for indices in np.random.default_rng(seed).integers(0, 600, (50, 20)):
            wrong.extend((source.rows(indices) != expected(indices)).nonzero()[0].tolist())

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert wrong == []


def test_the_fingerprint_follows_the_rows_and_not_the_place(write_shards: Write, tmp_path: Path) -> None:
    folder = write_shards([20, 7])
    before = open_source(str(folder)).fingerprint
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert open_source(str(tmp_path / "elsewhere")).fingerprint == before
    first, second = sorted((tmp_path / "elsewhere").iterdir())
    first.rename(first.with_name("train-9.parquet"))  # now the second shard comes first
    assert open_source(str(tmp_path / "elsewhere")).fingerprint != before
    table = pq.read_table(folder / second.name)
    changed = table.set_column(0, "input_ids", pa.array([[1] * 9] * 7, type=table.schema.field(0).type))
    pq.write_table(changed, folder / second.name)
    assert open_source(str(folder)).fingerprint != before


def test_missing_column_says_what_there_is(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "id": [1]}), tmp_path / "train-0.parquet")
    with pytest.raises(
        DataError, match=r"train-0.parquet: has no column input_ids \(it has: text, id\); `pico data prepare`"
    ):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([[1, 2, 3], [1, 2]], "train-0.parquet: row 1 of row group 0 has 2 tokens and row 0 has 3"),
        ([[1, 2, 3], None], "train-0.parquet: row group 0 of input_ids holds nulls"),
        ([[1, 2], [3, None]], "train-0.parquet: row group 0 of input_ids holds nulls"),
        ([7, 8], "train-0.parquet: column input_ids is of type int64; rows of integers"),
        ([["a"], ["b"]], "train-0.parquet: column input_ids holds string; token ids are integers"),
        ([[0.5], [1.5]], "train-0.parquet: column input_ids holds double; token ids are integers"),
        ([[1, 2**40]], "train-0.parquet: token id 1099511627776 does not fit into 32 bits"),
        (pa.array([], type=pa.list_(pa.int32())), "its 1 parquet shards have no rows"),
    ],
)
def test_rows_that_are_none_are_refused(tmp_path: Path, column: Any, message: str) -> None:
    pq.write_table(pa.table({"input_ids": column}), tmp_path / "train-0.parquet")
    with pytest.raises(DataError, match=message):
        open_source(str(tmp_path))


@pytest.mark.parametrize("twice", ["input_ids", "source", "text"])
def test_two_columns_of_one_name_are_refused(tmp_path: Path, twice: str) -> None:
    columns = {"input_ids": [[1, 2, 3]] * 4, "source": ["a"] * 4, "text": ["b"] * 4}
    names = [*columns, twice]
    table = pa.Table.from_arrays([pa.array(columns[name]) for name in names], names=names)
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(DataError, match=rf"train.parquet: has more than one column '{twice}'; write it again"):
        open_source(str(tmp_path)).rows(np.arange(4))
    with pytest.raises(DataError, match=rf"train.parquet: has more than one column '{twice}'; write it again"):
        [document for file in find_files([tmp_path]) for document in Reader().documents(file)]


def test_a_name_of_a_column_that_is_no_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "train.parquet"
    pq.write_table(pa.table({"input_ids": [[1, 2, 3]], "sourcecode": ["a"]}), file, store_schema=False)
    file.write_bytes(file.read_bytes().replace(b"sourcecode", b"source\xd9ode"))
    with pytest.raises(DataError, match=r"train.parquet: cannot be read as parquet \('utf-8' codec can't decode"):
        open_source(str(tmp_path))
    with pytest.raises(DataError, match=r"train.parquet: cannot be read as parquet \('utf-8' codec can't decode"):
        [document for file in find_files([tmp_path]) for document in Reader().documents(file)]


def test_shards_of_unequal_length_are_refused_when_they_are_read(write_shards: Write, tmp_path: Path) -> None:
    folder = write_shards([5])
    shutil.copy(
        write_shards([5], folder="short", length=4) / "train-00000-of-00001.parquet", folder / "train-9.parquet"
    )
    with pytest.raises(
        DataError,
        match=r"train-9.parquet: rows of 4 tokens, and a row of training takes 9; lower model.max_seq_len by 5",
    ):
        open_source(str(folder), row_length=9)
    with pytest.raises(DataError, match=r"train-9.parquet: rows of 4 tokens"):
        open_source(str(folder)).rows(np.array([7]))


@pytest.mark.parametrize("keep", [0, 3, 200, -10])
def test_a_truncated_shard_is_named(write_shards: Write, keep: int) -> None:
    shard = write_shards([50]) / "train-00000-of-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"train-00000-of-00001.parquet: cannot be read as parquet \(.*truncated"):
        open_source(str(shard.parent))


def test_an_empty_folder_and_a_missing_one_say_what_was_tried(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no parquet shards of the split 'train' \(expected train-\*.parquet\)"):
        open_source(str(tmp_path))
    with pytest.raises(DataError, match="there is no such file or folder, and no file matches it as a glob"):
        open_source(f"parquet:{tmp_path}/nothing")


def test_a_foreign_manifest_is_ignored_and_a_newer_one_refused(write_shards: Write) -> None:
    folder = write_shards([5])
    manifest = folder / "manifest.json"
    for text in ('{"format": "something else"}', "[1, 2]"):
        manifest.write_text(text)
        assert len(open_source(str(folder))) == 5
    manifest.write_text(json.dumps({"format": "picolm-rows-99"}))
    with pytest.raises(
        DataError, match=r"manifest.json: is of the format picolm-rows-99; this version reads picolm-rows-1"
    ):
        open_source(str(folder))
    manifest.write_text('{"format": "picolm-rows-1"')
    with pytest.raises(DataError, match=r"manifest.json: is damaged"):
        open_source(str(folder))


def test_a_shard_exchanged_behind_our_back_is_noticed(write_shards: Write) -> None:
    folder = write_shards([5, 5])
    names = sorted(str(path) for path in folder.iterdir())
    source = ShardedRows(names, [5, 6], lambda shard: Path(names[shard]), fingerprint="", row_length=9)
    with pytest.raises(DataError, match=r"train-00001-of-00002.parquet: holds 5 rows where 6 were expected"):
        source.rows(np.array([6]))
