"""Data sets of the Hub, against a loopback server: found once, fetched as needed, repeated with patience, pinned, and offline."""

import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.hub_server import clients_of
from tests.scripted_server import Scripted, serving

from picolm.data import batches
from picolm.data.hub import Repository, open_hub
from picolm.data.parquet import ShardedRows
from picolm.errors import DataError

Write = Callable[..., Path]
DATA = "repository/data"


@pytest.fixture
def opened(hub: Any, tmp_path: Path) -> Callable[..., ShardedRows]:
    """A function that opens `lab/rows` on the loopback Hub."""

    def open_it(place: str = "lab/rows", **options: Any) -> ShardedRows:
        return open_hub(place, cache_dir=tmp_path / "cache", endpoint=hub.url, **options)

    return open_it


@pytest.fixture
def no_prefetch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches.Ahead, "start", lambda self, key: None)


def expected(indices: np.ndarray) -> np.ndarray:
    return (np.asarray(indices)[:, None] + np.arange(9)) % 1000


def test_rows_are_those_of_the_shards_in_order(hub: Any, opened: Any, write_shards: Write) -> None:
    write_shards([20, 20, 20, 7], folder=DATA, labels=True)
    write_shards([4], folder=DATA, split="val")
    source = opened(row_length=9)
    assert (len(source), len(opened(split="val"))) == (67, 4)
    indices = np.array([66, 3, 25, 41, 0])
    assert np.array_equal(source.rows(indices), expected(indices))
    assert source.labels(np.array([4, 66])) == ["s1", "s0"]
    assert source.locate(66) == "lab/rows: data/train-00003-of-00004.parquet row 6"


@pytest.mark.usefixtures("no_prefetch")
def test_opening_reads_two_footers_and_a_row_far_in_fetches_one_shard(
    hub: Any, opened: Any, write_shards: Write
) -> None:
    write_shards([20] * 30 + [7], folder=DATA)
    source = opened(row_length=9)
    assert len(hub.requests("GET", "/resolve/")) == 2
    assert all(asked is not None for asked in hub.requests("GET", "/resolve/"))
    assert len(hub.requests("GET", "/tree/")) == 1
    source.rows(np.array([20 * 17 + 2]))
    assert len(hub.requests("GET", "train-00017")) == 1
    assert len(hub.requests("GET", "/resolve/")) == 3
    opened(row_length=9).rows(np.array([20 * 17 + 2]))
    assert len(hub.requests("GET", "/tree/")) == 1  # the commit is the same: its index is in the cache
    assert len(hub.requests("GET", "/resolve/")) == 3


