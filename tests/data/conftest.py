"""Rows, shards and texts for the tests of the data sources."""

import hashlib
import json
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

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


class FakeHub(ThreadingHTTPServer):
    """A data set repository `lab/rows` on a loopback address, that answers as the Hub does to what a reader asks.

    folder: its files. faults: {part of a path: [503, "cut", …]}, each used up by one request. log: (method, path, range).
    """

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Answers)
        self.folder = folder
        self.faults: defaultdict[str, list[Any]] = defaultdict(list)
        self.log: list[tuple[str, str, str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    @property
    def commit(self) -> str:
        """Changes with the names and contents of the files, as a commit does."""
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return hashlib.sha1(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()

    def requests(self, method: str, part: str) -> list[str | None]:
        """The ranges asked for in the requests whose path holds `part`."""
        return [asked for verb, path, asked in self.log if verb == method and part in path]

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that goes away is no trouble


class _Answers(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.log.append((self.command, path, self.headers.get("Range")))
        faults = next((faults for part, faults in self.server.faults.items() if part in path and faults), [])
        fault = faults.pop(0) if faults and self.command == "GET" else None
        if isinstance(fault, int):
            return self._send(fault, b"busy")
        found = re.match(r"/(?:api/)?datasets/([^/]+/[^/]+)/(revision|tree|resolve)/([^/]+)/?(.*)", path)
        if found is None or found[1] != "lab/rows":
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        if found[3] not in ("main", self.server.commit):
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if found[2] == "resolve":
            return self._send_file(self.server.folder / found[4], cut=fault == "cut")
        content = {"id": "lab/rows", "sha": self.server.commit} if found[2] == "revision" else self._tree()
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _tree(self) -> list[dict[str, Any]]:
        folder = self.server.folder
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return [
            {"type": "file", "path": path.relative_to(folder).as_posix(), "size": path.stat().st_size,
             "oid": hashlib.sha1(path.read_bytes()).hexdigest()}
            for path in files
        ]  # fmt: skip

    def _send_file(self, path: Path, cut: bool) -> None:
        if not path.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        content, status, headers = (
            path.read_bytes(),
            200,
            {"X-Repo-Commit": self.server.commit, "Accept-Ranges": "bytes"},
        )
        headers["ETag"] = f'"{hashlib.sha1(content).hexdigest()}"'
        if asked := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(asked[1]), int(asked[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        self._send(status, content, headers, cut=len(content) // 2 if cut else None)

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:cut])
        if cut is not None:
            self.close_connection = True

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The loopback Hub over an empty repository; its clients use a cache of their own and do not wait between attempts."""
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    (tmp_path / "repository").mkdir()
    with FakeHub(tmp_path / "repository") as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        for thread in threading.enumerate():
            if thread.name.startswith("ahead"):
                thread.join()
        huggingface_hub.close_session()
        server.shutdown()
