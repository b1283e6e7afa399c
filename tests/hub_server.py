"""A Hugging Face Hub on a loopback address, that answers as the Hub does to what we ask, and fails as it is told to.

It is only read; `hub_writing` has one that takes what is sent.
"""

import hashlib
import json
import random
import re
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

PAGE = 4  # commits in a page of their list
LARGE = (".pt", ".safetensors", ".bin", ".parquet", ".arrow")  # kept by their sha-256, as large files are


class Commit(NamedTuple):
    sha: str
    title: str
    files: dict[str, bytes]
    body: str = ""


NONE = Commit("0" * 40, "", {})


class Repository(Protocol):
    def commits(self, revision: str) -> list[Commit] | None:
        """From the newest commit of a branch, or from the commit of that id, backwards; None for an unknown revision."""
        ...

    @property
    def branches(self) -> Sequence[str]:
        """Their names."""
        ...


class Folder:
    """A repository with one branch and one commit: the files that lie in a folder now."""

    branches = ("main",)

    def __init__(self, path: Path):
        self.path = path

    @property
    def commit(self) -> Commit:
        paths = sorted(path for path in self.path.rglob("*") if path.is_file())
        files = {path.relative_to(self.path).as_posix(): path.read_bytes() for path in paths}
        sha = hashlib.sha1(b"".join(name.encode() + content for name, content in files.items())).hexdigest()
        return Commit(sha, "all", files)

    def commits(self, revision: str) -> list[Commit] | None:
        return [self.commit] if revision in ("main", self.commit.sha) else None


class History:
    """A repository with branches of commits, each a snapshot of all files."""

    def __init__(self) -> None:
        self._branches: dict[str, list[Commit]] = {"main": [Commit("0" * 40, "initial commit", {})]}

    @property
    def branches(self) -> list[str]:
        return list(self._branches)

    def commit(self, branch: str, title: str, files: dict[str, bytes]) -> str:
        """Add files, or new content of files, to those of the commit before; returns the id of the commit."""
        commits = self._branches.setdefault(branch, [])
        before = commits[0].files if commits else {}
        sha = hashlib.sha1(f"{branch} {len(commits)} {title}".encode()).hexdigest()
        commits.insert(0, Commit(sha, title, before | files))
        return sha

    def commits(self, revision: str) -> list[Commit] | None:
        if revision in self._branches:
            return self._branches[revision]
        return next(
            (commits[i:] for commits in self._branches.values() for i, c in enumerate(commits) if c.sha == revision),
            None,
        )


class Chaos:
    """Failures at random by seed, of all kinds in turn, at most `most` of them."""

    KINDS = (503, (429, {"Retry-After": "1"}), "cut", "lost", 401, (404, {"X-Error-Code": "RepoNotFound"}))

    def __init__(self, seed: int, rate: float, most: int, kinds: Sequence[Any] = KINDS):
        self._random, self._rate, self._left, self._kinds = random.Random(seed), rate, most, kinds
        self.seen: list[Any] = []

    def draw(self) -> Any:
        if not self._left or self._random.random() > self._rate:
            return None
        self._left -= 1
        self.seen.append(self._random.choice(self._kinds))
        return self.seen[-1]


