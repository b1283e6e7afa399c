"""Past one machine: datatrove's own pipeline on its own executors, as the example does it, and its files read as they lie."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from picolm.data import open_source
from picolm.data.batches import Batches
from picolm.data.prepare import prepare
from picolm.data.tokenizer import load_tokenizer
from picolm.errors import DataError

pytest.importorskip("datatrove", reason="datatrove is not installed (the extra corpora)")

EXAMPLE = Path(__file__).parents[2] / "examples" / "corpora" / "tokenize_with_datatrove.py"
LENGTH = 33


def tokenize(texts: Path, out: Path, tokenizer: Path, *words: str) -> None:
    """The example, in a process of its own."""
    command = [
        sys.executable,
        str(EXAMPLE),
        str(texts),
        str(out),
        "--tokenizer",
        str(tokenizer),
        "--seq-len",
        "32",
        *words,
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONSAFEPATH": "1"})
    assert done.returncode == 0, done.stderr


@pytest.fixture
def made(write_texts: Any, tmp_path: Path, story: Callable[[int], str]) -> tuple[Path, Path]:
    """Texts in four files, and a tokenizer."""
    texts = write_texts(
        {f"{part}.jsonl": [{"text": story(i)} for i in range(40 * part, 40 * part + 40)] for part in range(4)}
    )
    prepare([texts], tmp_path / "rows", vocab_size=300, seq_len=32)
    return texts, tmp_path / "rows" / "tokenizer.json"


@pytest.mark.slow
def test_the_tokens_of_all_documents_are_read_as_datatrove_reads_them(made: tuple[Path, Path], tmp_path: Path) -> None:
    from datatrove.utils.dataset import DatatroveFileDataset

    texts, tokenizer_file = made
    tokenize(texts, tmp_path / "out", tokenizer_file, "--tasks", "2")
    source = open_source(f"datatrove:{tmp_path}/out", row_length=LENGTH)
    files = sorted((tmp_path / "out" / "train").glob("*.ds"))
    assert len(files) == 2
    theirs = [
        dataset[row]
        for dataset in (DatatroveFileDataset(str(file), LENGTH - 1) for file in files)
        for row in range(len(dataset))
    ]
    ours = source.rows(np.arange(len(source)))
    assert np.array_equal(ours, np.stack([row["input_ids"].numpy() for row in theirs]))
    tokenizer = load_tokenizer(tokenizer_file)
    expected = Counter[int]()
    for file in texts.glob("*.jsonl"):
        for line in file.read_text().splitlines():
            expected.update([*tokenizer.encode(json.loads(line)["text"]).ids, 0])
    found = Counter(ours.reshape(-1).tolist())
    assert not found - expected
    assert (expected - found).total() < 2 * LENGTH  # what is left over at the end of each task
    assert source.tokenizer_file == tmp_path / "out" / "tokenizer.json"
    assert (
        source.locate(len(source) - 1) == f"{files[1]} row {len(source) - 1 - files[0].stat().st_size // 2 // LENGTH}"
    )
    batches = Batches(source, rows_per_step=4, seed=1, shuffle=True, length=LENGTH - 1, vocab_size=300)
    assert batches(3)[0].shape == (4, LENGTH)
    assert np.array_equal(source.rows(np.array([7, 2])), ours[[7, 2]])


def write_tokens(path: Path, tokens: np.ndarray, first_line: str | None = None) -> None:
    """A .ds file as datatrove writes one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tokens.tobytes())
    if first_line is not None:
        path.with_name(path.name + ".metadata").write_text(f"{first_line}\n{len(tokens)}\n{len(tokens)} T")


def test_ids_of_two_and_four_bytes_and_splits_by_name(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a" / "train_00000.ds", np.arange(70_000, 70_025, dtype=np.uint32), "tok.json|4")
    write_tokens(tmp_path / "a" / "train_00001.ds", np.arange(25, dtype=np.uint16), "tok.json|2")
    write_tokens(tmp_path / "a" / "val_00000.ds", np.arange(12, dtype=np.uint16))
    source = open_source(f"datatrove:{tmp_path}/a", row_length=10)
    assert source.rows(np.array([3, 1])).tolist() == [list(range(10, 20)), list(range(70_010, 70_020))]
    assert len(source) == 4  # of 25 tokens of a file, 5 are left over
    assert open_source(f"datatrove:{tmp_path}/a", split="validation", row_length=10).rows(np.array([0])).tolist() == [
        [*range(10)]
    ]
    other = open_source(f"datatrove:{tmp_path}/a/train_00001.ds", row_length=10)
    assert other.fingerprint != source.fingerprint
    assert (
        len(
            open_source(
                f"mix:datatrove:{tmp_path}/a/train_00000.ds*1,datatrove:{tmp_path}/a/train_00001.ds*1", row_length=10
            )
        )
        == 4
    )


def test_what_cannot_be_read_says_why(tmp_path: Path) -> None:
    def opened(name: str = "a", **options: Any) -> Any:
        return open_source(f"datatrove:{tmp_path}/{name}", **{"row_length": 10} | options)

    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match=r"a: there are no .ds files"):
        opened()
    write_tokens(tmp_path / "a" / "x.ds", np.arange(5, dtype=np.uint16))
    with pytest.raises(DataError, match=r"its 5 tokens are too few for a row of 10"):
        opened()
    with pytest.raises(DataError, match=r"has no .ds files of the split 'val' \(there are: train\)"):
        opened(split="val")
    with pytest.raises(DataError, match=r".ds files have no rows of their own"):
        opened(row_length=None)
    write_tokens(tmp_path / "a" / "x.ds", np.arange(30, dtype=np.uint8), "tok|4")
    with pytest.raises(DataError, match=r"x.ds: has 30 bytes, which are no whole tokens of 4 bytes"):
        opened()
    write_tokens(tmp_path / "a" / "x.ds", np.arange(30, dtype=np.uint16), "tok|three")
    with pytest.raises(DataError, match=r"x.ds.metadata: its first line should end in \|2 or \|4"):
        opened()
    write_tokens(tmp_path / "a" / "x.ds", np.full(30, 2**31, dtype=np.uint32), "tok|4")
    with pytest.raises(DataError, match=r"x.ds row 1: is cut off, or holds ids beyond 32 bits"):
        opened().rows(np.array([1]))
    (tmp_path / "a" / "x.ds").unlink()
    (tmp_path / "a" / "x.ds").symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"x.ds: is a link"):
        opened()


@pytest.mark.slow
def test_tasks_of_ray_do_the_same(made: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (the extra ray)")
    tokenize(*made_args(made, tmp_path / "local"), "--tasks", "2")
    tokenize(*made_args(made, tmp_path / "ray"), "--tasks", "2", "--executor", "ray", "--workers", "2")
    for file in (tmp_path / "local" / "train").glob("*.ds"):
        assert (tmp_path / "ray" / "train" / file.name).read_bytes() == file.read_bytes()


def made_args(made: tuple[Path, Path], out: Path) -> tuple[Path, Path, Path]:
    return made[0], out, made[1]
