"""Manifests that somebody else wrote: whatever stands in them is a message, and no file outside of their folder is opened."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from picolm.data import open_source
from picolm.data.inspection import inspect, verify
from picolm.data.manifest import read_manifest
from picolm.data.merge import merge
from picolm.data.prepare import prepare
from picolm.errors import DataError, PicoError

WRONG: list[Any] = [None, True, -1, 1.5, 10**30, "", "x", [], [1], {}, {"x": 1}, [[]], "\x00", "../x", "/etc/passwd"]


@pytest.fixture
def rows(tmp_path: Path, write_texts: Any, story: Any) -> Path:
    texts = write_texts({f"{kind}/{i}.txt": story(i) for kind in "ab" for i in range(12)})
    prepare([texts], tmp_path / "rows", vocab_size=300, seq_len=16, val_fraction=0.2)
    return tmp_path / "rows"


def paths(tree: Any) -> list[tuple[Any, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [(key, *rest) for key, value in items for rest in [(), *paths(value)]]


def use(folder: Path, tmp_path: Path) -> None:
    """Do what commands do with prepared rows; each may end with a message."""
    for call in (
        lambda: open_source(str(folder)).rows([0]),
        lambda: open_source(str(folder), split="val").labels([0]),
        lambda: inspect(folder),
        lambda: verify(folder),
        lambda: merge([folder, tmp_path / "other"], tmp_path / "mixed"),
    ):
        with suppress(PicoError):
            call()


@pytest.mark.slow
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_no_value_of_a_manifest_makes_a_traceback(rows: Path, tmp_path: Path, data: st.DataObject) -> None:
    kept = (rows / "manifest.json").read_text()
    tree = json.loads(kept)
    path = data.draw(st.sampled_from(paths(tree)))
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    if data.draw(st.booleans()) and isinstance(parent, dict):
        del parent[path[-1]]
    else:
        parent[path[-1]] = data.draw(st.sampled_from(WRONG))
    (rows / "manifest.json").write_text(json.dumps(tree))
    try:
        use(rows, tmp_path)
    finally:
        (rows / "manifest.json").write_text(kept)


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"[" * 5000, b'{"format": "picolm-rows-1", "splits": ' + b"9" * 5000 + b"}"]
)
def test_a_manifest_that_is_no_json_is_named(rows: Path, content: bytes) -> None:
    (rows / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=r"manifest.json: is damaged; prepare or fetch"):
        read_manifest(rows)


@pytest.mark.parametrize(
    "name", ["../outside.parquet", "/outside.parquet", "a/../../outside.parquet", "", "a\\b", "x\x00"]
)
def test_a_manifest_names_files_of_its_folder_only(rows: Path, name: str) -> None:
    (rows.parent / "outside.parquet").write_bytes((rows / "train-00000-of-00001.parquet").read_bytes())
    tree = json.loads((rows / "manifest.json").read_text())
    tree["splits"]["train"][0]["file"] = name
    (rows / "manifest.json").write_text(json.dumps(tree))
    with pytest.raises(DataError, match=r"splits.train.0.file: .*should be the name of a file in the folder"):
        open_source(str(rows))


@pytest.mark.parametrize("name", ["train-00000-of-00001.parquet", "tokenizer.json", "tokenizer_config.json"])
def test_files_of_rows_are_not_links(rows: Path, name: str) -> None:
    (rows / name).rename(rows.parent / name)
    (rows / name).symlink_to(rows.parent / name)
    with pytest.raises(DataError, match=f"{name}: is a link"):
        open_source(str(rows))


def test_a_folder_of_the_hubs_cache_is_read_through_its_links(rows: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(rows.iterdir())):
        (blobs / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(os.path.relpath(blobs / str(number), snapshot))
    assert open_source(str(snapshot)).fingerprint == open_source(str(rows)).fingerprint


def test_every_damaged_file_of_rows_is_named(rows: Path) -> None:
    (rows / "train-00000-of-00001.parquet").write_bytes(b"short")
    (rows / "tokenizer.json").write_text("{}")
    (rows / "tokenizer_config.json").unlink()
    with pytest.raises(DataError) as caught:
        open_source(str(rows))
    for part in (
        "has 5 bytes, the manifest says",
        "tokenizer.json: is not the tokenizer that made",
        "_config.json: is missing",
    ):
        assert part in str(caught.value)
