"""Requests to the Hugging Face Hub, with patience and with reasons.

A busy or unreachable server is tried again, after 1, 2, 4 and 8 s or when it says; what cannot get better by waiting is said at
once. What was fetched lies in the Hub's own cache, whole or not at all. `HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME` and `HF_HUB_OFFLINE`
mean what they mean to huggingface_hub. The token is read by huggingface_hub for each request and held nowhere here; what the
client says of an error is shown without secrets that it may quote.
"""

from __future__ import annotations

import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from json import JSONDecodeError
from pathlib import Path
from traceback import walk_tb
from typing import Any, Literal, TypeVar
from urllib.parse import quote, urljoin, urlsplit

from picolm.errors import FileError, PicoError
from picolm.trusted import parse_json, require_regular

Result = TypeVar("Result")

_ATTEMPTS = 5
_FIRST_WAIT_S = 1.0
_LONGEST_WAIT_S = 300.0
_SILENCE_S = 120.0  # a server that sends and takes nothing for so long is taken for lost
_SLOWEST = 1000.0  # bytes per second; an answer that comes slower for _SILENCE_S is given up
_ANSWER_BYTES = 64 << 20  # most bytes of an answer that states no length, or is JSON
_ENCODED_BYTES = 1 << 20  # the same for a compressed answer, which may expand a thousandfold
_PAGES = 2000  # most pages of one list
_LARGE_BYTES = 1 << 20
_MOVED = 412

_endpoints: set[tuple[str, str, int | None]] = set()  # of the Hubs named by a caller; they may get the token
_most_bytes: ContextVar[int | None] = ContextVar("most_bytes", default=None)


def cache_folder() -> Path:
    """`$PICO_CACHE`, else `~/.cache/pico`."""
    return Path(os.environ.get("PICO_CACHE") or "~/.cache/pico").expanduser()


