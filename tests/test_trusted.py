"""Files of others: what is no regular file, leads elsewhere, is too large or too deep is a message with the file and the key."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from picolm import trusted
from picolm.errors import DataError, FileError, FileMissing, StoreError


class Form(BaseModel):
    step: int
    files: dict[str, tuple[int, str]]


def test_a_regular_file_is_read_and_parsed_into_its_form(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"step": 3, "files": {"x": [1, "y"]}}')
    assert trusted.read_json(tmp_path / "a.json", Form, within=tmp_path) == Form(step=3, files={"x": (1, "y")})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"step": "3", "files": {}}', "a.json: step: should be a valid integer"),
        ('{"step": 3, "files": {"x": [1]}}', "a.json: files.x.1: Field required"),
        ('{"step": 3, "files": {"x": 5}}', "a.json: files.x: should be a valid array"),
        ("[]", "a.json: should be an object"),
        ("{", "a.json: Invalid JSON: EOF"),
        ("[" * 100_000 + "]" * 100_000, "a.json: Invalid JSON: recursion limit exceeded"),
        ('{"step": ' + "9" * 5000 + ', "files": {}}', "a.json: "),
    ],
)
def test_what_does_not_fit_is_told_with_its_key(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(FileError) as raised:
        trusted.read_json(tmp_path / "a.json", Form)
    assert message in str(raised.value)
    assert isinstance(raised.value, StoreError)
    assert isinstance(raised.value, DataError)


def test_many_problems_are_cut(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="30 problems in all") as raised:
        trusted.parse_json("[" + ",".join(['"x"'] * 30) + "]", "b.json", list[int])
    assert len(str(raised.value).splitlines()) == 11


@pytest.mark.parametrize("read", [trusted.read_bytes, trusted.read_text, trusted.read_json, trusted.require_regular])
def test_links_pipes_folders_and_devices_are_refused(tmp_path: Path, read: Any) -> None:
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        ("link", "is a link"),
        ("dangling", "is a link"),
        ("pipe", "is not a regular file"),
        (".", "is not a regular file"),
    ):
        with pytest.raises(FileError, match=message):
            read(tmp_path / name)
    with pytest.raises(FileError, match="is not a regular file"):
        read(Path("/dev/zero"))
    with pytest.raises(FileMissing, match="there is no such file"):
        read(tmp_path / "nothing")


def test_a_folder_that_is_a_link_is_refused_below_the_root_and_accepted_above(tmp_path: Path) -> None:
    (tmp_path / "real" / "inner").mkdir(parents=True)
    (tmp_path / "real" / "inner" / "a").write_text("text")
    (tmp_path / "root").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "other").symlink_to(tmp_path / "real" / "inner")
    root = tmp_path / "root"
    assert trusted.read_text(root / "inner" / "a", within=root) == "text"
    with pytest.raises(FileError, match=r"other: is a link"):
        trusted.read_text(root / "other" / "a", within=root)
    with pytest.raises(FileError, match="lies outside of"):
        trusted.read_text(root / ".." / "real" / "inner" / "a", within=root)
    with pytest.raises(FileError, match="lies outside of"):
        trusted.refuse_links(tmp_path / "elsewhere", root)
    trusted.refuse_links(root / "not" / "there", root)


def test_the_size_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 11)
    assert trusted.read_bytes(tmp_path / "a", most_bytes=11) == b"x" * 11
    with pytest.raises(FileError, match="holds more than 10 bytes"):
        trusted.read_bytes(tmp_path / "a", most_bytes=10)


def test_only_a_folder_is_removed_and_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    os.mkfifo(tmp_path / "folder" / "deep" / "pipe")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "piped").symlink_to(tmp_path / "pipe")
    for name in ("folder", "pipe", "link", "piped", "nothing"):
        trusted.remove_folder(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe", "piped", "real"]


def test_a_folder_that_cannot_be_made_is_a_message(tmp_path: Path) -> None:
    trusted.make_folder(tmp_path / "a" / "b")
    trusted.make_folder(tmp_path / "a" / "b")
    (tmp_path / "file").write_text("")
    for name in ("file", "file/deeper"):
        with pytest.raises(FileError, match=r"file.*: the folder cannot be made"):
            trusted.make_folder(tmp_path / name)


@pytest.mark.slow
def test_a_file_larger_than_the_memory_is_a_message(tmp_path: Path) -> None:
    with open(tmp_path / "huge", "wb") as sparse:
        sparse.truncate(6 << 30)
    script = f"""
import resource
from pathlib import Path
from picolm import trusted
from picolm.errors import FileError
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
try:
    trusted.read_bytes(Path({str(tmp_path / "huge")!r}), most_bytes=6 << 30)
except FileError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "huge: its 6,442,450,944 bytes do not fit into the memory" in done.stdout, done.stderr


def test_lines_come_one_by_one_and_an_unfinished_one_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one\ntwo\n\nthr")
    assert list(trusted.read_lines(tmp_path / "a")) == [b"one", b"two", b""]
    with pytest.raises(FileError, match="a:1: the line holds more than 3 bytes"):
        list(trusted.read_lines(tmp_path / "a", most_bytes=3))


def test_text_is_utf_8_with_or_without_a_mark(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbftext")
    assert trusted.read_text(tmp_path / "a") == "text"
    (tmp_path / "a").write_bytes(b"te\xffxt")
    with pytest.raises(FileError, match=r"is not UTF-8 text \(byte 2\)"):
        trusted.read_text(tmp_path / "a")


def test_a_pointer_of_git_lfs_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "pointer").write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"
    )
    with pytest.raises(FileError, match="pointer: is a pointer of Git LFS, not the file itself; run `git lfs pull`"):
        trusted.refuse_lfs_pointer(tmp_path / "pointer")
    (tmp_path / "text").write_text("version https://git-lfs is what a pointer begins with")
    trusted.refuse_lfs_pointer(tmp_path / "text")
