"""Texts as people have them: any encoding, links, pipes, other files beside them; nothing is left out without a word."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from picolm.data import open_source
from picolm.data.documents import Reader, find_files, survey
from picolm.data.prepare import prepare
from picolm.data.tokenizer import load_tokenizer
from picolm.errors import DataError

LINES = "Größe 你好 …\nsecond line\n"
OPTIONS: dict[str, Any] = {"vocab_size": 280, "seq_len": 8}


def texts_of(place: Path) -> tuple[list[str], Reader]:
    reader = Reader()
    return [document.text for file in find_files([place]) for document in reader.documents(file)], reader


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("form", ["txt", "jsonl", "txt.gz"])
def test_a_byte_order_mark_decodes(tmp_path: Path, encoding: str, form: str) -> None:
    text = json.dumps({"text": LINES}, ensure_ascii=False) + "\n" if form == "jsonl" else LINES
    mark = "\ufeff" if encoding.endswith(("-le", "-be")) else ""
    content = (mark + text).encode(encoding)
    (tmp_path / f"a.{form}").write_bytes(gzip.compress(content) if form.endswith("gz") else content)
    found, reader = texts_of(tmp_path)
    assert (found, reader.bad_lines, reader.nul_characters) == ([LINES], 0, 0)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("form", ["txt", "jsonl"])
def test_text_of_nuls_is_refused_by_name(tmp_path: Path, encoding: str, form: str) -> None:
    (tmp_path / f"a.{form}").write_bytes('{"text": "plain English"}\n'.encode(encoding))
    with pytest.raises(
        DataError, match=rf"a.{form}: \d+ of its first \d+ bytes are NUL, so it is UTF-16 or UTF-32 without"
    ):
        texts_of(tmp_path)


def test_single_nuls_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text with a \0 in it. " * 20)
    (tmp_path / "b.jsonl").write_text('{"text": "one \\u0000 more"}\n')
    manifest = prepare([tmp_path], tmp_path.parent / f"{tmp_path.name}-rows", **OPTIONS)
    assert manifest is not None
    assert (manifest.nul_characters, manifest.files_with_nul) == (21, ["a.txt", "b.jsonl"])


def test_another_encoding_is_named_with_file_line_and_position(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("fine\nune élève\n".encode("latin-1"))
    found, reader = texts_of(tmp_path)
    assert found == ["fine\n"]
    assert reader.first_bad_lines[0].startswith(
        "a.txt:2: not UTF-8 (byte 0xe9 at position 5 of the line); text in another enc"
    )
    (tmp_path / "a.txt").write_bytes(b"\xff\xfea\x00\x00\xd8b\x00")
    with pytest.raises(DataError, match=r"a.txt: begins as UTF-16 and is not that after about byte"):
        texts_of(tmp_path)


def test_endings_count_in_any_case_and_what_is_not_read_is_named(tmp_path: Path) -> None:
    for name in (
        "a.TXT",
        "b.text",
        "c.Md",
        "d.markdown",
        "e.ndjson",
        "f.JSONL.GZ",
        "g.csv",
        "h.json",
        "i.csv",
        "j",
        "k.bz2",
    ):
        content = b'{"text": "x"}\n' if "son" in name.lower() else b"x"
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("GZ") else content)
    (tmp_path / "l.txt").symlink_to("nowhere")
    os.mkfifo(tmp_path / "m.txt")
    (tmp_path / "n.txt").symlink_to("/dev/zero")
    found = survey([tmp_path])
    assert "".join(file.name[0] for file in found.files) == "abcdef"
    assert found.not_read == {
        ".bz2": 1, ".csv": 2, ".json": 1, "link to nothing": 1, "no ending": 1, "not a regular file": 2,
    }  # fmt: skip
    assert found.first_not_read == ["g.csv", "h.json", "i.csv", "j", "k.bz2"]
    assert texts_of(tmp_path)[0] == ["x"] * 6
    for name, message in (("m.txt", "not a regular file"), ("l.txt", "no such file"), ("g.csv", "not of a known kind")):
        with pytest.raises(DataError, match=message):
            find_files([tmp_path / name])


def test_links_to_folders_are_followed_each_real_folder_once(tmp_path: Path) -> None:
    for name in ("texts/real/a.txt", "elsewhere/b.txt", "elsewhere/deep/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for name, target in (("again", "real"), ("loop", "."), ("out", "../elsewhere"), ("out2", "../elsewhere/deep")):
        (tmp_path / "texts" / name).symlink_to(target)
    (tmp_path / "texts" / "file.txt").symlink_to("../elsewhere/b.txt")
    found = survey([tmp_path / "texts"])
    assert [(file.name, file.source) for file in found.files] == [
        ("file.txt", None), ("out/deep/c.txt", "out"), ("real/a.txt", "real"),
    ]  # fmt: skip
    assert found.outside == ["file.txt", "out"]


def test_numbers_and_other_values_can_be_sources(tmp_path: Path) -> None:
    values = [3, 0.5, True, False, None, "", "x", {"b": 1, "a": [2]}, ["y"]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "t", "source": value}) + "\n" for value in values))
    labels = [document.source for file in find_files([tmp_path]) for document in Reader().documents(file)]
    assert labels == ["3", "0.5", "true", "false", None, None, "x", '{"a": [2], "b": 1}', '["y"]']


def test_what_would_take_the_memory_or_the_disk_is_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("picolm.data.documents._LONGEST_LINE", 1000)
    monkeypatch.setattr("picolm.data.documents._FREE_BYTES", 200_000)
    lines = [
        json.dumps({"text": "x" * 5000}),
        "[" * 900,
        json.dumps({"text": "good"}),
        '{"text": "a", "source": "\\ud800"}',
    ]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    found, reader = texts_of(tmp_path)
    assert found == ["good"]
    assert [line.split(": ")[0] for line in reader.first_bad_lines] == [f"a.jsonl.gz:{number}" for number in (1, 2, 4)]
    (tmp_path / "a.jsonl.gz").write_text("")
    for name, content in (("bomb.jsonl.gz", b"x" * 400_000), ("bomb.txt.zst", b"x" * 400_000)):
        pack = gzip.compress if name.endswith("gz") else lambda part: pa.compress(part, "zstd", asbytes=True)
        (tmp_path / "a.jsonl.gz").unlink(missing_ok=True)
        (tmp_path / name).write_bytes(pack(content))
        with pytest.raises(DataError, match=rf"{name}: gives more than 300 times its [\d,]+ bytes"):
            texts_of(tmp_path)
        (tmp_path / name).unlink()


def test_json_that_is_nested_too_deep_is_a_bad_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("[" * 100_000 + "]" * 100_000 + '\n{"text": "good"}\n')
    found, reader = texts_of(tmp_path)
    assert (found, reader.first_bad_lines) == (["good"], ["a.jsonl:1: nested too deep"])


def test_a_pointer_of_git_lfs_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(DataError, match=r"a.txt: is a pointer of Git LFS"):
        texts_of(tmp_path)


def decoded(folder: Path, split: str) -> str:
    source, tokenizer = open_source(str(folder), split=split), load_tokenizer(folder)
    return tokenizer.decode(source.rows(np.arange(len(source))).reshape(-1).tolist(), skip_special_tokens=False)


def test_given_files_are_held_out_wherever_they_lie(write_texts: Any, tmp_path: Path) -> None:
    texts = write_texts({f"{name}.txt": f"{name} " * 400 for name in ("one", "two", "held")})
    manifest = prepare([texts], tmp_path / "rows", val=[texts / "held.txt"], **OPTIONS)
    assert manifest is not None
    assert manifest.documents == 3
    assert "held" in decoded(tmp_path / "rows", "val")
    assert "held" not in decoded(tmp_path / "rows", "train")
    assert not {"one", "two"} & set(decoded(tmp_path / "rows", "val").split())
    with pytest.raises(DataError, match="in two ways; choose one of val, val_fraction and val_last"):
        prepare([texts], tmp_path / "x", val=[texts / "held.txt"], val_fraction=0.1, **OPTIONS)
    with pytest.raises(DataError, match=r"holds rows made in another way"):
        prepare([texts], tmp_path / "rows", **OPTIONS)


def test_the_last_part_of_each_document_is_held_out(write_texts: Any, tmp_path: Path) -> None:
    texts = write_texts({f"{name}.txt": f"begin{name} " * 360 + f"end{name} " * 40 for name in "abcd"})
    manifest = prepare([texts], tmp_path / "rows", val_last=0.07, **OPTIONS)
    assert manifest is not None
    assert manifest.documents == 4
    assert "end" in decoded(tmp_path / "rows", "val")
    assert "begin" not in decoded(tmp_path / "rows", "val")
    with pytest.raises(DataError, match=r"val_last is 1.5; it is a share of each document"):
        prepare([texts], tmp_path / "x", val_last=1.5, **OPTIONS)


def test_the_result_does_not_lie_among_the_texts(write_texts: Any, tmp_path: Path) -> None:
    texts = write_texts({"a/a.txt": "text " * 100})
    for out in (texts, texts / "rows", texts / "a" / "b" / "rows"):
        with pytest.raises(DataError, match=r"lies inside of .*texts, which is read; choose a folder outside"):
            prepare([texts], out, **OPTIONS)
    with pytest.raises(DataError, match=r"texts/a: lies inside of .*texts, which is to be made"):
        prepare([texts / "a"], texts, **OPTIONS)
