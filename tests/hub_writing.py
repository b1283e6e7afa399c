"""The loopback Hub that takes repositories, branches, files and commits, into git repositories on the disk."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import yaml
from tests.hub_server import Answers, FakeHub, is_large
from tests.hub_storage import GitRepository, Moved


class WritableHub(FakeHub):
    """storage: the folder of the repositories. collected: (collection, repository) of each item that was added."""

    def __init__(self, storage: Path, token: str = ""):
        super().__init__(token=token)
        self.storage = storage
        self.collected: list[tuple[str, str]] = []

    def answers(self) -> type[Answers]:
        return WritingAnswers

    def repository(self, name: str, kind: str = "models") -> GitRepository:
        found = self.repositories[f"{kind}/{name}"]
        assert isinstance(found, GitRepository)
        return found

    def create(self, name: str, kind: str = "models", private: bool = False) -> GitRepository | None:
        """A new repository, None when there is one of that name."""
        key = f"{kind}/{name}"
        if key in self.repositories:
            return None
        repository = GitRepository(self.storage / key, private)
        self.repositories[key] = repository
        return repository


class WritingAnswers(Answers):
    server: WritableHub

    def do_PUT(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) if self._length_known() else self._chunks()
        fault, path = self.note(body)
        if isinstance(fault, int | tuple):
            return self.refuse(fault)
        if fault == "cut":
            self.close_connection = True
            return
        if path.startswith("/large/"):  # an address that grants by its query, as those of a store in the cloud do
            return self._put_large(path, body)
        if not self.authorized:
            return self._send(401, b'{"error": "Invalid username or password."}')
        content = body if "/commit/" in path else json.loads(body or b"{}")
        for part, answer in self._routes().items():
            if part in path:
                return answer(path, content)
        self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _routes(self) -> dict[str, Callable[[str, Any], None]]:
        return {
            "/api/validate-yaml": self._validate,
            "/api/repos/create": self._create,
            "/api/collections/": self._collect,
            ".git/info/lfs/objects/batch": self._batch,
            "/large-verify": lambda path, content: self._send_json({}),
            "/preupload/": self._preupload,
            "/paths-info/": self._paths_info,
            "/branch/": self._branch,
            "/commit/": self._commit,
        }

    def _validate(self, path: str, content: Any) -> None:
        front = content["content"].split("---")[1:2]
        known = isinstance(yaml.safe_load(front[0]) if front else None, dict)
        errors = [] if known else [{"message": "no metadata"}]
        self._send_json({"errors": errors, "warnings": []}) if known else self._send(
            400, json.dumps({"errors": errors}).encode()
        )

    def _create(self, path: str, content: Any) -> None:
        name = f"{content.get('organization') or 'lab'}/{content['name'].split('/')[-1]}"
        private = content.get("visibility") == "private" or bool(content.get("private"))
        made = self.server.create(name, f"{content.get('type') or 'model'}s", private)
        if made is None:
            return self._send(
                409, json.dumps({"error": "You already created this repo", "url": f"{self.server.url}/{name}"}).encode()
            )
        self._send_json({"url": f"{self.server.url}/{name}", "name": name})

    def _collect(self, path: str, content: Any) -> None:
        item = (path.split("/")[3] + "/" + path.split("/")[4], content["item"]["id"])
        if item in self.server.collected:
            return self._send(409, b"{}")
        self.server.collected.append(item)
        self._send_json({"slug": item[0], "title": "t", "owner": {"name": "lab"}, "items": [], "lastUpdated":
                         "2026-01-01T00:00:00.000Z", "position": 1, "private": False, "theme": "blue", "upvotes": 0})  # fmt: skip

    def _branch(self, path: str, content: Any) -> None:
        repository, name = self._of(path, "/branch/")
        if repository is None:
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        made = repository.create_branch(name, content.get("startingPoint"))
        self._send_json({}) if made else self._send(409, b'{"error": "Reference already exists"}')

    def _preupload(self, path: str, content: Any) -> None:
        repository, revision = self._of(path, "/preupload/")
        if repository is None or repository.commits(revision) is None:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound" if repository else "RepoNotFound"})
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if is_large(file["path"]) else "regular",
                "shouldIgnore": False,
                "oid": repository.oid(revision, file["path"]),
            }
            for file in content["files"]
        ]
        self._send_json({"files": files, "commitOid": repository.commits(revision)[0].sha})  # type: ignore[index]

    def _batch(self, path: str, content: Any) -> None:
        kind = "datasets" if path.startswith("/datasets/") else "models"
        name = path.removeprefix("/datasets").split(".git/")[0].strip("/")
        repository = self.server.repository(name, kind)
        objects = []
        for entry in content["objects"]:
            href = f"{self.server.url}/large/{kind}/{name}/{entry['oid']}?X-Signature=granted"
            actions = {"upload": {"href": href}, "verify": {"href": f"{self.server.url}/large-verify"}}
            there = repository.large(entry["oid"]).exists()
            objects.append({"oid": entry["oid"], "size": entry["size"], **({} if there else {"actions": actions})})
        self._send_json({"transfer": "basic", "objects": objects})

    def _put_large(self, path: str, body: bytes) -> None:
        kind, owner, name, digest = path.split("/")[2:]
        stored = self.server.repository(f"{owner}/{name}", kind).store(digest, body)
        self._send(200 if stored else 400, b"")

    def _paths_info(self, path: str, content: Any) -> None:
        from tests.hub_server import _entry

        repository, revision = self._of(path, "/paths-info/")
        files = repository.commits(revision)[0].files  # type: ignore[union-attr, index]
        self._send_json([_entry(name, files[name]) for name in content["paths"] if name in files])

    def _commit(self, path: str, content: bytes) -> None:
        repository, branch = self._of(path, "/commit/")
        if repository is None or branch not in repository.branches:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound" if repository else "RepoNotFound"})
        lines = [json.loads(line) for line in content.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        files: dict[str, bytes | tuple[str, int]] = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                text = value["content"]
                files[value["path"]] = base64.b64decode(text) if value.get("encoding") == "base64" else text.encode()
            if line["key"] == "lfsFile":
                if not repository.large(value["oid"]).exists():
                    return self._send(400, b'{"error": "LFS pointer to a file that is not there"}')
                files[value["path"]] = (value["oid"], repository.large(value["oid"]).stat().st_size)
        delete = [line["value"]["path"] for line in lines if line["key"] == "deletedFile"]
        try:
            sha = repository.commit(
                branch, header["summary"], files, header.get("description", ""), delete, header.get("parentCommit")
            )
        except Moved:
            return self._send(412, b'{"error": "A commit has happened since. Please refresh and try again."}')
        name = path.removeprefix("/api/").removeprefix("models/").partition("/commit/")[0]
        url = f"{self.server.url}/{name}/commit/{sha}"
        self._send_json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": "", "pullRequestUrl": None})

    def _of(self, path: str, part: str) -> tuple[GitRepository | None, str]:
        """The repository that an address of the API names, and what follows `part`."""
        before, _, after = path.partition(part)
        return self.server.repositories.get(before.removeprefix("/api/")), unquote(after)  # type: ignore[return-value]

    def _length_known(self) -> bool:
        return "Content-Length" in self.headers or self.headers.get("Transfer-Encoding") != "chunked"

    def _chunks(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data
