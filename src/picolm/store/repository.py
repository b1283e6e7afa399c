"""A branch of a repository on the Hugging Face Hub: its commits, and files as they were at one of them."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from picolm.errors import FileError, StoreError
from picolm.network import TreeEntry, cache_folder, fetch, file_list, in_cache, is_offline, listed, persist
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

    def commit(self) -> Commit:
        return Commit(self.id, self.title, self.message or "")


@dataclass(frozen=True)
class Branch:
    """A branch of a model repository. endpoint None: the Hub of the environment. Everything raises StoreError."""

    repository: str
    name: str = "main"
    endpoint: str | None = None
    _trees: dict[str, dict[str, TreeEntry]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def place(self) -> str:
        """`hub:OWNER/REPOSITORY@BRANCH`, as it is given to `Run.open`."""
        return f"hub:{self.repository}@{self.name}"

    def commits(self) -> list[Commit]:
        """All commits from the newest back. Asks for those since the last time only; in offline mode for none."""
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
        """Return what the Hub knows a file by (the sha-256 of a large one), without fetching it; None when there is none."""
        there = self._cached(file, commit)
        if isinstance(there, str):
            path = Path(there)
            linked = path.readlink() if path.is_symlink() else None
            return linked.name if linked is not None and linked.parent.name == "blobs" else digest_file(path).sha256
        entry = self.entries(commit).get(file) if there is None else None
        return (entry.sha256 or entry.oid) if entry is not None else None

    def entries(self, commit: str) -> dict[str, TreeEntry]:
        """Return every file as of a commit."""
        if commit not in self._trees:
            self._trees[commit] = file_list(self.repository, commit, "model", StoreError, self.endpoint, self.place)
        return self._trees[commit]

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

    def _cached(self, file: str, commit: str) -> Any:
        """The path of a file in the Hub's cache, another object when it is known that there is none, None when not known."""
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
            return []  # it can be asked for again

    def _save(self, commits: list[Commit]) -> None:
        with disk_errors("the list of commits", self._list_path):
            self._list_path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._list_path, json.dumps(commits).encode())
