"""What is trained on and what is held out: told from whole words of names; what cannot be told apart is refused with names."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from picolm.data import open_source
from picolm.data.manifest import NoSplit, matching, shards_of, split_of
from picolm.errors import DataError

SPELLINGS = {
    "train": ["train", "training"], "val": ["val", "valid", "validation"], "dev": ["dev"], "test": ["test"], "eval": ["eval"],
}  # fmt: skip


def shard(path: Path, first: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = np.arange(first, first + 8, dtype=np.int32).reshape(2, 4)
    pq.write_table(pa.table({"input_ids": list(rows)}), path)
    return path


def first_ids(place: Path | str, split: str = "train") -> list[int]:
    source = open_source(f"parquet:{place}", split=split)
    return source.rows(np.arange(len(source)))[::2, 0].tolist()


@given(
    st.sampled_from([(split, word) for split, words in SPELLINGS.items() for word in words]),
    st.sampled_from([str.lower, str.upper, str.title]),
    st.sampled_from(
        ["{}", "{}-00000-of-00001", "part_{}_1", "c4.{}.en", "corpus {} 3", "0{}1", "x-{}", "x={}", "my({})"]
    ),
    st.sampled_from(["", ".zst"]),
)
def test_a_split_is_a_whole_word_of_the_name(spelling: tuple[str, str], case: Any, form: str, extra: str) -> None:
    split, word = spelling
    name = form.format(case(word))
    assert split_of(f"{name}{extra}.parquet") == split
    assert split_of(f"{name}/data-0.parquet") == split
    assert split_of(f"a/{name}/b/0.parquet") == split


@pytest.mark.parametrize(
    "name", ["trainer", "evaluate", "device", "latest", "valley", "interval", "contest", "medieval", "0", "x"]
)
def test_a_part_of_a_word_is_no_split(name: str) -> None:
    assert split_of(f"{name}-0.parquet") is None


def test_the_name_of_the_file_goes_before_that_of_its_folder() -> None:
    assert split_of("test/train-0.parquet") == "train"
    assert split_of("train/c4/VAL_1.parquet") == "val"
    assert split_of("train_test_split/held-out.parquet") == "heldout"
    assert split_of("myTrainRows.parquet") == "train"
    with pytest.raises(DataError, match=r"'train-dev' names several splits \(dev, train\); rename it"):
        split_of("train-dev.parquet")


@pytest.mark.parametrize("word", ["VAL", "valid", "Validation", "dev", "TEST", "eval", "heldout"])
@pytest.mark.parametrize("form", ["{}-0.parquet", "rows_{}.parquet", "{}.parquet", "x.{}.PARQUET", "{}/0.parquet"])
def test_held_out_shards_are_not_trained_on(tmp_path: Path, word: str, form: str) -> None:
    shard(tmp_path / "part-0.parquet")
    shard(tmp_path / form.format(word), first=100)
    assert first_ids(tmp_path) == [0]
    assert first_ids(f"{tmp_path}/**/*.[pP]*") == [0]
    if word.lower() in SPELLINGS["val"]:
        assert [first_ids(tmp_path, split) for split in ("val", "validation", "valid")] == [[100]] * 3
    else:
        with pytest.raises(NoSplit, match="of the split 'val'; it has shards of"):
            open_source(str(tmp_path), split="val")


def test_a_mix_that_cannot_be_told_apart_is_refused_with_names(tmp_path: Path) -> None:
    shard(tmp_path / "train-0.parquet")
    shard(tmp_path / "more.parquet")
    shard(tmp_path / "val-0.parquet", first=50)
    with pytest.raises(
        DataError, match=r"1 of its shards name no split, others are called train \(train-0.parquet\).*: more.parq"
    ):
        open_source(str(tmp_path))
    assert first_ids(tmp_path, "val") == [50]
    assert first_ids(tmp_path / "more.parquet") == [0]
    with pytest.raises(DataError, match=r"lab/rows: 1 of its shards name no split.* README.parquet"):
        shards_of(["data/train-0.parquet", "README.parquet"], "train", "lab/rows")


def test_the_folders_above_the_given_one_name_no_split(tmp_path: Path) -> None:
    shard(tmp_path / "test" / "rows" / "0.parquet", first=7)
    assert first_ids(tmp_path / "test" / "rows") == first_ids(tmp_path / "test" / "rows" / "*.parquet") == [7]
    assert first_ids(tmp_path / "test" / "rows" / "0.parquet") == [7]


def test_two_stars_stand_for_any_number_of_folders(tmp_path: Path) -> None:
    for number, name in enumerate(("0.parquet", "a/1.parquet", "a/b/2.parquet", "a/b/c/3.parquet")):
        shard(tmp_path / name, first=100 * number)
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    assert sorted(first_ids(tmp_path / "**" / "*.parquet")) == [0, 100, 200, 300]
    assert first_ids(tmp_path / "a" / "**" / "2.parquet") == [200]


def test_brackets_in_the_name_of_a_folder_are_brackets(tmp_path: Path) -> None:
    shard(tmp_path / "rows[1]" / "a-[x].parquet", first=3)
    shard(tmp_path / "rows1" / "a-x.parquet", first=4)
    assert first_ids(tmp_path / "rows[1]") == [3]
    assert first_ids(tmp_path / "rows[1]" / "a-[x].parquet") == [3]
    assert first_ids(tmp_path / "rows[1]" / "*.parquet") == [3]
    assert first_ids(tmp_path / "rows[12]" / "*.parquet") == [4]
    assert matching(str(tmp_path / "none[1]" / "*"))[1] == []


def test_shards_in_other_folders_are_named_as_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train-0.parquet", "old/train-1.parquet", "old/deep/2.parquet", ".hidden/3.parquet"):
        shard(tmp_path / name)
    with caplog.at_level(logging.WARNING):
        assert first_ids(tmp_path) == [0]
    assert "2 parquet files in other folders below it are not read, such as old/train-1.parquet" in caplog.text


def test_folders_of_splits_are_read(tmp_path: Path) -> None:
    shard(tmp_path / "data" / "train" / "0.parquet", first=1)
    shard(tmp_path / "data" / "validation" / "0.parquet", first=2)
    assert (first_ids(tmp_path), first_ids(tmp_path, "val")) == ([1], [2])


def test_every_damaged_shard_is_named(tmp_path: Path, write_shards: Callable[..., Path]) -> None:
    folder = write_shards([4, 4, 4])
    for number in (0, 2):
        path = folder / f"train-{number:05d}-of-00003.parquet"
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError) as caught:
        open_source(str(folder))
    assert [f"{number:05d}-of" in str(caught.value) for number in range(3)] == [True, False, True]


@pytest.mark.parametrize("wrong", [-1, -100])
@pytest.mark.parametrize("kind", [pa.int64(), pa.int32(), pa.int16()])
def test_ids_below_zero_are_errors_with_file_and_row(tmp_path: Path, wrong: int, kind: Any) -> None:
    rows = [[1, 2, 3], [4, 5, wrong], [7, 8, 9]]
    pq.write_table(pa.table({"input_ids": pa.array(rows, pa.list_(kind))}), tmp_path / "val-0.parquet")
    source = open_source(str(tmp_path), split="val", row_length=2)
    with pytest.raises(
        DataError, match=f"val-0.parquet: row 1 of row group 0 has the token id {wrong}; rows hold ids from 0"
    ):
        source.rows(np.array([0]))


@pytest.mark.parametrize("rows", [[[], []], [[1, 2], []], [[], [1, 2]]])
def test_rows_without_tokens_are_errors_with_file_and_row(tmp_path: Path, rows: list[list[int]]) -> None:
    pq.write_table(pa.table({"input_ids": pa.array(rows, pa.list_(pa.int32()))}), tmp_path / "val-0.parquet")
    with pytest.raises(DataError, match=r"val-0.parquet: row \d of row group 0 has (no|0|2) tokens"):
        open_source(str(tmp_path), split="val").rows(np.array([0]))


def test_pipes_and_pointers_of_git_lfs_are_named(tmp_path: Path) -> None:
    import os

    (tmp_path / "train-0.parquet").write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9\n"
    )
    with pytest.raises(DataError, match=r"train-0.parquet: is a pointer of Git LFS"):
        open_source(str(tmp_path))
    (tmp_path / "train-0.parquet").unlink()
    os.mkfifo(tmp_path / "train-0.parquet")
    with pytest.raises(DataError, match=r"train-0.parquet: is not a regular file"):
        open_source(str(tmp_path))
