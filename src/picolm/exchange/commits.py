"""Write to a repository on the Hub: create the repository and the branch where there are none, and make commits."""

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path

from picolm.errors import PicoError
from picolm.network import is_offline, persist, status_of

Files = Mapping[str, Path | bytes]

_LARGE_BYTES = 1 << 20
_PRECONDITION_FAILED = 412


def prepare_repository(repository: str, branch: str, kind: str, private: bool, failure: type[PicoError]) -> None:
    """Create a repository (kind: model or dataset) and a branch of it, unless they exist. Raises `failure`."""
    from huggingface_hub import HfApi

    if is_offline():
        raise failure(f"{repository}: offline mode (HF_HUB_OFFLINE) is on, nothing is sent; switch it off")
    api = HfApi()
    visible = private or None  # an existing repository keeps its visibility; None: as the account says

    def create() -> None:
        api.create_repo(repository, repo_type=kind, private=visible, exist_ok=True)
        if branch != "main":  # start from the first commit: files of another run on main are not part of this run
            first = api.list_repo_commits(repository, repo_type=kind)[-1].commit_id
            api.create_branch(repository, branch=branch, revision=first, repo_type=kind, exist_ok=True)

    persist(create, f"{repository}@{branch}", failure, verb="made on")


def commit(
    repository: str,
    branch: str,
    kind: str,
    title: str,
    files: Files,
    failure: type[PicoError],
    *,
    body: str = "",
    delete: Collection[str] = (),
    parent: str | None = None,
) -> str:
    """Make a commit; return its id, or the id of the newest commit when nothing would change. Raises `failure`.

    huggingface_hub does not upload a file that is there with the same content. parent: the commit that it must follow;
    `has_moved` of the error returns whether another commit came first. Large files are uploaded one by one in the
    calling thread: at exit, Python would wait for a pool of threads, however long they take.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file", category=UserWarning)

    def send() -> str:
        added = [
            CommitOperationAdd(name, file if isinstance(file, bytes) else str(file)) for name, file in files.items()
        ]
        for addition in added:
            if addition.upload_info.size >= _LARGE_BYTES:
                api.preupload_lfs_files(repository, [addition], repo_type=kind, revision=branch, free_memory=False)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [*added, *map(CommitOperationDelete, delete)]
        return api.create_commit(
            repository, operations, commit_message=title, commit_description=body, repo_type=kind, revision=branch,
            parent_commit=parent,
        ).oid  # fmt: skip

    return persist(send, f"{repository}@{branch}: {title}", failure, verb="sent to")


def has_moved(error: PicoError) -> bool:
    """Return whether a commit was refused because another one came before it.

    That one may be someone else's, or our own whose response was lost.
    """
    return status_of(error.__cause__) == _PRECONDITION_FAILED
