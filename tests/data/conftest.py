"""Rows, shards and texts for the tests of the data sources."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.hub_server import FakeHub, Folder, clients_of

LENGTH = 9  # tokens in a row: 8 inputs and the shifted targets


def numbered_rows(start: int, stop: int, length: int = LENGTH) -> np.ndarray:
    """Rows that tell their number: row i is i, i + 1, …, modulo 1000."""
    return ((np.arange(start, stop)[:, None] + np.arange(length)) % 1000).astype(np.int32)


class CountingSource:
    """Numbered rows in memory that remember which were asked for."""

    fingerprint, max_token, max_token_file, eos, tokenizer_file = "counted", None, None, None, None

    def __init__(self, rows: int = 100, length: int = LENGTH):
        self.count, self.row_length = rows, length
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.count

    def rows(self, indices: np.ndarray) -> np.ndarray:
        self.asked += indices.tolist()
        return np.stack([numbered_rows(i, i + 1, self.row_length)[0] for i in indices])

    def labels(self, indices: np.ndarray) -> list[str] | None:
        return None

    def locate(self, index: int) -> str:
        return f"memory row {index}"


@pytest.fixture(scope="session")
def make_source() -> type[CountingSource]:
    return CountingSource


@pytest.fixture
def write_shards(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes numbered rows as shards: `write_shards([20, 20, 7], folder="d", split="train", …)` -> folder."""

    def write(
        counts: list[int], folder: str = "shards", split: str = "train", length: int = LENGTH, group: int = 8,
        labels: bool = False, kind: Any = None,
    ) -> Path:  # fmt: skip
        out = tmp_path / folder
        out.mkdir(parents=True, exist_ok=True)
        start = 0
        for number, count in enumerate(counts):
            rows = numbered_rows(start, start + count, length)
            flat = pa.array(rows.reshape(-1))
            columns: dict[str, Any] = {"input_ids": pa.FixedSizeListArray.from_arrays(flat, length)}
            if kind is not None:
                columns["input_ids"] = columns["input_ids"].cast(kind)
            if labels:
                columns["source"] = pa.array([f"s{i % 3}" for i in range(start, start + count)])
            path = out / f"{split}-{number:05d}-of-{len(counts):05d}.parquet"
            pq.write_table(pa.table(columns), path, row_group_size=group)
            start += count
        return out

    return write


@pytest.fixture
def write_texts(tmp_path: Path) -> Callable[[dict[str, str | bytes | list[Any]]], Path]:
    """A function from {relative name: text, bytes or JSON records} to a folder of files."""

    def write(files: dict[str, str | bytes | list[Any]]) -> Path:
        folder = tmp_path / "texts"
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, list):
                content = "".join(json.dumps(record) + "\n" for record in content)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder

    return write


@pytest.fixture
def story() -> Callable[[int], str]:
    """A function from a number to a short text of its own."""

    def tell(number: int) -> str:
        generator = np.random.default_rng(number)
        words = [
            "the",
            "step",
            "of",
            "a",
            "model",
            "learns",
            "slowly",
            "gradient",
            f"n{number}",
            "falls",
            "and",
            "rises",
        ]
        return " ".join(generator.choice(words, 60)) + ".\n"

    return tell


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub with an empty data set `lab/rows`; its clients use a cache of their own and do not wait between attempts."""
    folder = tmp_path / "repository"
    folder.mkdir()
    with FakeHub({"datasets/lab/rows": Folder(folder)}).serving() as server, clients_of(monkeypatch, tmp_path):
        yield server
        for thread in threading.enumerate():
            if thread.name.startswith("ahead"):
                thread.join()
