"""A series of checkpoints of transformers on the Hugging Face Hub: a repository with a branch or a tag for each step.

Names, sizes and digests of files come from the Hub's list of them, without a download. A file is downloaded into the Hub's own
cache, once, when it is read.
"""

import json
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any, ClassVar

from picolm.errors import FileError, StoreError
from picolm.network import cache_folder, is_offline
from picolm.readers.checkpoint import CONFIG, WEIGHTS
from picolm.readers.series import Series, step_of
from picolm.store.checkpoint import Missing
from picolm.store.files import disk_errors, write_atomically
from picolm.store.legacy import StepFiles
from picolm.store.manifest import check_name, natural
from picolm.store.repository import Branch
from picolm.trusted import parse_json, read_bytes


class RevisionFiles:
    """The files of a repository at one commit. where: for messages."""

    knows_digests: ClassVar[bool] = True

    def __init__(self, branch: Branch, commit: str):
        self.where, self.repository = Path(branch.place), branch.repository
        self._branch, self._commit = branch, commit

    def has(self, name: str) -> bool:
        """Return whether there is such a file; offline, whether it is in the cache."""
        if is_offline():
            return self._branch.is_cached(name, self._commit)
        return name in self._branch.entries(self._commit)

    def find(self, name: str) -> Path | None:
        if not is_offline() and name not in self._branch.entries(self._commit):
            return None
        return self._branch.find(name, self._commit, None)

    def identity(self, name: str) -> str:
        found = self._branch.identity(name, self._commit)
        if found is None:
            raise Missing(f"{self.where} has no file {name!r}")
        return found

    def sizes(self) -> dict[str, int]:
        return {} if is_offline() else {name: entry.size for name, entry in self._branch.entries(self._commit).items()}


class HubSeries(Series):
    """A repository whose branches or tags are steps, read-only. revisions: (branch or tag, commit) of each step.

    Files are downloaded step by step, see `Downloads`: a series may be larger than the disk.
    """

    fetched_by_step = True

    def __init__(self, repository: str, revisions: Mapping[int, tuple[str, str]]):
        super().__init__(Path(f"hub:{repository}"), {step: name for step, (name, _) in revisions.items()})
        self.repository, self.revisions = repository, dict(sorted(revisions.items()))
        self._headers = KeptHeaders()
        self._branches = {step: Branch(repository, name) for step, (name, _) in self.revisions.items()}

    @property
    def name(self) -> str:
        return self.repository.split("/")[1]

    def step_path(self, step: int) -> Path:
        return Path(self._branches[step].place)

    def _files(self, step: int) -> StepFiles:
        return RevisionFiles(self._branches[step], self.revisions[step][1])

    @property
    def repositories(self) -> set[str]:
        """The repositories on the Hub that steps are in."""
        return {self.repository}

    def problems(self, step: int) -> list[str]:
        """Return what is wrong with a step by the Hub's list of files alone, see `Series.problems`."""
        return [*hub_problems(self._files(step)), *self.doubts.get(step, [])]

    def __reduce__(self) -> tuple[Any, ...]:
        return HubSeries, (self.repository, self.revisions)


def hub_problems(files: StepFiles) -> list[str]:
    """Return what is wrong with a step by the Hub's list of its files alone."""
    if not any(files.has(name) for name in WEIGHTS):
        return [f"{files.where}: holds no weights (looked for {', '.join(WEIGHTS)})"]
    return [] if files.has(CONFIG) else [f"{files.where}: holds no {CONFIG}"]


