"""Documents out of files of every kind, with what they are from; what cannot be used is counted and named."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from picolm.data import documents
from picolm.data.documents import Reader, TextFile, digest_files, find_files
from picolm.errors import DataError

Texts = Callable[[dict[str, Any]], Path]


def read(*paths: Path, longest: int = documents.LONGEST) -> tuple[list[tuple[str, str | None]], Reader]:
    reader = Reader(longest)
    return [tuple(document) for file in find_files(paths) for document in reader.documents(file)], reader


def test_every_kind_of_file_in_the_order_of_names(write_texts: Texts) -> None:
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in ("four", "five"))
    folder = write_texts({
        "a.txt": "one\nstill one", "b.md": "# two", "c.jsonl": [{"text": "three"}], "d.jsonl.gz": gzip.compress(lines),
        "e.jsonl.zst": pa.compress(lines, "zstd", asbytes=True), "f.txt.gz": gzip.compress("\ufeffsix".encode()),
        "notes.pdf": b"%PDF", ".hidden.txt": "no", ".git/x.txt": "no",
    })  # fmt: skip
    pq.write_table(pa.table({"text": ["seven", "eight"]}), folder / "g.parquet")
    found, reader = read(folder)
    texts = [text for text, _ in found]
    assert texts == [
        "one\nstill one",
        "# two",
        "three",
        "four",
        "five",
        "four",
        "five",
        "six",
        "seven",
        "eight",
    ]
    assert {source for _, source in found} == {None}
    assert reader.bad_lines == 0
    assert reader.bytes_read == sum(file.path.stat().st_size for file in find_files([folder]))


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_files_of_several_compressed_parts_are_read_to_their_end(write_texts: Texts, kind: str) -> None:
    lines = [json.dumps({"text": f"{number} " * 300}).encode() + b"\n" for number in range(40)]
    pack = gzip.compress if kind == "gz" else lambda part: pa.compress(part, "zstd", asbytes=True)
    found, _ = read(write_texts({f"a.jsonl.{kind}": b"".join(map(pack, lines))}))
    assert [int(text.split()[0]) for text, _ in found] == list(range(40))


def test_the_source_is_the_field_else_the_first_folder(write_texts: Texts) -> None:
    folder = write_texts({
        "books/old/a.txt": "one", "web/b.jsonl": [{"text": "two"}, {"text": "three", "source": "news"}], "c.txt": "four",
    })  # fmt: skip
    pq.write_table(pa.table({"text": ["five", "six"], "source": ["x", None]}), folder / "web" / "d.parquet")
    assert read(folder)[0] == [
        ("one", "books"), ("four", None), ("two", "web"), ("three", "news"), ("five", "x"), ("six", "web"),
    ]  # fmt: skip


def test_bad_lines_are_named_and_left_out(write_texts: Texts) -> None:
    broken = (
        b'{"text": "good"}\n{"text": \n[1]\n{"txt": "x"}\n{"text": 7}\n\n{"text": "\\ud800"}\n{"text": "also good"}'
    )
    folder = write_texts({"a.jsonl": broken, "b.txt": b"fine\n\xff\xfe\nfine too\n"})
    found, reader = read(folder)
    texts = [text for text, _ in found]
    assert texts == ["good", "also good", "fine\nfine too\n"]
    assert reader.bad_lines == 6
    assert reader.first_bad_lines[0].startswith("a.jsonl:2: ")
    assert reader.first_bad_lines[1] == "a.jsonl:3: no text in the field `text`"
    assert [line.split(" ")[0] for line in reader.first_bad_lines[2:]] == ["a.jsonl:4:", "a.jsonl:5:", "a.jsonl:7:"]


def test_bad_rows_of_a_table_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", None, "b"]}), tmp_path / "t.parquet")
    found, reader = read(tmp_path)
    texts = [text for text, _ in found]
    assert texts == ["a", "b"]
    assert reader.first_bad_lines == ["t.parquet:2: no text in the field `text`"]


def test_white_space_is_no_document(write_texts: Texts) -> None:
    assert read(write_texts({"a.txt": " \n\n", "b.jsonl": [{"text": ""}, {"text": "x"}]}))[0] == [("x", None)]


def test_a_long_text_is_cut_at_line_ends_and_nothing_is_lost(write_texts: Texts) -> None:
    text = "".join(f"line {number} of the text\n" for number in range(500))
    found, _ = read(write_texts({"a.txt": text}), longest=1000)
    pieces = [piece for piece, _ in found]
    assert "".join(pieces) == text
    assert all(piece.endswith("\n") for piece in pieces)
    assert max(map(len, pieces)) < 1100


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_text_without_line_ends_is_cut_between_characters(
    write_texts: Texts, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(documents, "LONGEST", 10)
    text = "aé漢😀" * 9
    found, reader = read(write_texts({name: [{"text": text}] if name == "a.jsonl" else text}), longest=10)
    assert "".join(piece for piece, _ in found) == text
    assert reader.bad_lines == 0
    assert max(len(piece) for piece, _ in found) <= 10


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Z", "C"]), min_size=1), st.integers(1, 9))
def test_cutting_a_text_anywhere_loses_nothing(tmp_path: Path, text: str, longest: int) -> None:
    (tmp_path / "a.txt").write_text(text, newline="")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(documents, "LONGEST", longest)
        found, reader = read(tmp_path, longest=longest)
    assert "".join(piece for piece, _ in found) == text
    assert reader.bad_lines == 0


def test_files_that_cannot_be_read_are_errors(write_texts: Texts) -> None:
    folder = write_texts({"cut.jsonl.gz": gzip.compress(json.dumps({"text": "x" * 5000}).encode())[:-30]})
    with pytest.raises(DataError, match=r"cut.jsonl.gz: cannot be read .*truncated"):
        read(folder)
    (folder / "cut.jsonl.gz").unlink()
    pq.write_table(pa.table({"body": ["x"]}), folder / "t.parquet")
    with pytest.raises(DataError, match=r"t.parquet: has no column text \(it has: body\)"):
        read(folder)
    (folder / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"t.parquet: cannot be read as parquet"):
        read(folder)


def test_paths_without_text_say_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing: there is no such file or folder"):
        find_files([tmp_path / "nothing"])
    with pytest.raises(
        DataError, match=r"no text files in there \(.txt, .text, .md, .*.parquet; all but .parquet also .gz or .zst\)"
    ):
        find_files([tmp_path])
    (tmp_path / "a.docx").touch()
    with pytest.raises(DataError, match=r"a.docx: is not of a known kind \(.txt, .text, .md, .markdown, .jsonl"):
        find_files([tmp_path / "a.docx"])


def test_a_file_named_twice_is_read_once(write_texts: Texts) -> None:
    folder = write_texts({"a.txt": "one", "b.txt": "two"})
    assert [file.name for file in find_files([folder / "b.txt", folder])] == ["b.txt", "a.txt"]


def test_the_digest_tells_names_sources_and_contents_but_not_places(write_texts: Texts, tmp_path: Path) -> None:
    files = find_files([write_texts({"a/a.txt": "one", "a/b.txt": "two"})])
    (tmp_path / "moved").mkdir()
    moved = [TextFile(tmp_path / "moved" / file.path.name, file.name, file.source) for file in files]
    for old, new in zip(files, moved):
        new.path.write_bytes(old.path.read_bytes())
    assert digest_files(files) == digest_files(moved)
    others = [files[::-1], [files[0]._replace(source="b"), files[1]], [files[0]._replace(name="c"), files[1]]]
    files[0].path.write_text("three")
    assert len({digest_files(moved), digest_files(files), *map(digest_files, others)}) == 5
