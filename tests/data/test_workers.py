"""Who does the work changes no byte: one process or several, and any of them killed on the way."""

import gzip
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from picolm.data.prepare import prepare
from picolm.errors import DataError

EXAMPLES = Path(__file__).parents[2] / "examples" / "corpora"
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
OPTIONS: dict[str, Any] = {
    "vocab_size": 400, "seq_len": 32, "seed": 3, "val_fraction": 0.1, "deduplicate": True,
    "filters": ["length,min_characters=20"], "unit_bytes": 8000, "rows_per_shard": 100,
}  # fmt: skip
PROGRAM = """
import sys
from picolm.data.prepare import prepare
prepare([sys.argv[1]], sys.argv[2], workers=2, **eval(sys.argv[3]))
"""


@pytest.fixture
def corpus(write_texts: Any, story: Callable[[int], str]) -> Path:
    """Some hundred texts of two sources in six files, among them short ones and duplicates."""
    return write_texts({
        **{
            f"web/{part}.jsonl": [{"text": story(i % 50)} for i in range(40 * part, 40 * part + 40)] + [{"text": "short"}]
            for part in range(4)
        },
        "books/a.txt": "".join(story(i) for i in range(100, 140)),
        "books/b.txt.gz": gzip.compress("".join(story(i) for i in range(140, 160)).encode()),
    })  # fmt: skip


def digests(folder: Path) -> dict[str, str]:
    """sha-256 of all files of a prepared folder."""
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def start(corpus: Path, out: Path) -> subprocess.Popen[bytes]:
    """The program with two workers, in a process group of its own; what it says of errors goes to a file beside the texts."""
    with (corpus.parent / "said").open("wb") as said:
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(corpus), str(out), repr(OPTIONS)], start_new_session=True, stderr=said
        )


@pytest.mark.slow
def test_one_process_and_two_give_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    alone = prepare([corpus], tmp_path / "alone", workers=1, **OPTIONS)
    with start(corpus, tmp_path / "several") as several:
        several.wait(120)
    assert (tmp_path / "said").read_text() == ""
    assert several.returncode == 0
    assert digests(tmp_path / "several") == digests(tmp_path / "alone")
    assert alone.left_out == {"length,min_characters=20": 4, "duplicates": 110}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "said", "several", "texts"]


@pytest.mark.slow
def test_killed_in_any_stage_and_started_again_it_ends_in_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    prepare([corpus], tmp_path / "alone", workers=1, **OPTIONS)
    out, reports = tmp_path / "killed", dict[Path, int]()
    for stage in ("scan", "decide", "block/000000", "tokenize", "write train"):
        with start(corpus, out) as process:
            while process.poll() is None and not list(tmp_path.glob(f".killed.*/reports/{stage}/[0-9]*")):
                time.sleep(0.005)
            os.killpg(process.pid, signal.SIGKILL)
        assert not out.exists()
        for path, written in reports.items():
            assert path.stat().st_mtime_ns == written  # what was finished was not done again
        reports = {path: path.stat().st_mtime_ns for path in tmp_path.glob(".killed.*/reports/*/*") if path.is_file()}
    assert len(reports) > 12
    with start(corpus, out) as process:
        process.wait(60)
    assert process.returncode == 0, (tmp_path / "said").read_text()
    assert digests(out) == digests(tmp_path / "alone")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "killed", "said", "texts"]


@pytest.mark.slow
def test_a_killed_process_that_had_all_but_the_name_is_finished(corpus: Path, tmp_path: Path) -> None:
    alone = prepare([corpus], tmp_path / "alone", workers=1, **OPTIONS)
    with pytest.MonkeyPatch.context() as killed:
        killed.setattr("picolm.data.prepare.publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare([corpus], tmp_path / "out", workers=1, **OPTIONS)
    assert not (tmp_path / "out").exists()
    with pytest.MonkeyPatch.context() as forbidden:
        forbidden.setattr("picolm.data.prepare._finish", lambda *_: pytest.fail("done again"))
        assert prepare([corpus], tmp_path / "out", workers=1, **OPTIONS) == alone
    assert digests(tmp_path / "out") == digests(tmp_path / "alone")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "out", "texts"]


def test_a_file_that_changes_while_it_is_read_is_an_error(corpus: Path, tmp_path: Path) -> None:
    from picolm.data import prepare as module

    decide = module.decide

    def change(*arguments: Any, **options: Any) -> Any:
        (corpus / "web" / "0.jsonl").write_text("")
        return decide(*arguments, **options)

    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(module, "decide", change)
        with pytest.raises(DataError, match=r"was changed while it was read"):
            prepare([corpus], tmp_path / "out", workers=1, **OPTIONS)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_failure_in_a_worker_is_told_as_it_is(write_texts: Any, tmp_path: Path) -> None:
    texts = write_texts({"a.jsonl.gz": b"no gzip", "b.txt": "fine", "c.txt": "fine"})
    with pytest.raises(DataError, match=r"a.jsonl.gz: cannot be read"):
        prepare([texts], tmp_path / "out", **OPTIONS | {"unit_bytes": 1}, workers=2)
    assert not (tmp_path / "out").exists()


def test_rows_that_an_older_version_made_are_left_as_they_are(corpus: Path, tmp_path: Path) -> None:
    import json

    first = prepare([corpus], tmp_path / "out", workers=1, **OPTIONS)
    assert first.recipe["version"] == 2
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    manifest["recipe"]["version"] = 1
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    before = digests(tmp_path / "out")
    assert prepare([corpus], tmp_path / "out", workers=1, **OPTIONS).recipe["version"] == 1
    assert digests(tmp_path / "out") == before


@pytest.mark.slow
def test_the_example_for_a_laptop(corpus: Path, tmp_path: Path) -> None:
    environment = os.environ | {"VOCAB_SIZE": "300", "SEQ_LEN": "32", "MIN_CHARACTERS": "20", "PATH": PATH}
    words = ["bash", str(EXAMPLES / "laptop.sh"), str(corpus), str(tmp_path / "rows")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Most frequent tokens:" in done.stdout