def is_offline() -> bool:
    """Whether huggingface_hub is told to stay off the network (`HF_HUB_OFFLINE=1`)."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def fetch(
    repository: str,
    file: str,
    revision: str | None,
    failure: type[PicoError],
    endpoint: str | None = None,
    name: str | None = None,
    most_bytes: int | None = None,
    **options: Any,
) -> Path:
    """Download a file of a repository into the Hub's cache, unless it is there. Returns its path. Raises `failure`.

    endpoint None: that of the environment. name: what the file is called in messages. most_bytes: the size of the file, or
    the most that such a file may have. options: of `hf_hub_download`.
    """
    from huggingface_hub import hf_hub_download

    def download() -> str:
        return hf_hub_download(
            repository, file, revision=revision, endpoint=endpoint, tqdm_class=_silent_bar(), **options
        )

    with answers_of(most_bytes):
        return Path(persist(download, name or f"{repository}: {file}", failure, endpoint))


def in_cache(path: Path) -> Path:
    """Return the regular file that a path in the cache of huggingface_hub leads to: there, a name is a link to its content.

    Raises FileError where it leads out of the cache.
    """
    from huggingface_hub import constants

    target, cache = path.resolve(), Path(constants.HF_HUB_CACHE).resolve()
    if not target.is_relative_to(cache):
        raise FileError(f"{path}: leads out of the cache of the Hub ({cache}); delete it, and it is fetched again")
    require_regular(target)
    return target


@dataclass(frozen=True)
class LargeFile:
    """What the Hub knows of a file that git does not hold itself. oid: its sha-256."""

    oid: str


@dataclass(frozen=True)
class TreeEntry:
    """An entry of the file list of a repository. size: bytes. oid: the id of the git object."""

    type: str
    path: str
    oid: str
    size: int = 0
    lfs: LargeFile | None = None


def file_list(
    repository: str,
    revision: str,
    kind: Literal["model", "dataset"],
    failure: type[PicoError],
    endpoint: str | None = None,
    name: str | None = None,
) -> dict[str, TreeEntry]:
    """Return the files of a repository at a revision by their path. Raises `failure`."""
    url = f"{_hub(endpoint)}/api/{kind}s/{repository}/tree/{quote(revision, safe='')}?recursive=true&expand=false"
    found: dict[str, TreeEntry] = {}
    for page in pages(url, list[TreeEntry], name or repository, failure, endpoint):
        if page and all(entry.path in found for entry in page):
            raise failure(f"{name or repository}: {redacted(url)} repeats its pages; check HF_ENDPOINT")
        found |= {entry.path: entry for entry in page}
    return {path: entry for path, entry in found.items() if entry.type == "file"}


def pages(
    url: str, form: type[Result], name: str, failure: type[PicoError], endpoint: str | None = None
) -> Iterator[Result]:
    """Yield the pages of a list at `url`, each parsed as `form`. Raises `failure`.

    The address of the next page comes from the answer: it is followed only on the host of the first one, because the request
    carries the token.
    """
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    def ask() -> Any:
        response = get_session().get(url, headers=build_hf_headers(), follow_redirects=True, timeout=_SILENCE_S)
        hf_raise_for_status(response)
        return response

    first = url
    for _ in range(_PAGES):
        response = persist(ask, name, failure, endpoint)
        try:
            page = parse_json(response.content, redacted(url), form)
        except FileError as error:
            raise failure(f"{name}: does not answer as a Hub does; check HF_ENDPOINT ({error})") from error
        yield page
        following = response.links.get("next", {}).get("url")
        if following is None:
            return
        try:
            url = urljoin(url, following)
        except ValueError as error:
            raise failure(f"{name}: the address of the next page is none ({redacted(following)})") from error
        if _origin(url) != _origin(first):
            raise failure(
                f"{name}: the next page of the list lies on another host ({redacted(url)}); it is not followed"
            )
        if not page:
            break
    raise failure(
        f"{name}: {redacted(first)} has no end: an empty page, or more than {_PAGES} pages; check HF_ENDPOINT"
    )


def persist(
    call: Callable[[], Result],
    name: str,
    failure: type[PicoError],
    endpoint: str | None = None,
    *,
    deed: str = "fetched from",
    attempts: int = _ATTEMPTS,
) -> Result:
    """The result of a request, tried again while the server is busy or away. Raises `failure`, saying why there is none.

    name: what is asked for, for the message. deed: what could not be done with it.
    """
    from huggingface_hub import errors

    bound_requests()
    if endpoint is not None:
        _endpoints.add(_origin(endpoint))
    # hf_xet, which moves large files, reports what goes wrong on the network as a RuntimeError
    troubles = (OSError, RuntimeError, errors.HTTPError, errors.EntryNotFoundError, ValueError)
    for attempt in range(attempts):
        try:
            return call()
        except PicoError:
            raise
        except Exception as error:
            if not (isinstance(error, troubles) or _is_of_client(error)):
                raise
            if attempt + 1 == attempts or not _may_pass(error):
                raise failure(_explanation(error, name, endpoint, deed)) from error
            time.sleep(max(_FIRST_WAIT_S * 2**attempt, asked_wait_s(error)))
    raise AssertionError("unreachable")


@cache
def bound_requests() -> None:
    """Set up the HTTP client of huggingface_hub for this process.

    No request waits forever, no answer is read without an end, the token is sent to the Hub alone, and huggingface_hub
    leaves it to us to tell of retries.
    """
    import logging

    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    def make() -> Any:
        client = _http.default_client_factory()
        client.timeout = _SILENCE_S
        client.headers["accept-encoding"] = "identity"
        client.event_hooks["request"].append(_withhold_token)
        client.event_hooks["response"].append(_bound_answer)
        return client

    set_client_factory(make)
    for noisy in ("utils._http", "hf_api"):
        logging.getLogger(f"huggingface_hub.{noisy}").setLevel(logging.ERROR)


def _withhold_token(request: Any) -> None:
    """Remove the token from a request to another host: addresses of pages, uploads and redirects come from answers."""
    if _origin(str(request.url)) not in {_origin(_hub(None)), *_endpoints}:
        request.headers.pop("authorization", None)


def _bound_answer(response: Any) -> None:
    """Let reading the body of an answer raise FileError where it is too large or too slow."""
    encoded = response.headers.get("content-encoding", "identity") != "identity"
    whole = "content-length" in response.headers and "json" not in response.headers.get("content-type", "")
    most = _ENCODED_BYTES if encoded else None if whole else _ANSWER_BYTES
    module = type(response).__module__
    limits = [limit for limit in (most, _most_bytes.get() if response.is_success else None) if limit is not None]
    response.stream = _bounded(response.stream, redacted(str(response.url)), min(limits, default=None), module)


def _bounded(stream: Any, name: str, most_bytes: int | None, module: str) -> Any:
    library: Any = sys.modules[module.partition(".")[0]]  # httpx or httpx2, whichever huggingface_hub uses

    class Bounded(library.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            start, received = time.monotonic(), 0
            for part in stream:
                received += len(part)
                if most_bytes is not None and received > most_bytes:
                    raise FileError(
                        f"{name}: the answer holds more than {most_bytes:,} bytes, the most that is read of it"
                    )
                if time.monotonic() - start > _SILENCE_S + received / _SLOWEST:
                    raise FileError(f"{name}: the answer comes too slowly ({received} bytes so far); try again later")
                yield part

        def close(self) -> None:
            stream.close()

    return Bounded()


@contextmanager
def answers_of(most_bytes: int | None) -> Iterator[None]:
    """Let no answer that is read in this block hold more than so many bytes."""
    token = _most_bytes.set(most_bytes)
    try:
        yield
    finally:
        _most_bytes.reset(token)


def _hub(endpoint: str | None) -> str:
    from huggingface_hub import constants

    return (endpoint or constants.ENDPOINT).rstrip("/")


def _origin(url: str) -> tuple[str, str, int | None]:
    """Scheme, host and port of an address."""
    try:
        parsed = urlsplit(url)
        return parsed.scheme, parsed.hostname or "", parsed.port or {"http": 80, "https": 443}.get(parsed.scheme)
    except ValueError:  # no address at all
        return "", url, None


def asked_wait_s(error: BaseException | None) -> float:
    """The seconds that the server asked to wait (`Retry-After`), 0 where it did not."""
    if error is None:
        return 0.0
    headers = getattr(getattr(error, "response", None), "headers", {})
    seconds = headers.get("Retry-After", "")
    return min(float(seconds), _LONGEST_WAIT_S) if seconds.isdigit() else asked_wait_s(error.__cause__)


def _is_of_client(error: Exception) -> bool:
    """Return whether an error was raised in the code of huggingface_hub or its HTTP client: an answer that it cannot read."""
    frames = list(walk_tb(error.__traceback__))
    return bool(frames) and str(frames[-1][0].f_globals.get("__name__")).startswith(("huggingface_hub", "httpx"))


def _may_pass(error: BaseException | None) -> bool:
    """Whether trying again may help: 408, 429, 5xx, a lost or refused connection, a download that came short."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response is not None and (
            error.response.status_code in (408, 429) or error.response.status_code >= 500
        )
    if isinstance(error, HTTPError | ConnectionError | TimeoutError | RuntimeError):
        return not is_offline()
    if isinstance(error, JSONDecodeError):  # an answer that was cut, or is that of something between us and the Hub
        return True
    return "Consistency check" in str(error) or (error is not None and _may_pass(error.__cause__))


