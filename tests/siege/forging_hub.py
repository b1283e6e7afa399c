"""A Hub whose answers are forged: other files, other lists, other titles, other addresses of the next page."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.hub_server import Commit
from tests.hub_writing import WritableHub, WritingAnswers
from tests.siege.mutations import sealed_with


class ForgingHub(WritableHub):
    """changes: files by name, in every commit that has them. bodies: old text -> new text in messages of commits.

    forge: a function of the path, the JSON value and the headers of an answer to those that are sent instead.
    """

    def __init__(self, storage: Path, token: str = ""):
        super().__init__(storage, token)
        self.be_honest()

    def be_honest(self) -> None:
        """Forge nothing from now on."""
        self.changes: dict[str, bytes] = {}
        self.bodies: dict[str, str] = {}
        self.forge: Callable[[str, Any, dict[str, str]], tuple[Any, dict[str, str]]] | None = None

    def forget(self, *names: str) -> None:
        """Delete repositories, if they are there."""
        for name in names:
            if self.repositories.pop(name, None) is not None:
                shutil.rmtree(self.storage / name)

    def change(self, repository: str, branch: str, name: str, data: bytes, seal: bool) -> None:
        """Send another file. seal: and a manifest that says so, and a message of the commit that has its digest."""
        self.changes = {name: data}
        files = self.files(repository, branch)
        if seal and "manifest.json" in files:
            before = json.loads(files["manifest.json"])
            manifest = sealed_with(files["manifest.json"], name, data)
            self.changes |= {"manifest.json": manifest}
            if "digest" in before:
                self.bodies = {before["digest"]: _digest(manifest)}

    def files(self, repository: str, branch: str) -> Mapping[str, bytes]:
        """The files of the newest commit of a branch."""
        commits = self.repositories[repository].commits(branch)
        assert commits is not None
        return commits[0].files

    def answers(self) -> type[WritingAnswers]:
        return ForgingAnswers


class ForgingAnswers(WritingAnswers):
    server: ForgingHub

    def _answer(self, what: str, commits: list[Commit], name: str, path: str, page: int, cut: bool) -> None:
        forged = [
            each._replace(files=_Changed(each.files, self.server.changes), body=self._body(each.body))
            for each in commits
        ]
        super()._answer(what, forged, name, path, page, cut)

    def _body(self, text: str) -> str:
        for old, new in self.server.bodies.items():
            text = text.replace(old, new)
        return text

    def _send_json(self, content: Any, headers: dict[str, str] | None = None, cut: bool = False) -> None:
        if self.server.forge is not None:
            content, headers = self.server.forge(self.path, content, dict(headers or {}))
        super()._send_json(content, headers, cut)


class _Changed(dict[str, bytes]):
    """The files of a commit, some of them changed; each is read when it is asked for."""

    def __init__(self, files: Mapping[str, bytes], changes: Mapping[str, bytes]):
        super().__init__(dict.fromkeys(files, b""))
        self._files, self._changes = files, {name: data for name, data in changes.items() if name in files}

    def __getitem__(self, name: str) -> bytes:
        return self._changes[name] if name in self._changes else self._files[name]

    def items(self) -> Iterator[tuple[str, bytes]]:  # type: ignore[override]
        return ((name, self[name]) for name in self)


def _digest(manifest: bytes) -> str:
    found = re.search(rb'"digest":"([0-9a-f]{64})"', manifest)
    return found[1].decode() if found else hashlib.sha256(manifest).hexdigest()
