"""What is said of prepared rows is counted again another way; what is changed in them is noticed and named."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from picolm.data import open_source
from picolm.data.inspection import inspect, verify
from picolm.data.prepare import prepare
from picolm.data.tokenizer import load_tokenizer
from picolm.errors import DataError


@pytest.fixture
def rows(write_texts: Any, tmp_path: Path, story: Callable[[int], str]) -> Path:
    """Prepared rows of two sources; two held-out rows are training rows too."""
    texts = write_texts({
        "books/a.jsonl": [{"text": story(i)} for i in range(30)], "web/b.jsonl": [{"text": story(i)} for i in range(30, 60)],
    })  # fmt: skip
    prepare([texts], tmp_path / "rows", vocab_size=300, seq_len=16, val_fraction=0.2)
    return tmp_path / "rows"


def tokens_of(folder: Path, split: str) -> np.ndarray:
    source = open_source(str(folder), split=split)
    return source.rows(np.arange(len(source)))


def rewrite(folder: Path, split: str, tokens_RT: np.ndarray) -> None:
    """Other tokens in the one shard of a split; of the manifest, only the size follows."""
    path = folder / f"{split}-00000-of-00001.parquet"
    table = pq.read_table(path)
    column = pa.FixedSizeListArray.from_arrays(pa.array(tokens_RT.astype(np.int32).reshape(-1)), tokens_RT.shape[1])
    pq.write_table(table.slice(0, len(column)).set_column(0, "input_ids", column), path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"][split][0]["bytes"] = path.stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_tokens_are_counted_and_rows_are_text(rows: Path) -> None:
    found = inspect(rows, tokens=7, rows=3, seed=5)
    counts = Counter(np.concatenate([tokens_of(rows, split).reshape(-1) for split in ("train", "val")]).tolist())
    expected = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:7]
    assert [(token.id, token.times) for token in found.frequent] == expected
    tokenizer = load_tokenizer(rows)
    assert [token.text for token in found.frequent] == [tokenizer.decode([number]) for number, _ in expected] or any(
        token.text == "<|endoftext|>" for token in found.frequent
    )
    assert found.unused_ids == 300 - len(counts)
    for sample in found.samples:
        row = tokens_of(rows, sample.split)[sample.number]
        assert sample.text == tokenizer.decode(row.tolist(), skip_special_tokens=False)
        assert sample.source in ("books", "web")
    assert {sample.split for sample in found.samples} == {"train", "val"}
    assert inspect(rows, rows=3, seed=5).samples == found.samples
    assert inspect(rows, rows=3, seed=6).samples != found.samples


def test_rows_on_both_sides_are_found(rows: Path) -> None:
    held_out, training = tokens_of(rows, "val").copy(), tokens_of(rows, "train")
    assert inspect(rows).repeated == 0
    held_out[[3, 8, 9]] = training[[40, 0, 0]]
    held_out[5, 0] += 1
    rewrite(rows, "val", held_out)
    found = inspect(rows)
    assert (found.repeated, found.repeated_rows) == (3, [3, 8, 9])


def test_what_is_whole_has_no_problem(rows: Path) -> None:
    assert verify(rows) == []


def test_every_change_is_named(rows: Path) -> None:
    tokens_RT = tokens_of(rows, "train")
    shard = "train-00000-of-00001.parquet: "
    changed = tokens_RT.copy()
    changed[2, 3] = 7777
    rewrite(rows, "train", changed)
    said = "\n".join(verify(rows))
    for problem in (
        f"{shard}its sha-256 is not that of the manifest",
        f"{shard}its rows are not those of the manifest (digest of tokens and sources)",
        f"{shard}has token ids from 0 to 7777; the vocabulary has 300 entries",
        f"{shard}its largest token id is 7777, 299 in the manifest",
    ):
        assert problem in said
    with pytest.raises(DataError, match="token 7777 is beyond the vocabulary of 300; see verify"):
        inspect(rows)
    rewrite(rows, "train", tokens_RT[:, :-1])
    assert any("has rows of 16 tokens, 17 in the manifest" in problem for problem in verify(rows))
    rewrite(rows, "train", tokens_RT[:-1])
    assert any(
        f"has {len(tokens_RT) - 1} rows, {len(tokens_RT)} in the manifest" in problem for problem in verify(rows)
    )
    (rows / "train-00000-of-00001.parquet").write_bytes(b"no parquet")
    assert any("cannot be read as parquet" in problem for problem in verify(rows))
    (rows / "train-00000-of-00001.parquet").unlink()
    (rows / "tokenizer.json").write_text("{}")
    (rows / "val-00001-of-00002.parquet").write_bytes(b"")
    said = "\n".join(verify(rows))
    for problem in (
        "parquet: is missing",
        "tokenizer.json: is not the tokenizer that made the rows",
        "is not in the manifest",
    ):
        assert problem in said


def test_a_shard_is_opened_once_however_many_groups_it_has(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = rows / "train-00000-of-00001.parquet"
    pq.write_table(pq.read_table(path), path, row_group_size=1)
    opened, read = list[int](), pq.ParquetFile
    monkeypatch.setattr(pq, "ParquetFile", lambda *words, **options: opened.append(1) or read(*words, **options))  # type: ignore[func-returns-value]
    verify(rows)
    assert len(opened) <= 4  # of both splits


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"text": ["a"]}, "has no column input_ids"),
        ({"input_ids": ["a"]}, "rows of integers"),
        ({"input_ids": [[0.5]]}, "token ids are integers"),
        ({"input_ids": [[1], None]}, "holds nulls"),
        ({"input_ids": [[1, 2], [1]]}, "rows must be equally long"),
        ({"input_ids": [[]]}, "token ids are integers|has no tokens"),
    ],
    ids=str,
)
def test_a_shard_of_another_kind_is_a_message_wherever_it_is_read(rows: Path, column: Any, message: str) -> None:
    pq.write_table(pa.table(column), rows / "val-00000-of-00001.parquet")
    assert any(re.search(message, problem) for problem in verify(rows)), verify(rows)
    with pytest.raises(DataError, match=message):
        inspect(rows)


@pytest.mark.parametrize("groups", [0, 1])
def test_a_shard_without_rows_is_named(rows: Path, groups: int) -> None:
    path = rows / "val-00000-of-00001.parquet"
    empty = pq.read_table(path).slice(0, 0)
    with pq.ParquetWriter(path, empty.schema) as writer:
        for _ in range(groups):
            writer.write_batch(pa.RecordBatch.from_pylist([], empty.schema))
    assert any("has 0 rows" in problem for problem in verify(rows)), verify(rows)
    with pytest.raises(DataError, match="val-00000-of-00001"):
        inspect(rows)


def test_numbers_in_the_manifest_are_checked(rows: Path) -> None:
    manifest = json.loads((rows / "manifest.json").read_text())
    manifest["tokens"] += 1
    manifest["sources"]["web"]["train_rows"] += 1
    (rows / "manifest.json").write_text(json.dumps(manifest))
    said = "\n".join(verify(rows))
    assert f"the manifest says {manifest['tokens']} tokens, its rows are {manifest['tokens'] - 1}" in said
    assert "rows of train by source" in said


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    for look in (inspect, verify):
        with pytest.raises(DataError, match=r"is no folder of prepared rows \(no manifest.json\)"):
            look(tmp_path)