class FakeHub(ThreadingHTTPServer):
    """The server.

    repositories: by `datasets/owner/name` or `models/owner/name`. Those of the owner `secret` may not be read.
    token: what a request that writes, or reads what is private, has to carry.
    faults: {part of a path: [503, (429, {"Retry-After": "7"}), "cut", "lost", …]}, each used up by one request of such a path
        that is no HEAD: `cut` ends the answer in its middle, `lost` does what was asked and does not answer.
    renamed: names of repositories, `owner/name`, by those that they had before: their pages are moved.
    ranges: whether it sends the range of a file that is asked for, and not all of it.
    log: (method, path, range) of each request. tokens: its `Authorization`. raw: its address, other headers and body, to be
        searched.
    """

    daemon_threads = True

    def __init__(self, repositories: dict[str, Repository] | None = None, token: str = ""):
        super().__init__(("127.0.0.1", 0), self.answers())
        self.repositories = repositories or {}
        self.token = token
        self.chaos: Chaos | None = None
        self.renamed: dict[str, str] = {}
        self.down = False
        self.ranges = True
        self.raw: list[bytes] = []
        self.tokens: set[str] = set()
        self.faults: defaultdict[str, list[Any]] = defaultdict(list)
        self.log: list[tuple[str, str, str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def answers(self) -> type["Answers"]:
        return Answers

    @property
    def repository_pages(self) -> list[str]:
        return [f"/api/{name}" for name in self.repositories]

    def requests(self, method: str, part: str) -> list[str | None]:
        """The ranges asked for in the requests whose path holds `part`."""
        return [asked for verb, path, asked in self.log if verb == method and part in path]

    @contextmanager
    def serving(self) -> Iterator["FakeHub"]:
        with self:
            threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
            yield self
            self.shutdown()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that goes away is no trouble


@contextmanager
def clients_of(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[None]:
    """Clients in this process go online, use a cache in `folder`, and do not wait between attempts."""
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub_cache"))
    monkeypatch.setenv("PICO_CACHE", str(folder / "pico_cache"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    yield
    huggingface_hub.close_session()


def ask(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Let clients in this process take the Hub at `url` for that of the environment."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)


class Answers(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for the client to acknowledge its headers

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        fault, path = self.note(b"")
        if isinstance(fault, int | tuple):
            return self.refuse(fault)
        for before, now in self.server.renamed.items():
            if f"/{before}/" in self.path or self.path.endswith(f"/{before}"):
                return self._send(307, b"", {"Location": self.path.replace(before, now)})
        parts = urlsplit(self.path)
        form = r"/(?:api/)?(?:(datasets|models)/)?([^/]+/[^/]+)/(revision|tree|resolve|commits|refs)/?([^/]*)/?(.*)"
        found = re.fullmatch(form, path)
        repository = self.server.repositories.get(f"{found[1] or 'models'}/{found[2]}") if found else None
        if (found is None or repository is None) and path in ("/api/whoami-v2", *self.server.repository_pages):
            return self._send_json({"name": "lab", "type": "user", "id": path.removeprefix("/api/models/")})
        private = getattr(repository, "private", False) and not self.authorized
        if found is None or repository is None or private:
            status = 401 if found and (private or found[2].startswith("secret/")) else 404
            return self._send(status, b"", {"X-Error-Code": "RepoNotFound"})
        if found[3] == "refs":
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": (repository.commits(name) or [NONE])[0].sha}
                for name in repository.branches
            ]
            return self._send_json({"branches": branches, "tags": [], "converts": []})
        commits = repository.commits(found[4])
        if commits is None:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        self._answer(
            found[3], commits, found[2], found[5], int(parse_qs(parts.query).get("p", ["0"])[0]), fault == "cut"
        )

    def note(self, body: bytes) -> tuple[Any, str]:
        """Take note of a request; how it is to fail, None when it is not, and its path."""
        path = unquote(urlsplit(self.path).path)
        self.server.log.append((self.command, path, self.headers.get("Range")))
        told = [(name, value) for name, value in self.headers.items() if name.lower() != "authorization"]
        headers = b"".join(f"{name}: {value}\n".encode() for name, value in told)
        self.server.raw.append(self.path.encode() + b"\n" + headers + body)
        self.server.tokens.add(self.headers.get("Authorization", ""))
        self.lost = False
        if "/allenai/" in path:  # the tokenizer that a run without one looks for: it is not here, whatever happens
            return None, path
        if self.command == "HEAD":
            return 503 if self.server.down else None, path
        faults = next((faults for part, faults in self.server.faults.items() if part in path and faults), [])
        fault = faults.pop(0) if faults else self.server.chaos.draw() if self.server.chaos else None
        self.lost = fault == "lost"
        return 503 if self.server.down else fault, path

    def refuse(self, fault: Any) -> None:
        status, headers = fault if isinstance(fault, tuple) else (fault, {})
        self._send(status, b"busy", headers)

    @property
    def authorized(self) -> bool:
        return not self.server.token or self.headers.get("Authorization") == f"Bearer {self.server.token}"

    def _answer(self, what: str, commits: list[Commit], name: str, path: str, page: int, cut: bool) -> None:
        if what == "resolve":
            return self._send_file(commits[0], path, cut)
        if what == "revision":
            return self._send_json({"id": name, "sha": commits[0].sha})
        if what == "tree":
            return self._send_json(
                [_entry(file, content) for file, content in commits[0].files.items() if file.startswith(path)]
            )
        listed = [
            {"id": c.sha, "title": c.title, "message": c.body, "authors": [], "date": "2026-01-01T00:00:00.000Z"}
            for c in commits[page * PAGE : (page + 1) * PAGE]
        ]
        more = len(commits) > (page + 1) * PAGE
        following = f"{self.server.url}{urlsplit(self.path).path}?p={page + 1}"
        self._send_json(listed, {"Link": f'<{following}>; rel="next"'} if more else {}, cut)

    def _send_file(self, commit: Commit, name: str, cut: bool) -> None:
        if name not in commit.files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit.sha})
        content, status = commit.files[name], 200
        headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes", "ETag": f'"{_oid(name, content)}"'}
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked and self.server.ranges:
            first, last = int(asked[1]), int(asked[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        self._send(status, content, headers, cut=len(content) // 2 if cut else None)

    def _send_json(self, content: Any, headers: dict[str, str] | None = None, cut: bool = False) -> None:
        data = json.dumps(content).encode()
        self._send(200, data, {"Content-Type": "application/json", **(headers or {})}, len(data) // 2 if cut else None)

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        if self.lost:
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:cut])
        if cut is not None:
            self.close_connection = True

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def is_large(name: str) -> bool:
    return name.endswith(LARGE)


def _oid(name: str, content: bytes) -> str:
    if is_large(name):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(name: str, content: bytes) -> dict[str, Any]:
    oid = _oid(name, content)
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": oid}
    return entry | ({"lfs": {"oid": oid, "size": len(content), "pointerSize": 130}} if is_large(name) else {})
