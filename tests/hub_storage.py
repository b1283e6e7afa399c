"""A repository of the loopback Hub that is a git repository: small files are blobs, large ones pointers to a store beside it."""

import hashlib
import subprocess
import threading
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from tests.hub_server import Commit, is_large

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"
FIRST = "*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.parquet filter=lfs diff=lfs merge=lfs -text\n"


class Moved(Exception):
    """The branch is not where the commit says that it follows."""


class GitRepository:
    """A bare repository in a folder; every answer is read from it."""

    def __init__(self, path: Path, private: bool = False):
        self.path, self.private = path, private
        self._guard = threading.RLock()
        self._tips: dict[str, str | None] = {}
        self._listed: dict[str, list[Commit]] = {}
        if not path.exists():
            path.mkdir(parents=True)
            self._git("init", "--bare", "--quiet", "--initial-branch=main", ".")
            (path / "objects-large").mkdir()
            self.commit("main", "initial commit", {".gitattributes": FIRST.encode()})

    @property
    def branches(self) -> list[str]:
        return self._git("for-each-ref", "--format=%(refname:lstrip=2)", "refs/heads").decode().split()

    def create_branch(self, name: str, start: str | None) -> bool:
        """False when there is one of that name."""
        with self._guard:
            if name in self.branches:
                return False
            self._git("update-ref", f"refs/heads/{name}", self._tip(start or "main") or "")
            self._tips.clear()
            return True

    def commits(self, revision: str) -> list[Commit] | None:
        """From the newest commit of a branch, or from the commit of that id, backwards; None for an unknown revision."""
        with self._guard:
            tip = self._tip(revision)
            if tip is None:
                return None
            if tip not in self._listed:
                lines = self._git("log", "--format=%H%x1f%s%x1f%b%x1e", tip).decode().split("\x1e")[:-1]
                found = [line.lstrip("\n").split("\x1f") for line in lines]
                self._listed[tip] = [Commit(sha, title, Files(self, sha), body) for sha, title, body in found]  # type: ignore[arg-type]
            return self._listed[tip]

    def commit(
        self,
        branch: str,
        title: str,
        files: Mapping[str, bytes | tuple[str, int]],
        body: str = "",
        delete: Collection[str] = (),
        parent: str | None = None,
    ) -> str:
        """files: content, or sha-256 and size of one that is in the large store. Raises Moved."""
        with self._guard:
            tip = self._tip(branch)
            if parent is not None and parent != tip:
                raise Moved
            message = f"{title}\n\n{body}".strip().encode()
            parts = [
                f"commit refs/heads/{branch}\ncommitter lab <lab@hub> now\ndata {len(message)}\n".encode(),
                message,
                b"\n",
            ]
            parts += [f"from {tip}\n".encode()] if tip else []
            parts += [f"D {name}\n".encode() for name in delete]
            for name, content in files.items():
                data = content if isinstance(content, bytes) else POINTER.format(*content).encode()
                parts += [f"M 100644 inline {name}\ndata {len(data)}\n".encode(), data, b"\n"]
            self._git("fast-import", "--quiet", "--date-format=now", data=b"".join(parts))
            self._tips.clear()
            return self._tip(branch) or ""

    def large(self, digest: str) -> Path:
        return self.path / "objects-large" / digest

    def store(self, digest: str, content: bytes) -> bool:
        """Keep a large file; False when it is not what it is called."""
        if hashlib.sha256(content).hexdigest() != digest:
            return False
        self.large(digest).write_bytes(content)
        return True

    def oid(self, revision: str, name: str) -> str | None:
        """As the Hub tells it before an upload: the id of the blob, or the sha-256 of a large file."""
        commits = self.commits(revision)
        content = commits[0].files.get(name) if commits else None
        if content is None:
            return None
        return hashlib.sha256(content).hexdigest() if is_large(name) else git_oid(content)

    def tree(self, sha: str) -> dict[str, str]:
        """The id of the blob of each file of a commit."""
        with self._guard:
            lines = self._git("ls-tree", "-r", "-z", sha).decode().split("\0")[:-1]
        return {line.split("\t", 1)[1]: line.split()[2] for line in lines}

    def content(self, blob: str) -> bytes:
        with self._guard:
            data = self._git("cat-file", "blob", blob)
        if not data.startswith(POINTER[:30].encode()):
            return data
        return self.large(data.split(b"sha256:")[1][:64].decode()).read_bytes()

    def _tip(self, revision: str) -> str | None:
        """The commit of a branch or of its own id, asked of git when it may have changed."""
        if revision not in self._tips:
            self._tips[revision] = self._ask_tip(revision)
        return self._tips[revision]

    def _ask_tip(self, revision: str) -> str | None:
        for name in (f"refs/heads/{revision}", f"{revision}^{{commit}}"):
            found = subprocess.run(
                ["git", "rev-parse", "--verify", "--quiet", name], cwd=self.path, capture_output=True
            )
            if found.returncode == 0:
                return found.stdout.decode().strip()
        return None

    def _git(self, *arguments: str, data: bytes | None = None) -> bytes:
        return subprocess.run(["git", *arguments], cwd=self.path, input=data, capture_output=True, check=True).stdout


class Files(Mapping[str, bytes]):
    """The files of a commit, read when asked for."""

    def __init__(self, repository: GitRepository, sha: str):
        self._repository, self._sha = repository, sha
        self._tree: dict[str, str] | None = None
        self._read: dict[str, bytes] = {}

    @property
    def tree(self) -> dict[str, str]:
        if self._tree is None:
            self._tree = self._repository.tree(self._sha)
        return self._tree

    def __getitem__(self, name: str) -> bytes:
        if name not in self._read:
            self._read[name] = self._repository.content(self.tree[name])
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tree)

    def __len__(self) -> int:
        return len(self.tree)


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