class KeptHeaders(MutableMapping[str, dict[str, tuple[int, ...]]]):
    """The shapes in files of weights by their digests, kept in a folder: a file that was read once is planned with without it."""

    def __init__(self, folder: Path | None = None):
        """folder: that of this machine's cache by default."""
        self._folder = folder or cache_folder() / "hub" / "headers"
        self._read: dict[str, dict[str, tuple[int, ...]]] = {}

    def __getitem__(self, digest: str) -> dict[str, tuple[int, ...]]:
        if digest not in self._read:
            file = self._folder / f"{check_name(digest, 'a digest')}.json"
            try:
                shapes = parse_json(read_bytes(file), str(file), dict[str, tuple[int, ...]])
            except FileError:
                raise KeyError(digest) from None
            self._read[digest] = shapes
        return self._read[digest]

    def __setitem__(self, digest: str, shapes: dict[str, tuple[int, ...]]) -> None:
        self._read[digest] = shapes
        with disk_errors("the shapes of weights", self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._folder / f"{check_name(digest, 'a digest')}.json", json.dumps(shapes).encode())

    def __delitem__(self, digest: str) -> None:
        del self._read[digest]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read)

    def __len__(self) -> int:
        return len(self._read)


class Downloads:
    """The weights that come into the Hub's cache while a series is read. `keep_only` deletes those that are not needed any more.

    What was in the cache before stays there.
    """

    def __init__(self, series: Series, repositories: Collection[str]):
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        self._series = series
        names = (repo_folder_name(repo_id=repository, repo_type="model") for repository in repositories)
        self._folders = [Path(constants.HF_HUB_CACHE) / name for name in names]
        self._before = {blob for folder in self._folders for blob in folder.glob("blobs/*")}

    def keep_only(self, steps: Collection[int]) -> None:
        """Delete the files of weights that were downloaded meanwhile, and that none of `steps` holds."""
        if is_offline():
            return
        needed = {digest for step in steps for digest in self._digests(step)}
        every = {digest for step in self._series.steps for digest in self._digests(step)}
        for folder in self._folders:
            for blob in {folder / "blobs" / name for name in every - needed} - self._before:
                if blob.is_file() and not blob.is_symlink():
                    for link in folder.glob("snapshots/*/*"):
                        if link.is_symlink() and link.readlink().name == blob.name:
                            link.unlink()
                    blob.unlink()

    def _digests(self, step: int) -> Collection[str]:
        if not self._series._files(step).knows_digests:
            return ()  # a folder on this machine
        try:
            return self._series._checkpoint(step).identities().values()
        except (StoreError, FileError):
            return ()  # whoever reads the step is told


def open_hub_series(place: str) -> HubSeries:
    """Return the series at `hub:OWNER/NAME`. Raises StoreError without one, and where two branches have the same step."""
    repository = place.removeprefix("hub:")
    heads = heads_of(Branch(repository))
    numbered = {name: step for name in sorted(heads, key=natural) if (step := step_of(name)) is not None}
    if not numbered:
        raise StoreError(
            f"{place}: no run here, and no series of checkpoints: no branch or tag has a step in its name; each run is a branch "
            f"(branches: {', '.join(heads)}), and is called hub:{repository}@BRANCH"
        )
    revisions: dict[int, tuple[str, str]] = {}
    for name, step in numbered.items():
        if step in revisions and revisions[step][1] != heads[name]:
            raise StoreError(
                f"{place}: the branches {revisions[step][0]} and {name} are both step {step}; download those that are meant "
                "into folders, and name these in a series.yaml"
            )
        revisions.setdefault(step, (name, heads[name]))
    return HubSeries(repository, revisions)


def heads_of(branch: Branch) -> dict[str, str]:
    """Return the commit of each branch and tag; offline, as they were when they were last asked for."""
    kept = cache_folder() / "hub" / f"{branch.repository.replace('/', '--')}--heads.json"
    if is_offline():
        try:
            found: dict[str, str] = parse_json(read_bytes(kept), str(kept), dict[str, str])
            return found
        except FileError as error:
            raise StoreError(
                f"hub:{branch.repository}: offline mode (HF_HUB_OFFLINE) is on, and this machine has never read this series; "
                "switch it off once"
            ) from error
    heads = branch.heads(tags=True)
    with disk_errors("the list of branches", kept):
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, json.dumps(heads).encode())
    return heads
