"""Prepared rows as a data set on the Hub: sent once, checked, described, and trained on from there."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from tests.hub_writing import WritableHub

from picolm.data import open_source
from picolm.data.prepare import prepare
from picolm.errors import DataError
from picolm.exchange.rows import push_rows


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Prepared rows of some sentences, with held-out ones."""
    text = tmp_path / "text"
    text.mkdir()
    for source in ("east", "west"):
        (text / source).mkdir()
        for number in range(30):
            (text / source / f"{number}.txt").write_text(f"The {number} ships went {source} and came home again. " * 4)
    prepare([str(text)], tmp_path / "rows", vocab_size=300, seq_len=16, seed=1, val_fraction=0.2)
    return tmp_path / "rows"


def test_rows_on_the_hub_are_those_that_were_prepared(hub: WritableHub, rows: Path) -> None:
    seen: list[tuple[int, int]] = []
    push_rows(rows, "lab/rows", progress=lambda done, total: seen.append((done, total)))
    here, there = open_source(str(rows), split="train"), open_source("lab/rows", split="train")
    assert there.fingerprint == here.fingerprint
    assert len(there) == len(here)
    assert np.array_equal(there.rows(np.arange(len(there))), here.rows(np.arange(len(here))))
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1]


def test_they_are_sent_once(hub: WritableHub, rows: Path) -> None:
    push_rows(rows, "lab/rows")
    files, commits = len(hub.requests("PUT", "/large/")), hub.repository("lab/rows", "datasets").commits("main")
    push_rows(rows, "lab/rows")
    assert len(hub.requests("PUT", "/large/")) == files > 0
    assert hub.repository("lab/rows", "datasets").commits("main") == commits


def test_the_card_says_what_they_are(hub: WritableHub, rows: Path) -> None:
    manifest = push_rows(rows, "lab/rows", private=True)
    assert hub.repository("lab/rows", "datasets").private
    card = (hub.repository("lab/rows", "datasets").commits("main") or [])[0].files["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front["tags"] == ["pico", "pretokenized"]
    assert {entry["split"] for entry in front["configs"][0]["data_files"]} == {"train", "val"}
    for said in (
        f"{manifest.tokens:,} tokens",
        f"| train | {manifest.rows('train'):,} |",
        "data.dataset.name=lab/rows",
        "east",
    ):
        assert said in card


def test_what_is_not_as_prepared_is_not_sent(hub: WritableHub, rows: Path, tmp_path: Path) -> None:
    shard = next(rows.glob("train-*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(
        DataError, match=rf"{shard.name}: is not the file that manifest.json describes; prepare the data again"
    ):
        push_rows(rows, "lab/rows")
    with pytest.raises(DataError, match=r"has no manifest\.json of `pico data prepare`"):
        push_rows(tmp_path / "text", "lab/rows")


def test_an_interrupted_push_is_no_data_set_and_goes_on(hub: WritableHub, rows: Path) -> None:
    hub.faults["/commit/main"] += [None, 403]
    with pytest.raises(DataError, match=r"lab/rows@main: Manifest and card: the Hub .* refuses access \(403\)"):
        push_rows(rows, "lab/rows")
    shown = (hub.repository("lab/rows", "datasets").commits("main") or [])[0].files
    assert "manifest.json" not in shown
    assert any(name.startswith("train-") for name in shown)
    sent = len(hub.requests("PUT", "/large/"))
    push_rows(rows, "lab/rows")
    assert len(hub.requests("PUT", "/large/")) == sent
    assert open_source("lab/rows", split="train").fingerprint == open_source(str(rows), split="train").fingerprint
