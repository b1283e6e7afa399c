"""Folders that `save_to_disk` of the library datasets wrote."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from picolm.data import open_source
from picolm.errors import DataError, FileError

datasets = pytest.importorskip("datasets", reason="datasets is not installed (it comes with lm_eval)")

ROWS = np.arange(2500 * 9).reshape(2500, 9) % 1000


def table(rows: Any = ROWS, **columns: Any) -> Any:
    return datasets.Dataset.from_dict({"input_ids": [list(row) for row in rows], **columns})


def test_rows_of_several_shards_and_record_batches(tmp_path: Path) -> None:
    saved = table(attention_mask=[[1] * 9] * len(ROWS), text=["a"] * len(ROWS))
    saved.save_to_disk(tmp_path / "d", num_shards=2)
    source = open_source(f"datasets:{tmp_path}/d")
    assert (len(source), source.row_length) == (2500, 9)
    assert np.array_equal(source.rows(np.arange(2500)), ROWS)
    assert source.rows(np.array([2499, 1249, 1250])).tolist() == ROWS[[2499, 1249, 1250]].tolist()
    assert source.locate(1255) == f"{tmp_path}/d/data-00001-of-00002.arrow row 5"
    assert source.locate(1249) == f"{tmp_path}/d/data-00000-of-00002.arrow row 1249"
    shorter = open_source(f"datasets:{tmp_path}/d", row_length=5)
    assert shorter.rows(np.array([7])).tolist() == [ROWS[7, :5].tolist()]
    assert shorter.fingerprint == source.fingerprint
    with pytest.raises(DataError, match=r"rows of 9 tokens, and a row of training takes 12"):
        open_source(f"datasets:{tmp_path}/d", row_length=12)
    with pytest.raises(DataError, match=r"row 2500 of a data set of 2500 rows"):
        source.rows(np.array([2500]))


@pytest.mark.parametrize(
    "feature",
    [
        lambda: datasets.Sequence(datasets.Value("int32")),
        lambda: datasets.Sequence(datasets.Value("uint16"), length=9),
        lambda: datasets.LargeList(datasets.Value("int64")),
    ],
)
def test_lists_of_any_integer_and_any_kind(tmp_path: Path, feature: Any) -> None:
    saved = table().cast_column("input_ids", feature()).select(range(3, 1800)).shuffle(seed=1)
    saved.save_to_disk(tmp_path / "d")
    source = open_source(f"datasets:{tmp_path}/d", row_length=9)
    assert source.rows(np.arange(1797)).tolist() == saved["input_ids"][:]


def test_splits_are_those_of_the_dictionary_or_of_the_state(tmp_path: Path) -> None:
    parts = {"train": table(ROWS[:20]), "validation": table(ROWS[20:30])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "d")
    assert len(open_source(f"datasets:{tmp_path}/d")) == 20
    assert open_source(f"datasets:{tmp_path}/d", split="val").rows(np.array([0])).tolist() == [ROWS[20].tolist()]
    with pytest.raises(DataError, match=r"d: has no split 'test' \(there are: train, validation\)"):
        open_source(f"datasets:{tmp_path}/d", split="test")
    datasets.Dataset.from_dict({"input_ids": ROWS[:4].tolist()}, split="validation").save_to_disk(tmp_path / "v")
    assert len(open_source(f"datasets:{tmp_path}/v", split="val")) == 4
    with pytest.raises(DataError, match=r"v: has no split 'train' \(there are: val\)"):
        open_source(f"datasets:{tmp_path}/v")


def test_what_cannot_be_read_says_why(tmp_path: Path) -> None:
    def refused(message: str, saved: Any = None) -> None:
        if saved is not None:
            saved.save_to_disk(tmp_path / "d")
        with pytest.raises((DataError, FileError), match=message):
            open_source(f"datasets:{tmp_path}/d").rows(np.array([0]))

    refused(r"d: is no folder that save_to_disk .* it has no state.json")
    refused(r"arrow: has no column input_ids \(it has: text\)", datasets.Dataset.from_dict({"text": ["a"]}))
    refused(r"arrow: rows of 2 and of 3 tokens; rows must be equally long", table([[1, 2], [1, 2, 3]]))
    refused(r"input_ids is of type string", datasets.Dataset.from_dict({"input_ids": ["a"]}))
    refused(r"input_ids holds nulls", datasets.Dataset.from_dict({"input_ids": [[1, 2], None]}))
    refused(r"arrow row 0: .* ids beyond 32 bits", table([[1, 2**40]]))
    refused(r"d: has no rows", table().select([]))
    table(ROWS[:20]).save_to_disk(tmp_path / "d")
    state = json.loads((tmp_path / "d" / "state.json").read_text())
    file = tmp_path / "d" / state["_data_files"][0]["filename"]
    whole = file.read_bytes()
    for cut in (len(whole) - 8, 700, 0):
        file.write_bytes(whole[:cut])
        refused(r"arrow: cannot be read as Arrow \(its end is not that of an Arrow stream\)")
    file.write_bytes(bytes(byte ^ 0xFF for byte in whole[:-8]) + whole[-8:])
    refused(r"arrow: cannot be read as Arrow")
    file.unlink()
    file.symlink_to("/dev/zero")
    refused(r"arrow: is a link")
    for change, message in (
        (
            {"_data_files": [{"filename": "../d/x.arrow"}]},
            r"names '../d/x.arrow', which is not the name of something in it",
        ),
        ({"_data_files": "x"}, r"state.json: _data_files.*valid list"),
        ({"_indices_files": [{"filename": "indices.arrow"}]}, r"keeps the order of its rows in a file of its own"),
    ):
        (tmp_path / "d" / "state.json").write_text(json.dumps(state | change))
        refused(message)


@pytest.mark.parametrize("offsets", [(1 << 20, (1 << 20) + 9), (-9, 0), (9, 0), (0, 1 << 30)])
def test_lists_outside_of_the_file_are_refused(tmp_path: Path, offsets: tuple[int, int]) -> None:
    table([range(9)]).save_to_disk(tmp_path / "d")
    file = next((tmp_path / "d").glob("*.arrow"))
    before, found, after = file.read_bytes().rpartition(struct.pack("<ii", 0, 9))
    assert found
    file.write_bytes(before + struct.pack("<ii", *offsets) + after)
    with pytest.raises(DataError, match=r"\.arrow: "):
        open_source(f"datasets:{tmp_path}/d")
