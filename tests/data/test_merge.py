"""Mixing by weights: the shares that were asked for, no row twice, the same rows for the same seed, each with its source.

As a source of a configuration (`mix:`), and as a folder (`pico data merge`).
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from picolm.data import open_source
from picolm.data.inspection import verify
from picolm.data.merge import merge
from picolm.data.mix import shares
from picolm.data.prepare import prepare
from picolm.errors import DataError

OPTIONS: dict[str, Any] = {"seq_len": 16, "seed": 1, "val_fraction": 0.1}


@pytest.fixture
def parts(write_texts: Any, tmp_path: Path, story: Callable[[int], str]) -> tuple[Path, Path]:
    """`stories` (two sources) and `code` (none named), with one tokenizer."""
    texts = write_texts({
        "stories/old/a.jsonl": [{"text": story(i)} for i in range(40)],
        "stories/new/b.jsonl": [{"text": story(i)} for i in range(40, 60)],
        "code.jsonl": [{"text": story(i)} for i in range(60, 90)],
    })  # fmt: skip
    prepare([texts / "stories"], tmp_path / "stories", vocab_size=300, **OPTIONS)
    prepare([texts / "code.jsonl"], tmp_path / "code", tokenizer=tmp_path / "stories", **OPTIONS)
    return tmp_path / "stories", tmp_path / "code"


def rows_of(folder: Path, split: str = "train") -> tuple[list[tuple[int, ...]], list[str]]:
    source = open_source(str(folder), split=split)
    everything = np.arange(len(source))
    labels = source.labels(everything)
    return [tuple(row) for row in source.rows(everything).tolist()], labels or [folder.name] * len(source)


def test_all_rows_of_all_parts_each_with_its_source(parts: tuple[Path, Path], tmp_path: Path) -> None:
    manifest = merge(parts, tmp_path / "out")
    assert manifest is not None
    for split in ("train", "val"):
        expected = Counter(pair for part in parts for pair in zip(*rows_of(part, split)))
        tokens, labels = rows_of(tmp_path / "out", split)
        assert Counter(zip(tokens, labels)) == expected
        assert labels != sorted(labels, key=labels.index)  # they are mixed
    assert set(manifest.sources) == {"old", "new", "code"}
    assert verify(tmp_path / "out") == []
    source = open_source(str(tmp_path / "out"))
    assert source.tokenizer_file == tmp_path / "out" / "tokenizer.json"


def test_weights_are_shares_of_the_training_rows(parts: tuple[Path, Path], tmp_path: Path) -> None:
    available = [len(rows_of(part)[0]) for part in parts]
    manifest = merge(parts, tmp_path / "out", weights=[0.5, 0.5], rows_per_shard=100)
    assert manifest is not None
    tokens, labels = rows_of(tmp_path / "out")
    assert labels.count("code") == len(labels) // 2 == min(available)
    assert not Counter(tokens) - Counter(rows_of(parts[0])[0] + rows_of(parts[1])[0])  # no row is taken twice
    assert len(rows_of(tmp_path / "out", "val")[0]) == sum(len(rows_of(part, "val")[0]) for part in parts)
    first, second = Counter(labels[: len(labels) // 2]), Counter(labels[len(labels) // 2 :])
    assert abs(first["code"] - second["code"]) < 4 * np.sqrt(len(labels)) / 2  # evenly, from beginning to end
    few = merge(parts, tmp_path / "few", weights=[3, 1], rows=41)
    assert few is not None
    assert few.rows("train") == 41
    assert Counter(rows_of(tmp_path / "few")[1])["code"] == 10
    assert verify(tmp_path / "out") == []


def test_the_same_seed_the_same_rows(parts: tuple[Path, Path], tmp_path: Path) -> None:
    one = merge(parts, tmp_path / "one", weights=[1, 1], rows=50)
    assert merge(parts, tmp_path / "two", weights=[1, 1], rows=50) == one
    assert merge(parts, tmp_path / "one", weights=[1, 1], rows=50) == one  # it is there already
    other = merge(parts, tmp_path / "other", weights=[1, 1], rows=50, seed=43)
    assert set(rows_of(tmp_path / "one")[0]) != set(rows_of(tmp_path / "other")[0])
    assert other != one
    with pytest.raises(DataError, match=r"one: holds rows made in another way \(seed 42 there, 43 asked for\)"):
        merge(parts, tmp_path / "one", weights=[1, 1], rows=50, seed=43)


def test_parts_that_do_not_fit_are_refused(parts: tuple[Path, Path], tmp_path: Path, write_texts: Any) -> None:
    texts = write_texts({"c.txt": "some other text " * 100})
    prepare([texts / "c.txt"], tmp_path / "other", vocab_size=290, seq_len=16)
    prepare([texts / "c.txt"], tmp_path / "longer", tokenizer=parts[0], seq_len=32)
    with pytest.raises(DataError, match=r"other: was made with another tokenizer than .*stories, .*--tokenizer"):
        merge([parts[0], tmp_path / "other"], tmp_path / "out")
    with pytest.raises(DataError, match=r"longer: has rows of 33 tokens and .*stories of 17; .*--seq-len 16"):
        merge([parts[0], tmp_path / "longer"], tmp_path / "out")
    with pytest.raises(DataError, match="two or more different folders"):
        merge([parts[0], parts[0]], tmp_path / "out")
    with pytest.raises(DataError, match=r"texts: is no folder of prepared rows"):
        merge([parts[0], texts], tmp_path / "out")
    (parts[1] / "train-00000-of-00001.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"train-00000-of-00001.parquet: has 0 bytes, the manifest says \d+ bytes\nsee"):
        merge(parts, tmp_path / "out")


def test_a_mixture_is_a_source_with_the_rows_of_the_merged_folder(parts: tuple[Path, Path], tmp_path: Path) -> None:
    merge(parts, tmp_path / "out", weights=[0.75, 0.25])
    name = f"mix:{parts[0]}*0.75, {parts[1]}*0.25"
    for split in ("train", "val"):
        merged, mixture = (open_source(place, split=split) for place in (str(tmp_path / "out"), name))
        everything = np.arange(len(merged))
        assert len(mixture) == len(merged)
        assert np.array_equal(mixture.rows(everything), merged.rows(everything))
        assert np.array_equal(mixture.rows(everything[::-3]), merged.rows(everything[::-3]))
        assert mixture.labels(everything) == merged.labels(everything)
    source = open_source(name)
    where, _, row = source.locate(5).rpartition(" row ")
    assert Path(where).parent in parts
    assert np.array_equal(source.rows(np.array([5])), open_source(str(Path(where).parent)).rows(np.array([int(row)])))
    assert (source.eos, source.max_token, source.row_length) == (0, 299, 17)
    assert source.tokenizer_file == parts[0] / "tokenizer.json"
    assert source.fingerprint == open_source(name).fingerprint != open_source(name.replace("0.75", "0.7")).fingerprint
    assert len(open_source(f"mix:{parts[0]},{parts[1]}")) == sum(len(open_source(str(part))) for part in parts)
    assert open_source(name, row_length=9).rows(np.arange(3)).shape == (3, 9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mix:{0}", "takes two or more sources, all or none with a weight, such as mix:books"),
        ("mix:{0}*1,{1}", "all or none with a weight"),
        ("mix:{0}*much,{1}*1", "'much' is no weight"),
        ("mix:{0}*0,{1}*1", "all have to be above 0"),
        ("mix:{0},nothing", "data set 'nothing' is not found"),
        ("mix:{0},my_lab.rows:code", "my_lab.rows:code is code, which cannot be part of a mix"),
    ],
)
def test_what_cannot_be_mixed(parts: tuple[Path, Path], name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_source(name.format(*parts))


@pytest.mark.parametrize(
    ("weights", "rows", "message"),
    [
        ([1], None, "1 weights for 2 sources"),
        ([1, 0], None, "all have to be above 0"),
        ([1, 1], 61, r"61 rows cannot be had: .* the weights allow 60 \(there are: 100, 30\)"),
        (None, 0, "0 rows cannot be had"),
    ],
)
def test_shares_that_cannot_be_had(weights: list[float] | None, rows: int | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        shares([100, 30], weights, rows)


@given(
    available=st.lists(st.integers(1, 10**6), min_size=2, max_size=5),
    weights=st.lists(st.floats(0.001, 1000), min_size=5, max_size=5),
    part=st.floats(0.01, 1),
)
def test_shares_are_within_one_row_and_within_what_there_is(
    available: list[int], weights: list[float], part: float
) -> None:
    weights = weights[: len(available)]
    try:
        most = sum(shares(available, weights, None))
    except DataError:
        return  # not one row can be had
    rows = max(1, int(part * most))
    taken = shares(available, weights, rows)
    assert sum(taken) == rows
    for count, weight, there in zip(taken, weights, available):
        assert abs(count - rows * weight / sum(weights)) < 1 + 1e-6
        assert count <= there
    assert most + 1 > min(there * sum(weights) / weight for there, weight in zip(available, weights)) * (1 - 1e-9) - 1


def test_round_shares_lose_no_row_to_rounding() -> None:
    assert shares([30, 70], [0.3, 0.7], None) == [30, 70]
    assert shares([1, 9], [0.1, 0.9], None) == [1, 9]