def test_a_footer_longer_than_the_first_read_is_read_again(
    hub: Any, opened: Any, write_shards: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("picolm.data.hub._FOOTER_BYTES", 16)
    write_shards([20, 7], folder=DATA)
    assert len(opened(row_length=9)) == 27


def test_a_server_that_ignores_ranges_sends_a_shard_once_and_into_the_cache(
    hub: Any, opened: Any, write_shards: Write, no_prefetch: None
) -> None:
    write_shards([20, 20, 7], folder=DATA)
    hub.ranges = False
    source = opened(row_length=9)
    assert len(source) == 47
    whole = [path for verb, path, asked in hub.log if verb == "GET" and ".parquet" in path and asked is None]
    assert [path.rpartition("/")[2] for path in whole] == [
        "train-00000-of-00003.parquet",
        "train-00002-of-00003.parquet",
    ]
    hub.log.clear()
    assert np.array_equal(source.rows(np.arange(20)), expected(np.arange(20)))
    assert not hub.requests("GET", ".parquet")


@pytest.mark.parametrize("status", [200, 206])
def test_the_end_of_a_shard_is_never_more_than_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """A server that sends without an end, with the range that was asked for or without one."""
    sent: list[int] = []

    def resolve(request: Scripted) -> None:
        if request.command == "HEAD":
            return request.reply(b"", X_Repo_Commit="1" * 40, ETag='"abc"', Content_Length="1000000")
        request.send_response(status)
        request.send_header("Content-Type", "application/octet-stream")
        request.end_headers()
        request.close_connection = True
        with suppress(OSError):
            while True:
                request.wfile.write(bytes(1 << 20))
                sent.append(1 << 20)

    with serving(resolve) as server, clients_of(monkeypatch, tmp_path):
        with pytest.raises(DataError, match=r"the answer holds more than [0-9,]+ bytes"):
            Repository("lab/rows", "1" * 40, server.url).read_tail("train-0.parquet", 1_000_000, 1000)
        assert sum(sent) < 200 << 20


def test_the_next_shard_is_fetched_in_the_background(hub: Any, opened: Any, write_shards: Write) -> None:
    write_shards([20] * 4, folder=DATA)
    opened(row_length=9).rows(np.array([0]))
    deadline = time.monotonic() + 5
    while not hub.requests("GET", "train-00001") and time.monotonic() < deadline:
        pass
    assert hub.requests("GET", "train-00001")
    assert not hub.requests("GET", "train-00002")


@pytest.mark.usefixtures("no_prefetch")
def test_that_there_are_no_labels_is_known_from_one_shard(hub: Any, opened: Any, write_shards: Write) -> None:
    write_shards([20] * 5, folder=DATA)
    assert opened(row_length=9).labels(np.arange(100)) is None
    assert len([asked for asked in hub.requests("GET", "/resolve/") if asked is None]) == 1


@pytest.mark.parametrize("faults", [[503], [429, 500, 503], ["cut"], ["cut", 503, "cut"]])
def test_a_busy_server_is_tried_again(hub: Any, opened: Any, write_shards: Write, faults: list[Any]) -> None:
    write_shards([20, 7], folder=DATA)
    hub.faults["/revision/"] = [fault for fault in faults if fault != "cut"]
    hub.faults["/tree/"] = [fault for fault in faults if fault != "cut"]
    hub.faults["/resolve/"] = list(faults)
    source = opened(row_length=9)
    hub.faults["/resolve/"] = list(faults)
    assert np.array_equal(source.rows(np.arange(27)), expected(np.arange(27)))


def test_patience_ends(hub: Any, opened: Any, write_shards: Write) -> None:
    write_shards([20, 7], folder=DATA)
    source = opened(row_length=9)
    hub.faults["/resolve/"] = [503] * 1000
    with pytest.raises(DataError, match=r"lab/rows: data/train-00000-of-00002.parquet: could not be fetched .*503"):
        source.rows(np.array([0]))


def test_a_server_that_is_away_is_named(hub: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"lab/rows at main: could not be fetched from the Hub \(http://127.0.0.1:9\)"):
        open_hub("lab/rows", cache_dir=tmp_path, endpoint="http://127.0.0.1:9")


def test_unknown_names_are_explained(hub: Any, opened: Any, write_shards: Write) -> None:
    write_shards([5], folder=DATA)
    with pytest.raises(
        DataError, match=r"lab/nothing at main: is neither a folder here nor a repository on the Hub .* HF_TOKEN"
    ):
        opened("lab/nothing")
    with pytest.raises(DataError, match=r"lab/rows at v9: is not on the Hub .*check the revision"):
        opened("lab/rows@v9")
    with pytest.raises(
        DataError, match=r"lab/rows: has no parquet shards of the split 'val'; it has shards of train \(expected val-"
    ):
        opened(split="val")


def test_rows_too_short_are_known_from_the_footer(hub: Any, opened: Any, write_shards: Write) -> None:
    write_shards([20, 7], folder=DATA)
    with pytest.raises(
        DataError, match=r"data/train-00000-of-00002.parquet: rows of 9 tokens, and a row of training takes 17"
    ):
        opened(row_length=17)


def test_a_shard_with_another_number_of_rows_is_an_error(hub: Any, opened: Any, write_shards: Write) -> None:
    write_shards([20, 13, 7], folder=DATA)
    with pytest.raises(DataError, match=r"train-00001-of-00003.parquet: holds 13 rows where 20 were expected"):
        opened(row_length=9).rows(np.array([25]))


def test_the_fingerprint_outlives_a_new_card_but_not_new_rows(hub: Any, opened: Any, write_shards: Write) -> None:
    folder = write_shards([20, 7], folder=DATA)
    before = opened().fingerprint
    (folder.parent / "README.md").write_text("a card")
    assert opened().fingerprint == before
    write_shards([20, 8], folder=DATA)
    assert opened().fingerprint != before


def test_a_prepared_folder_is_the_same_data_set_on_the_hub(
    hub: Any, opened: Any, write_texts: Any, story: Any, tmp_path: Path
) -> None:
    from picolm.data import open_source
    from picolm.data.prepare import prepare

    out = tmp_path / "prepared"
    texts = write_texts({f"{i}.txt": story(i) for i in range(40)})
    prepare([texts], out, vocab_size=300, seq_len=16, val_fraction=0.2)
    shutil.copytree(out, tmp_path / "repository", dirs_exist_ok=True)
    for split in ("train", "val"):
        here, there = open_source(str(out), split=split), opened(split=split)
        assert there.fingerprint == here.fingerprint
        assert np.array_equal(there.rows(np.arange(len(here))), here.rows(np.arange(len(here))))
        assert (there.max_token, there.eos) == (here.max_token, 0)
        assert there.tokenizer_file.read_bytes() == here.tokenizer_file.read_bytes()


def test_offline_uses_what_was_fetched_and_says_what_was_not(
    hub: Any, opened: Any, write_shards: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    write_shards([20] * 4, folder=DATA)
    monkeypatch.setattr(batches.Ahead, "start", lambda self, key: None)
    online = opened(row_length=9)
    online.rows(np.array([25]))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.log.clear()
    offline = opened(row_length=9)
    assert offline.fingerprint == online.fingerprint
    assert np.array_equal(offline.rows(np.array([26])), expected(np.array([26])))
    with pytest.raises(DataError, match=r"train-00003-of-00004.parquet: is not in the Hub's cache, and offline mode"):
        offline.rows(np.array([70]))
    with pytest.raises(
        DataError, match=r"lab/other: offline mode \(HF_HUB_OFFLINE\) is on, .* never opened the split 'train'"
    ):
        opened("lab/other")
    assert hub.log == []
