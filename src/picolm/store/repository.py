"""A branch of a repository on the Hugging Face Hub: its commits, and files as they were at one of them."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from picolm.errors import FileError, StoreError
from picolm.network import cache_folder, fetch, file_list, in_cache, is_offline, pages, persist
from picolm.store.files import digest_file, disk_errors, write_atomically
from picolm.store.layout import check_name
from picolm.trusted import TEXT_BYTES, parse_json, read_bytes


class Commit(NamedTuple):
    """One commit: its id, the first line of its message, and what follows that."""

    sha: str
    title: str
    body: str = ""


@dataclass(frozen=True)
class _CommitAnswer:
    """A commit in an answer of the Hub."""

    id: str
    title: str
    message: str | None = None


class Entry(NamedTuple):
    """What the Hub knows of a file. sha256: of a large one, else empty; oid: the id of the git object."""

    bytes: int
    sha256: str
    oid: str


@dataclass(frozen=True)
class Branch:
    """A branch of a model repository. endpoint None: the Hub of the environment. Everything raises StoreError."""

    repository: str
    name: str = "main"
    endpoint: str | None = None

    @property
    def place(self) -> str:
        """`hub:OWNER/REPOSITORY@BRANCH`, as it is given to `Run.open`."""
        return f"hub:{self.repository}@{self.name}"

    def commits(self) -> list[Commit]:
        """All commits from the newest back. Asks for those since the last time only; in offline mode for none."""
        known = self._saved()
        if is_offline():
            if not known:
                raise StoreError(
                    f"{self.place}: offline mode (HF_HUB_OFFLINE) is on, and this machine has never read this branch; switch "
                    "it off once"
                )
            return known
        commits = self._since(known)
        if commits != known:
            self._save(commits)
        return commits

    def find(self, file: str, commit: str, most_bytes: int | None = TEXT_BYTES) -> Path | None:
        """Return the path of a file as of a commit, fetched unless it is in the Hub's cache; None when the commit has none.

        most_bytes: the size of the file, or the most that such a file may have; None where nothing is known.
        """
        from huggingface_hub.errors import RemoteEntryNotFoundError

        check_name(file, self.place)
        there = self._cached(file, commit)
        if isinstance(there, str):
            return in_cache(Path(there))
        if there is not None:
            return None
        name = f"{self.place}: {file}"
        try:
            return in_cache(fetch(self.repository, file, commit, StoreError, self.endpoint, name, most_bytes))
        except StoreError as error:
            if isinstance(error.__cause__, RemoteEntryNotFoundError):
                return None
            raise

    def identity(self, file: str, commit: str) -> str | None:
        """What the Hub knows a file by (the sha-256 of a large one), without fetching it; None when the commit has none."""
        there = self._cached(file, commit)
        if isinstance(there, str):
            path = Path(there)
            linked = path.readlink() if path.is_symlink() else None
            return linked.name if linked is not None and linked.parent.name == "blobs" else digest_file(path).sha256
        return self._ask_identity(file, commit) if there is None else None

    def sizes(self, commit: str) -> dict[str, int]:
        """Every file as of a commit, and its bytes."""
        return {name: entry.bytes for name, entry in self.entries(commit).items()}

    def entries(self, commit: str) -> dict[str, Entry]:
        """Every file as of a commit."""
        found = file_list(self.repository, commit, "model", StoreError, self.endpoint, self.place)
        return {path: Entry(entry.size, entry.lfs.oid if entry.lfs else "", entry.oid) for path, entry in found.items()}

    def download(self, file: str, commit: str, folder: Path, file_bytes: int) -> Path:
        """Put a file as of a commit into a folder: from the Hub's cache where it is there, else fetched past the cache."""
        there = self._cached(file, commit)
        if isinstance(there, str):
            target = folder / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(in_cache(Path(there)), target)
            return target
        name = f"{self.place}: {file}"
        return fetch(self.repository, file, commit, StoreError, self.endpoint, name, file_bytes, local_dir=folder)

    def names(self) -> list[str]:
        """The branches of the repository."""
        from huggingface_hub import HfApi

        refs = persist(
            lambda: HfApi(endpoint=self.endpoint).list_repo_refs(self.repository), self.place, StoreError, self.endpoint
        )
        return [branch.name for branch in refs.branches]

    def _since(self, known: list[Commit]) -> list[Commit]:
        """Return all commits, asking page by page from the newest back until one that is known."""
        from huggingface_hub import constants

        url = f"{self.endpoint or constants.ENDPOINT}/api/models/{self.repository}/commits/{quote(self.name, safe='')}"
        commits: dict[Commit, None] = {}
        for page in self._pages(url):
            before = len(commits)
            for commit in page:
                if known and commit == known[0]:
                    return [*commits, *known]
                commits[commit] = None
            if page and len(commits) == before:
                raise StoreError(f"{self.place}: {url} repeats its pages; check HF_ENDPOINT")
        return list(commits)

    def _pages(self, url: str) -> Iterator[list[Commit]]:
        """Yield the pages of the list of commits."""
        from huggingface_hub.errors import RevisionNotFoundError

        try:
            for page in pages(url, list[_CommitAnswer], self.place, StoreError, self.endpoint):
                yield [Commit(entry.id, entry.title, entry.message or "") for entry in page]
        except StoreError as error:
            if isinstance(error.__cause__, RevisionNotFoundError):
                there = ", ".join(self.names())
                raise StoreError(
                    f"{self.repository} has no branch {self.name!r} on the Hub (there are: {there})"
                ) from error
            raise

    def _cached(self, file: str, commit: str) -> Any:
        """The path of a file in the Hub's cache, another object when it is known that there is none, None when not known."""
        from huggingface_hub import try_to_load_from_cache

        return try_to_load_from_cache(self.repository, file, revision=commit)

    def _ask_identity(self, file: str, commit: str) -> str | None:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import RemoteEntryNotFoundError

        url = hf_hub_url(self.repository, file, revision=commit, endpoint=self.endpoint)

        def ask() -> str | None:
            try:
                return get_hf_file_metadata(url, endpoint=self.endpoint).etag
            except RemoteEntryNotFoundError:
                return None

        return persist(ask, f"{self.place}: {file}", StoreError, self.endpoint)

    @property
    def _list_path(self) -> Path:
        branch = f"{self.repository.replace('/', '--')}@{quote(self.name, safe='')}"
        return cache_folder() / "hub" / f"{branch}--commits.json"

    def _saved(self) -> list[Commit]:
        try:
            return parse_json(read_bytes(self._list_path), str(self._list_path), list[Commit])
        except FileError:
            return []  # it can be asked for again

    def _save(self, commits: list[Commit]) -> None:
        with disk_errors("the list of commits", self._list_path):
            self._list_path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._list_path, json.dumps(commits).encode())
