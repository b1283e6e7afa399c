"""A data set by its name: families, paths, repositories, and a user's own."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from picolm.data import SOURCES, open_source
from picolm.errors import DataError, PicoError


def test_names_that_mean_nothing_say_what_was_tried() -> None:
    with pytest.raises(DataError, match=r"'nothing' is not found: no such file or folder, no glob .*, and no family"):
        open_source("nothing")
    with pytest.raises(DataError, match=r"'/no/such/place' is not found"):
        open_source("/no/such/place")
    with pytest.raises(PicoError, match=r"data source 'parket:x' cannot be imported"):
        open_source("parket:x")
    assert sorted(SOURCES) == [
        "datasets", "datatrove", "embedded", "first", "hub", "megatron", "mix", "nanogpt", "olmo", "parquet",
    ]  # fmt: skip


def test_a_folder_here_goes_before_a_repository_of_that_name(
    write_shards: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_shards([5], folder="lab/rows")
    monkeypatch.chdir(tmp_path)
    assert len(open_source("lab/rows")) == 5
    with pytest.raises(DataError, match="lab/other: offline mode"):
        open_source("lab/other", cache_dir=tmp_path)


def test_the_first_rows_of_a_source(write_shards: Callable[..., Path]) -> None:
    folder = write_shards([2, 3], folder="rows", labels=True)
    write_shards([4], folder="rows", split="val")
    whole, first = open_source(str(folder)), open_source(f"first:3,{folder}")
    numbers = np.array([2, 0, 1])
    assert len(first) == 3
    assert np.array_equal(first.rows(numbers), whole.rows(numbers))
    assert first.labels(numbers) == whole.labels(numbers)
    assert first.locate(2) == whole.locate(2)
    assert first.row_length == whole.row_length
    assert first.max_token == whole.max_token
    assert len({source.fingerprint for source in (whole, first, open_source(f"first:2,{folder}"))}) == 3
    assert len(open_source(f"first:3,{folder}", split="val")) == 4  # held-out rows are all there
    with pytest.raises(IndexError, match="row 3 of 3"):
        first.rows(np.array([0, 3]))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("first:", "takes a number of rows and a source"),
        ("first:{0}", "takes a number of rows and a source"),
        ("first:0,{0}", "takes a number of rows and a source"),
        ("first:-3,{0}", "takes a number of rows and a source"),
        ("first:6,{0}", "has 5 training rows"),
        ("first:2,nothing", "data set 'nothing' is not found"),
        ("first:2,my_lab.rows:code", "my_lab.rows:code is code"),
        ("first:2,mix:{0},my_lab.rows:code", "my_lab.rows:code is code"),
    ],
)
def test_rows_that_are_not_first(name: str, message: str, write_shards: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=message):
        open_source(name.format(write_shards([5], folder="rows")))


def test_a_users_own_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_source: Any) -> None:
    (tmp_path / "my_lab_rows.py").write_text("def rows(place, **options):\n    return place, options\n")
    monkeypatch.syspath_prepend(tmp_path)
    place, options = open_source("my_lab_rows:rows", split="val", row_length=9, cache_dir=tmp_path)
    assert (place, options) == ("", {"split": "val", "row_length": 9, "vocab_size": 4096, "cache_dir": tmp_path})


def test_importing_the_sources_is_light() -> None:
    program = (
        "import sys, picolm.data, picolm.data.batches, picolm.data.prepare; print([m for m in %r if m in sys.modules])"
    )
    heavy = ["torch", "pyarrow", "tokenizers", "huggingface_hub", "pandas"]
    done = subprocess.run([sys.executable, "-c", program % heavy], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