def _explanation(error: Exception, name: str, endpoint: str | None, deed: str) -> str:
    from huggingface_hub import constants, errors

    hub = f"the Hub ({redacted(endpoint or constants.ENDPOINT)})"
    if isinstance(error, errors.RevisionNotFoundError | errors.RemoteEntryNotFoundError):
        return f"{name}: is not on {hub}; check the revision and the file"
    if isinstance(error, errors.GatedRepoError):
        return f"{name}: access is restricted; ask for it on its page on {hub}, then `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{name}: is neither a folder here nor a repository on {hub} that may be read without further rights; "
            "check the name, or for a private one `hf auth login` or set HF_TOKEN"
        )
    if (
        isinstance(error, errors.HfHubHTTPError)
        and error.response is not None
        and error.response.status_code in (401, 403)
    ):
        return f"{name}: {hub} refuses access ({error.response.status_code}); check HF_TOKEN, or `hf auth login` again"
    if is_offline():
        return f"{name}: is not in the Hub's cache, and offline mode (HF_HUB_OFFLINE) is on; switch it off once"
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        reason += f" ({error.__cause__})"
    return f"{name}: could not be {deed} {hub}: {redacted(reason)}"


def redacted(text: str) -> str:
    """A message of others without the token, the user of an address, and what an address grants by its query."""
    from huggingface_hub import get_token

    token = get_token()
    text = text.replace(token, "…") if token else text
    return re.sub(r"\?[^\s'\")]+=[^\s'\")]*", "?…", re.sub(r"//[^/@\s]+@", "//", text))


