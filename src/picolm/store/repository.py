"""A branch of a repository on the Hugging Face Hub: its commits, and the files at each of them."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from picolm.errors import FileError, StoreError
from picolm.network import TreeEntry, cache_folder, fetch, file_list, in_cache, is_offline, listed, persist
from picolm.store.files import digest_file, disk_errors, write_atomically
from picolm.store.manifest import check_name
from picolm.trusted import TEXT_BYTES, parse_json, read_bytes


class Commit(NamedTuple):
    """One commit: its id, the first line of its message, and the rest of the message."""

    sha: str
    title: str
    body: str = ""


@dataclass(frozen=True)
class _CommitAnswer:
    """A commit in a response of the Hub."""

    id: str
    title: str
    message: str | None = None

    def commit(self) -> Commit:
        return Commit(self.id, self.title, self.message or "")


@dataclass(frozen=True)
class Branch:
    """A branch of a model repository. endpoint: None for the Hub of the environment.

    All methods raise StoreError when they fail.
    """

    repository: str
    name: str = "main"
    endpoint: str | None = None
    _trees: dict[str, dict[str, TreeEntry]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def place(self) -> str:
        """`hub:OWNER/REPOSITORY@BRANCH`, as `Run.open` takes it."""
        return f"hub:{self.repository}@{self.name}"

    def commits(self) -> list[Commit]:
        """Return all commits, newest first. Requests only those that are new since the last time; offline, none."""
        from huggingface_hub.errors import RevisionNotFoundError

        known = self._saved()
        if is_offline():
            if not known:
                raise StoreError(
                    f"{self.place}: offline mode (HF_HUB_OFFLINE) is on, and this machine has never read this branch; switch "
                    "it off once"
                )
            return known
        path = f"models/{self.repository}/commits/{quote(self.name, safe='')}"

        def is_known(answer: _CommitAnswer) -> bool:
            return bool(known) and answer.commit() == known[0]

        try:
            answers = listed(path, _CommitAnswer, self.place, StoreError, self.endpoint, is_known)
        except StoreError as error:
            if isinstance(error.__cause__, RevisionNotFoundError):
                there = ", ".join(self.names())
                raise StoreError(
                    f"{self.repository} has no branch {self.name!r} on the Hub (there are: {there})"
                ) from error
            raise
        commits = [answer.commit() for answer in answers]
        if known and commits[-1:] == known[:1]:
            commits = [*commits, *known[1:]]
        if commits != known:
            self._save(commits)
        return commits

    def find(self, file: str, commit: str, most_bytes: int | None = TEXT_BYTES) -> Path | None:
        """Return the path of a file at a commit, downloaded unless it is in the Hub's cache; None when there is none.

        most_bytes: the size of the file, or the largest size such a file may have; None when nothing is known.
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

    def is_cached(self, file: str, commit: str) -> bool:
        """Return whether a file at a commit is in the Hub's cache on this machine."""
        return isinstance(self._cached(check_name(file, self.place), commit), str)

    def identity(self, file: str, commit: str) -> str | None:
        """Return the Hub's id of a file (the sha-256 of a large one), without downloading it; None when there is none.

        For a cached file without such an id, it is the sha-256 of the content.
        """
        there = self._cached(file, commit)
        if isinstance(there, str):
            path = Path(there)
            linked = path.readlink() if path.is_symlink() else None
            return linked.name if linked is not None and linked.parent.name == "blobs" else digest_file(path).sha256
        entry = self.entries(commit).get(file) if there is None else None
        return (entry.sha256 or entry.oid) if entry is not None else None

    def entries(self, commit: str) -> dict[str, TreeEntry]:
        """Return every file at a commit, by name."""
        if commit not in self._trees:
            self._trees[commit] = file_list(self.repository, commit, "model", StoreError, self.endpoint, self.place)
        return self._trees[commit]

    def download(self, file: str, commit: str, folder: Path, file_bytes: int) -> Path:
        """Download a file at a commit into a folder, bypassing the Hub's cache, and return its path.

        A file that is in the cache already is copied from there.
        """
        there = self._cached(file, commit)
        if isinstance(there, str):
            target = folder / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(in_cache(Path(there)), target)
            return target
        name = f"{self.place}: {file}"
        return fetch(self.repository, file, commit, StoreError, self.endpoint, name, file_bytes, local_dir=folder)

    def names(self) -> list[str]:
        """Return the names of the branches of the repository."""
        return list(self.heads())

    def heads(self, tags: bool = False) -> dict[str, str]:
        """Return the newest commit of each branch of the repository, by name; with `tags`, those of its tags too."""
        from huggingface_hub import HfApi

        refs = persist(
            lambda: HfApi(endpoint=self.endpoint).list_repo_refs(self.repository), self.place, StoreError, self.endpoint
        )
        named = [*(refs.tags if tags else ()), *refs.branches]  # of one name, the branch counts
        return {ref.name: ref.target_commit for ref in named}

    def _cached(self, file: str, commit: str) -> Any:
        """Look a file up in the Hub's cache.

        Return its path; another object when it is known not to exist; None when nothing is known.
        """
        from huggingface_hub import try_to_load_from_cache

        return try_to_load_from_cache(self.repository, file, revision=commit)

    @property
    def _list_path(self) -> Path:
        branch = f"{self.repository.replace('/', '--')}@{quote(self.name, safe='')}"
        return cache_folder() / "hub" / f"{branch}--commits.json"

    def _saved(self) -> list[Commit]:
        try:
            return parse_json(read_bytes(self._list_path), str(self._list_path), list[Commit])
        except FileError:
            return []  # it can be requested again

    def _save(self, commits: list[Commit]) -> None:
        with disk_errors("the list of commits", self._list_path):
            self._list_path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._list_path, json.dumps(commits).encode())
