"""Text into rows: nothing lost, nothing mixed, nothing leaked, and the same result every time, in bounded memory."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from picolm.data import open_source
from picolm.data.manifest import Manifest, digest_of, read_manifest
from picolm.data.parquet import open_parquet
from picolm.data.prepare import prepare
from picolm.data.tokenizer import load_tokenizer
from picolm.errors import DataError

OPTIONS: dict[str, Any] = {"vocab_size": 300, "seq_len": 32, "seed": 1}


@pytest.fixture
def corpus(write_texts: Any, story: Callable[[int], str]) -> Path:
    """Sixty short texts of two sources; each holds a word of its own."""
    return write_texts({
        **{f"books/{i:02d}.txt": story(i) for i in range(30)},
        "web/pages.jsonl": [{"text": story(i)} for i in range(30, 60)],
    })  # fmt: skip


def rows_of(folder: Path, split: str = "train") -> tuple[np.ndarray, list[str] | None]:
    source = open_source(str(folder), split=split)
    everything = np.arange(len(source))
    return source.rows(everything), source.labels(everything)


def texts_of(folder: Path, split: str) -> list[tuple[str | None, list[str]]]:
    """(source, whole documents) of each row: what stands between two ends of text."""
    tokens_RT, labels = rows_of(folder, split)
    tokenizer = load_tokenizer(folder)
    found = []
    for row, tokens_T in enumerate(tokens_RT):
        ends = np.flatnonzero(tokens_T == 0)
        whole = [tokenizer.decode(tokens_T[a + 1 : b].tolist()) for a, b in pairwise(ends)]
        found.append((labels[row] if labels else None, whole))
    return found


def contents(manifest: Manifest) -> list[str]:
    return [shard.content for shards in manifest.splits.values() for shard in shards]


def test_no_token_is_lost(corpus: Path, tmp_path: Path, story: Callable[[int], str]) -> None:
    manifest = prepare([corpus], tmp_path / "out", **OPTIONS)
    tokenizer = load_tokenizer(tmp_path / "out")
    expected = sum(len(tokenizer.encode(story(number)).ids) + 1 for number in range(60))
    assert manifest.tokens + manifest.dropped_tokens == expected
    assert manifest.dropped_tokens < 2 * 33
    tokens_RT, labels = rows_of(tmp_path / "out")
    assert tokens_RT.shape == (manifest.tokens // 33, 33)
    assert sorted(set(labels or [])) == ["books", "web"]


def test_each_row_holds_consecutive_text_of_one_source(
    corpus: Path, tmp_path: Path, story: Callable[[int], str]
) -> None:
    prepare([corpus], tmp_path / "out", **OPTIONS | {"seq_len": 400})
    numbers = {story(number): number for number in range(60)}
    found = texts_of(tmp_path / "out", "train")
    assert sum(len(texts) for _, texts in found) >= 20
    for source, texts in found:
        for text in texts:
            assert source == ("books" if numbers[text] < 30 else "web")


def test_held_out_documents_are_in_one_split_only(corpus: Path, tmp_path: Path) -> None:
    manifest = prepare([corpus], tmp_path / "out", **OPTIONS, val_fraction=0.1)
    tokenizer = load_tokenizer(tmp_path / "out")

    def own_words(split: str) -> set[str]:
        texts = (tokenizer.decode(row.tolist()) for row in rows_of(tmp_path / "out", split)[0])
        return {word for text in texts for word in text.split()[1:-1] if word[0] == "n" and word[1:].isdigit()}

    assert not own_words("train") & own_words("val")
    assert len(own_words("val")) <= 6
    assert set(rows_of(tmp_path / "out", "val")[1] or []) == {"books", "web"}
    by_source = manifest.sources
    assert {name: numbers["documents"] for name, numbers in by_source.items()} == {"books": 30, "web": 30}
    assert sum(numbers["val_rows"] for numbers in by_source.values()) == manifest.rows("val")


def test_a_source_of_one_document_is_never_held_out(
    write_texts: Any, tmp_path: Path, story: Callable[[int], str]
) -> None:
    texts = write_texts({"one/a.txt": story(0) * 5, **{f"two/{i}.txt": story(i) for i in range(1, 9)}})
    manifest = prepare([texts], tmp_path / "out", **OPTIONS, val_fraction=0.9)
    assert manifest.sources["one"]["val_rows"] == 0
    assert manifest.sources["one"]["train_rows"] > 0
    assert manifest.sources["two"]["train_rows"] > 0


@pytest.mark.slow
def test_one_long_text_has_a_held_out_part_too(write_texts: Any, tmp_path: Path, story: Callable[[int], str]) -> None:
    text = "".join(story(number) for number in range(2500))  # about 800 kB
    manifest = prepare([write_texts({"book.txt": text})], tmp_path / "out", **OPTIONS, val_fraction=0.1)
    assert 0.05 < manifest.rows("val") / manifest.rows("train") < 0.2


@pytest.mark.slow
def test_the_result_follows_from_inputs_and_options_alone(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare([corpus], tmp_path / "one", **OPTIONS, val_fraction=0.1)
    shutil.move(corpus, tmp_path / "moved")
    assert prepare([tmp_path / "moved"], tmp_path / "two", **OPTIONS, val_fraction=0.1) == first
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr("picolm.data.prepare._BATCH_DOCUMENTS", 3)
    for unit_bytes in (2000, 7000):
        assert (
            prepare(
                [tmp_path / "moved"],
                tmp_path / f"{unit_bytes}",
                **OPTIONS,
                val_fraction=0.1,
                unit_bytes=unit_bytes,
                workers=1,
            )
            == first
        )
    others = [{"seed": 2}, {"seq_len": 31}, {"vocab_size": 299}, {"val_fraction": 0.2}]
    digests = [
        contents(prepare([tmp_path / "moved"], tmp_path / f"other{i}", **{**OPTIONS, **other}))
        for i, other in enumerate(others)
    ]
    assert len({tuple(digest) for digest in [contents(first), *digests]}) == 5


def test_golden_rows(corpus: Path, tmp_path: Path) -> None:
    manifest = prepare([corpus], tmp_path / "out", **OPTIONS, val_fraction=0.1)
    assert digest_of(contents(manifest))[:16] == "c25d6406762df3aa"


def test_shards_and_manifest_agree(corpus: Path, tmp_path: Path) -> None:
    import hashlib

    options = {"vocab_size": 300, "seq_len": 16, "seed": 1, "val_fraction": 0.1, "workers": 1}
    manifest = prepare([corpus], tmp_path / "out", **options, rows_per_shard=100)
    shards = manifest.splits["train"]
    assert [shard.rows for shard in shards] == [100] * (len(shards) - 1) + [manifest.rows("train") % 100]
    assert shards[0].file == f"train-00000-of-{len(shards):05d}.parquet"
    tokens_RT, _ = rows_of(tmp_path / "out")
    for number, shard in enumerate(shards):
        path = tmp_path / "out" / shard.file
        assert (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()) == (shard.bytes, shard.sha256)
        assert tokens_RT[100 * number : 100 * number + shard.rows].max() == shard.max_token
    assert read_manifest(tmp_path / "out") == manifest
    source = open_source(str(tmp_path / "out"))
    assert (source.max_token, source.eos, source.row_length) == (max(shard.max_token for shard in shards), 0, 17)
    assert source.tokenizer_file == tmp_path / "out" / "tokenizer.json"
    whole = prepare([corpus], tmp_path / "whole", **options)
    assert np.array_equal(rows_of(tmp_path / "whole")[0], tokens_RT)  # the number of shards changes no row
    assert whole.rows("train") == manifest.rows("train")


def test_a_given_tokenizer_is_used_and_copied(corpus: Path, tmp_path: Path) -> None:
    prepare([corpus], tmp_path / "one", **OPTIONS)
    manifest = prepare([corpus], tmp_path / "two", tokenizer=tmp_path / "one", seq_len=32, seed=1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert np.array_equal(rows_of(tmp_path / "one")[0], rows_of(tmp_path / "two")[0])
    assert manifest.recipe["tokenizer"] == manifest.tokenizer["sha256"]


def test_the_same_again_is_left_alone_and_anything_else_refused(corpus: Path, tmp_path: Path, write_texts: Any) -> None:
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is as good as none
    first = prepare([corpus], out, **OPTIONS)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert prepare([corpus], out, **OPTIONS) == first
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(
        DataError, match=r"out: holds rows made in another way \(seed 1 there, 2 asked for\); choose another"
    ):
        prepare([corpus], out, **OPTIONS | {"seed": 2})
    with pytest.raises(DataError, match=r"texts: lies inside of .*texts, which is read; choose a folder outside"):
        prepare([corpus], corpus, **OPTIONS)
    write_texts({"more.txt": "x"})
    with pytest.raises(DataError, match=r"made in another way \(other text\)"):
        prepare([corpus], out, **OPTIONS)
    (corpus / "more.txt").unlink()
    (out / "train-00000-of-00001.parquet").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"parquet: has 0 bytes, the manifest .*\n.*out: is not whole; delete it and prep"
    ):
        prepare([corpus], out, **OPTIONS)


def test_a_folder_is_whole_or_absent_and_what_is_done_is_not_done_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    before = sorted(tmp_path.iterdir())
    with monkeypatch.context() as full_disk:
        full_disk.setattr("picolm.data.scan.written", fail)
        with pytest.raises(DataError, match=r"out: cannot be written \(.*No space left.*\); nothing of it was left"):
            prepare([corpus], tmp_path / "out", **OPTIONS)
        assert sorted(tmp_path.iterdir()) == before
    with monkeypatch.context() as full_disk:
        full_disk.setattr("picolm.data.shards.written", fail)
        kept = r"No space left on device\); what is done is kept in .*\.out\..{12}: the same command continues there"
        with pytest.raises(DataError, match=kept):
            prepare([corpus], tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()
    (unfinished,) = tmp_path.glob(".out.*")
    (unfinished / "result").mkdir(exist_ok=True)
    (unfinished / "result" / ".train-00000-of-00001.parquet.1-ab").write_bytes(b"torn by a kill")
    with monkeypatch.context() as finished:
        for step in ("scan.Reader", "prepare.train_tokenizer", "prepare.encode"):
            finished.setattr(f"picolm.data.{step}", fail)
        manifest = prepare([corpus], tmp_path / "out", **OPTIONS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "texts"]
    assert manifest == prepare([corpus], tmp_path / "again", **OPTIONS)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in (tmp_path / "again").iterdir()
    }


def test_two_at_once_do_not_disturb_each_other(corpus: Path, tmp_path: Path) -> None:
    made, trouble = list[Manifest](), list[Exception]()

    def make() -> None:
        try:
            made.append(prepare([corpus], tmp_path / "out", **OPTIONS))
        except Exception as error:
            trouble.append(error)

    threads = [threading.Thread(target=make) for _ in range(4)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert trouble == []
    assert all(manifest == made[0] for manifest in made)
    assert len(made) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "texts"]


def test_bad_lines_are_in_the_manifest(write_texts: Any, tmp_path: Path, story: Callable[[int], str]) -> None:
    texts = write_texts({"a.jsonl": [{"text": story(i)} for i in range(9)] + [1, {"text": None}]})
    manifest = prepare([texts], tmp_path / "out", **OPTIONS)
    assert (manifest.documents, manifest.bad_lines) == (9, 2)
    assert manifest.first_bad_lines == [f"a.jsonl:{line}: no text in the field `text`" for line in (10, 11)]
    assert open_parquet(str(tmp_path / "out")).labels(np.arange(2)) is None  # no document names a source


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({"a.txt": "  \n"}, {}, r"no text in the 1 files \(3 bytes\)"),
        ({"a.jsonl": "x\n"}, {}, r"no text in the 1 files .*; 1 lines could not be used: a.jsonl:1: Expecting value"),
        (
            {"a.txt": "short"},
            {},
            r"the corpus is too short for a single row: \d tokens at most, a row takes 33 \(1 documents in 1",
        ),
        (
            {"a.txt": "long " * 500},
            {"val_fraction": 0.1},
            "the held-out part of the corpus is too short .* hold out more",
        ),
        ({"a.txt": "x"}, {"val_fraction": 1.0}, "val_fraction is 1.0; it is a share of the documents"),
        ({"a.txt": "x"}, {"seq_len": 0}, "seq_len is 0"),
        ({"a.txt": "x"}, {"vocab_size": 100}, "a vocabulary of 100 is too small"),
        (
            {"a.jsonl": [{"text": "x", "source": str(i)} for i in range(1001)]},
            {},
            "more than 1000 different values of `source`",
        ),
    ],
)
def test_what_cannot_be_prepared(
    write_texts: Any, tmp_path: Path, files: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        prepare([write_texts(files)], tmp_path / "out", **{**OPTIONS, **options})
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


def test_progress_is_told_to_its_end(corpus: Path, tmp_path: Path) -> None:
    told = list[tuple[str, int, int | None]]()
    manifest = prepare([corpus], tmp_path / "out", **OPTIONS, progress=lambda *report: told.append(report))
    last = {what: (done, total) for what, done, total in told}
    size = sum(path.stat().st_size for path in corpus.rglob("*") if path.is_file())
    rows = manifest.rows("train")
    assert last == {
        "reading": (size, size), "training the tokenizer": (0, None), "tokenizing": (60, 60), "writing train": (rows, rows),
    }  # fmt: skip


def test_a_manifest_that_does_not_fit_its_shards_is_noticed(corpus: Path, tmp_path: Path) -> None:
    prepare([corpus], tmp_path / "out", **OPTIONS)
    shard = tmp_path / "out" / "train-00000-of-00001.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1  # one bit, of a page's data
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"train-00000-of-00001.parquet: cannot be read as parquet"):
        rows_of(tmp_path / "out")
    shard.write_bytes(content[:-1])
    with pytest.raises(
        DataError, match=r"parquet: has \d+ bytes, the manifest says \d+ bytes\n.*prepare the data again"
    ):
        open_source(str(tmp_path / "out"))
    shard.unlink()
    with pytest.raises(DataError, match=r"parquet: is missing, though the manifest lists it"):
        open_source(str(tmp_path / "out"))


def test_splits_that_were_not_prepared_are_explained(corpus: Path, tmp_path: Path) -> None:
    prepare([corpus], tmp_path / "out", **OPTIONS)
    with pytest.raises(DataError, match=r"has no split 'val' \(there are: train\); prepare it with --val-fraction"):
        open_source(str(tmp_path / "out"), split="val")
    with pytest.raises(DataError, match=r"out: rows of 33 tokens, and a row of training takes 65; .* --seq-len 64"):
        open_source(str(tmp_path / "out"), row_length=65)


def test_a_row_does_not_depend_on_how_it_was_compressed(corpus: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    prepare([corpus], tmp_path / "out", **OPTIONS)
    before = open_source(str(tmp_path / "out")).fingerprint
    shard = tmp_path / "out" / "train-00000-of-00001.parquet"
    pq.write_table(pq.read_table(shard), shard, compression="none")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    manifest["splits"]["train"][0] |= {"bytes": shard.stat().st_size, "sha256": ""}
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    assert open_source(str(tmp_path / "out")).fingerprint == before


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    program = """
import resource, sys
from picolm.data import prepare
prepare.prepare([sys.argv[1]], sys.argv[2], tokenizer=sys.argv[3], seq_len=256, deduplicate=True, unit_bytes=1 << 18, workers=1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""

    def peak_mib(megabytes: int) -> float:
        generator = np.random.default_rng(0)
        words = generator.integers(97, 123, (5000, 6), dtype=np.uint8)
        folder = tmp_path / f"{megabytes}"
        folder.mkdir()
        for number in range(megabytes):
            letters = words[generator.integers(0, 5000, 150_000)].copy()
            letters[:, -1] = 32
            lines = letters.tobytes().decode().replace(" ", "\n", 1)
            (folder / f"{number}.jsonl").write_text(
                "".join(
                    json.dumps({"text": lines[start : start + 3000]}) + "\n" for start in range(0, len(lines), 3000)
                )
            )
        tokenizer = tmp_path / "tokenizer"
        if not tokenizer.exists():
            prepare([folder / "0.jsonl"], tokenizer, vocab_size=1000, seq_len=64)
        arguments = [sys.executable, "-c", program, str(folder), str(tmp_path / f"out{megabytes}"), str(tokenizer)]
        done = subprocess.run(
            arguments, capture_output=True, text=True, check=True, env={**os.environ, "RAYON_NUM_THREADS": "2"}
        )
        return int(done.stdout) / 1024

    small, large = peak_mib(1), peak_mib(10)  # 4 and 40 times what is held at once
    assert large < small + 6, (small, large)  # of 9 MB more of text