def _silent_bar() -> type:
    """A progress bar that does not draw over the one of the training."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    class Silent(tqdm):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options | {"disable": True})

    return Silent


def prepare_repository(repository: str, branch: str, kind: str, private: bool, failure: type[PicoError]) -> None:
    """Make a repository (kind: model or dataset) and a branch of it, unless they are there. Raises `failure`."""
    from huggingface_hub import HfApi

    if is_offline():
        raise failure(f"{repository}: offline mode (HF_HUB_OFFLINE) is on, nothing is sent; switch it off")
    api = HfApi()
    visible = private or None  # what exists keeps its visibility; a new one is what the account says
    name = f"{repository}@{branch}"

    def create() -> None:
        api.create_repo(repository, repo_type=kind, private=visible, exist_ok=True)
        if branch != "main":  # it starts from the first commit: what another run left on main is not part of this one
            first = api.list_repo_commits(repository, repo_type=kind)[-1].commit_id
            api.create_branch(repository, branch=branch, revision=first, repo_type=kind, exist_ok=True)

    persist(create, name, failure, deed="made on")


def send(
    repository: str,
    branch: str,
    kind: str,
    title: str,
    files: Mapping[str, Path | bytes],
    failure: type[PicoError],
    *,
    body: str = "",
    delete: Collection[str] = (),
    parent: str | None = None,
) -> str:
    """One commit; returns its id, or that of the newest one where nothing would change. Raises `failure`.

    Files that are there with the same content are not sent again. parent: the commit that it must follow; that it does not
    is told by `has_moved` of the error. Large files go one by one, in the calling thread: a pool of threads would be waited
    for when the process ends, however long they take.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.utils import disable_progress_bars

    api = HfApi()
    disable_progress_bars()
    warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file", category=UserWarning)

    def commit() -> str:
        added = [
            CommitOperationAdd(name, file if isinstance(file, bytes) else str(file)) for name, file in files.items()
        ]
        for addition in added:
            if addition.upload_info.size >= _LARGE_BYTES:
                api.preupload_lfs_files(repository, [addition], repo_type=kind, revision=branch, free_memory=False)
        return api.create_commit(
            repository, [*added, *map(CommitOperationDelete, delete)], commit_message=title, commit_description=body,
            repo_type=kind, revision=branch, parent_commit=parent,
        ).oid  # fmt: skip

    return persist(commit, f"{repository}@{branch}: {title}", failure, deed="sent to")


def has_moved(error: PicoError) -> bool:
    """Whether a commit was refused because another one came before it: someone else's, or ours whose answer was lost."""
    response = getattr(error.__cause__, "response", None)
    return response is not None and response.status_code == _MOVED
