"""`pico data …` as a user meets it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from picolm.cli import main
from picolm.data.manifest import read_manifest
from picolm.data.prepare import prepare

COMMAND = [sys.executable, "-c", "from picolm.cli import main; main()", "data"]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """`pico data ARGUMENTS` in this process: (exit code, what it prints, what it says of errors and progress)."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["pico", "data", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0), *capsys.readouterr()

    return run


@pytest.fixture
def texts(write_texts: Any, story: Callable[[int], str]) -> Path:
    return write_texts({
        "old/a.jsonl": [{"text": story(i)} for i in range(40)] + [{"text": story(3)}], "new/b.txt": story(50) * 20,
    })  # fmt: skip


def test_from_text_to_a_mixture(call: Call, texts: Path, tmp_path: Path) -> None:
    one, two, mixed = tmp_path / "one", tmp_path / "two", tmp_path / "mixed"
    options = ["--seq-len", 16, "--vocab-size", 300, "--val-fraction", 0.1]
    code, out, _ = call(
        "prepare", texts / "old", "--out", one, *options, "--deduplicate", "--filter", "length,min_characters=5"
    )
    assert code == 0
    assert "40 documents" in out
    assert "0 documents were left out: length,min_characters=5\n1 documents were left out: duplicates\n" in out
    assert call("prepare", texts / "new", "--out", two, "--seq-len", 16, "--tokenizer", one)[0] == 0
    code, out, _ = call("merge", one, two, "--weights", "0.75,0.25", "--rows", 200, "--out", mixed)
    assert code == 0
    manifest = read_manifest(mixed)
    assert manifest is not None
    assert {name: counts["train_rows"] for name, counts in manifest.sources.items()} == {"one": 150, "two": 50}
    code, out, _ = call("inspect", mixed, "--tokens", 3, "--rows", 1)
    assert code == 0
    assert "one: 40 documents, 150 rows (train)" in out
    assert f"0 of {manifest.rows('val')} held-out rows are training rows too" in out
    assert out.count("%") == 3
    assert "\nval row " in out
    assert call("verify", mixed)[0] == 0
    (mixed / "tokenizer.json").write_text("{}")
    code, _, err = call("verify", mixed)
    assert code == 1
    assert "is not the tokenizer that made the rows" in err
    assert "1 problems; prepare or fetch" in err


def test_weights_are_numbers(call: Call, tmp_path: Path) -> None:
    code, _, err = call("merge", tmp_path, tmp_path, "--out", tmp_path / "out", "--weights", "a,b")
    assert (code, "--weights a,b: numbers with commas between them" in err) == (1, True)


@pytest.mark.slow
def test_texts_of_the_hub_give_the_rows_of_the_same_texts_here(hub: Any, texts: Path, tmp_path: Path) -> None:
    texts.rename(tmp_path / "repository" / "text")
    (tmp_path / "repository" / "README.md").write_text("not within the folder that is asked for")
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    options = ["--seq-len", "16", "--vocab-size", "300"]
    words = ["prepare", "hub:lab/rows:text", "--out", str(tmp_path / "hub"), *options]
    done = subprocess.run([*COMMAND, *words], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    here = prepare([tmp_path / "repository" / "text"], tmp_path / "here", vocab_size=300, seq_len=16)
    fetched = read_manifest(tmp_path / "hub")
    assert fetched is not None
    assert here is not None
    assert fetched.splits == here.splits
    assert fetched.sources == here.sources
    words[1] = "hub:lab/rows:nothing"
    done = subprocess.run([*COMMAND, *words], env=environment, capture_output=True, text=True, timeout=120)
    assert "lab/rows: has no text files in nothing (3 files in all)" in done.stderr
