"""Requests to the Hugging Face Hub, through huggingface_hub: bounded, repeated where the client does not, explained.

huggingface_hub repeats the requests of lists and uploads and resumes downloads that break off; `persist` repeats
what it does not, after 1, 2, 4 and 8 s or when the server says. A downloaded file lies in the Hub's own cache, whole or not at
all. `HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME` and `HF_HUB_OFFLINE` mean what they mean to huggingface_hub. huggingface_hub reads the
token for each request; it is held nowhere here, and messages are shown without secrets that they may quote.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
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

_endpoints: set[tuple[str, str, int | None]] = set()  # of the Hubs named by a caller; they may get the token
_most_bytes: ContextVar[int | None] = ContextVar("most_bytes", default=None)


def cache_folder() -> Path:
    """Return `$PICO_CACHE`, else `~/.cache/pico`."""
    return Path(os.environ.get("PICO_CACHE") or "~/.cache/pico").expanduser()


def is_offline() -> bool:
    """Return whether huggingface_hub is told to stay off the network (`HF_HUB_OFFLINE=1`)."""
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
        return hf_hub_download(repository, file, revision=revision, endpoint=endpoint, **options)

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

    @property
    def sha256(self) -> str:
        """The digest of a large file, empty for any other."""
        return self.lfs.oid if self.lfs else ""


def file_list(
    repository: str,
    revision: str,
    kind: Literal["model", "dataset"],
    failure: type[PicoError],
    endpoint: str | None = None,
    name: str | None = None,
) -> dict[str, TreeEntry]:
    """Return the files of a repository at a revision by their path. Raises `failure`."""
    path = f"{kind}s/{repository}/tree/{quote(revision, safe='')}?recursive=true&expand=false"
    entries = listed(path, TreeEntry, name or repository, failure, endpoint)
    return {entry.path: entry for entry in entries if entry.type == "file"}


def listed(
    path: str,
    form: type[Result],
    name: str,
    failure: type[PicoError],
    endpoint: str | None = None,
    is_last: Callable[[Result], bool] = lambda entry: False,
) -> list[Result]:
    """Return the entries of a list of the Hub's API, each parsed as `form`, up to the first that `is_last`.

    Raises `failure`, also for a list without an end and for one that goes on at another host: the request of a page carries
    the token, and the address of the next page comes from the answer.
    """
    first = url = f"{_hub(endpoint)}/api/{path}"
    found: list[Result] = []
    for _ in range(_PAGES):
        content, following = persist(partial(_page, url), name, failure, endpoint, attempts=1)
        try:
            page: list[Result] = parse_json(content, redacted(url), list[form])  # type: ignore[valid-type]
        except FileError as error:
            raise failure(f"{name}: does not answer as a Hub does; check HF_ENDPOINT ({error})") from error
        for entry in page:
            found.append(entry)
            if is_last(entry):
                return found
        if following is None:
            return found
        if _origin(following) != _origin(first):
            raise failure(
                f"{name}: the next page of the list lies on another host ({redacted(following)}); not followed"
            )
        if not page:
            break
        url = following
    raise failure(f"{name}: {redacted(first)} has no end: an empty page, or over {_PAGES} pages; check HF_ENDPOINT")


def _page(url: str) -> tuple[bytes, str | None]:
    """Return the body of a page of a list, and the address of the next page."""
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

    response = http_backoff("GET", url, headers=build_hf_headers(), follow_redirects=True, timeout=_SILENCE_S)
    hf_raise_for_status(response)
    following = response.links.get("next", {}).get("url")
    return response.content, None if following is None else urljoin(url, following)


def persist(
    call: Callable[[], Result],
    name: str,
    failure: type[PicoError],
    endpoint: str | None = None,
    *,
    verb: str = "fetched from",
    attempts: int = _ATTEMPTS,
) -> Result:
    """Return what a call of huggingface_hub returns; call again while the server is busy or away. Raises `failure` with a reason.

    name: what is asked for, for the message. verb: what could not be done with it.
    """
    bound_requests()
    if endpoint is not None:
        _endpoints.add(_origin(endpoint))
    for attempt in range(1, attempts + 1):
        try:
            return call()
        except PicoError:
            raise
        except Exception as error:
            if not _is_of_request(error):
                raise
            if attempt == attempts or not _may_pass(error):
                raise failure(_explanation(error, name, endpoint, verb)) from error
            time.sleep(max(_FIRST_WAIT_S * 2 ** (attempt - 1), asked_wait_s(error)))
    raise AssertionError("unreachable")


def _is_of_request(error: Exception) -> bool:
    """Return whether the network, the disk, the server or the client of the Hub failed, rather than our own code.

    hf_xet, which moves large files, raises RuntimeError for what the network does; an answer that huggingface_hub cannot read
    may end there in any exception.
    """
    from huggingface_hub import errors

    if isinstance(error, OSError | RuntimeError | ValueError | errors.HTTPError | errors.EntryNotFoundError):
        return True
    innermost = list(walk_tb(error.__traceback__))[-1][0]
    return str(innermost.f_globals.get("__name__")).startswith(("huggingface_hub", "httpx"))


@cache
def bound_requests() -> None:
    """Set up the HTTP client of huggingface_hub for this process.

    No request waits forever, no answer is read without an end, the token is sent to the Hub alone, and huggingface_hub
    neither logs its retries nor draws progress bars.
    """
    import logging

    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http, disable_progress_bars

    def make() -> Any:
        client = _http.default_client_factory()
        client.timeout = _SILENCE_S
        client.headers["accept-encoding"] = "identity"
        client.event_hooks["request"].append(_withhold_token)
        client.event_hooks["response"] += [_bound_answer, _bound_wait]
        return client

    set_client_factory(make)
    disable_progress_bars()
    for noisy in ("utils._http", "hf_api"):
        logging.getLogger(f"huggingface_hub.{noisy}").setLevel(logging.ERROR)


def _withhold_token(request: Any) -> None:
    """Remove the token from a request to another host: addresses of pages, uploads and redirects come from answers."""
    if _origin(str(request.url)) not in {_origin(_hub(None)), *_endpoints}:
        request.headers.pop("authorization", None)


def _bound_answer(response: Any) -> None:
    """Make reading the body of an answer raise FileError where it is too large or too slow."""
    encoded = response.headers.get("content-encoding", "identity") != "identity"
    whole = "content-length" in response.headers and "json" not in response.headers.get("content-type", "")
    most = _ENCODED_BYTES if encoded else None if whole else _ANSWER_BYTES
    limits = [limit for limit in (most, _most_bytes.get() if response.is_success else None) if limit is not None]
    module = sys.modules[type(response).__module__.partition(".")[0]]  # httpx or httpx2, whichever huggingface_hub uses
    response.stream = _bounded(response.stream, redacted(str(response.url)), min(limits, default=None), module)


def _bound_wait(response: Any) -> None:
    """Shorten the time after which the server asks to come back: huggingface_hub waits for as long as it says."""
    headers, most = response.headers, f"{_LONGEST_WAIT_S:.0f}"
    if "retry-after" in headers and not re.fullmatch("[0-2]?[0-9]{1,2}", headers["retry-after"]):
        headers["retry-after"] = most
    if "ratelimit" in headers:
        headers["ratelimit"] = re.sub(r"t=[0-9]{4,}", f"t={most}", headers["ratelimit"])


def _bounded(stream: Any, name: str, most_bytes: int | None, library: Any) -> Any:
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
    """Return scheme, host and port of an address."""
    try:
        parsed = urlsplit(url)
        return parsed.scheme, parsed.hostname or "", parsed.port or {"http": 80, "https": 443}.get(parsed.scheme)
    except ValueError:  # no address at all
        return "", url, None


def asked_wait_s(error: BaseException | None) -> float:
    """Return the seconds that the server asked to wait (`Retry-After`), 0 where it did not."""
    if error is None:
        return 0.0
    seconds = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
    return min(float(seconds), _LONGEST_WAIT_S) if seconds.isdigit() else asked_wait_s(error.__cause__)


def status_of(error: BaseException | None) -> int | None:
    """Return the HTTP status of the answer that an error tells of, None where it tells of none."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _may_pass(error: BaseException | None) -> bool:
    """Return whether trying again may help: 408, 429, 5xx, a lost or refused connection, an answer that came short."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    if isinstance(error, HfHubHTTPError):
        status = status_of(error) or 0
        return status in (408, 429) or status >= 500
    if isinstance(error, HTTPError | ConnectionError | TimeoutError | RuntimeError):  # hf_xet raises RuntimeError
        return not is_offline()
    if isinstance(error, JSONDecodeError):  # an answer that was cut, or is that of something between us and the Hub
        return True
    return "Consistency check" in str(error) or (error is not None and _may_pass(error.__cause__))


def _explanation(error: Exception, name: str, endpoint: str | None, verb: str) -> str:
    from huggingface_hub import errors

    hub = f"the Hub ({redacted(_hub(endpoint))})"
    if isinstance(error, errors.RevisionNotFoundError | errors.RemoteEntryNotFoundError):
        return f"{name}: is not on {hub}; check the revision and the file"
    if isinstance(error, errors.GatedRepoError):
        return f"{name}: access is restricted; ask for it on its page on {hub}, then `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{name}: is neither a folder here nor a repository on {hub} that may be read without further rights; "
            "check the name, or for a private one `hf auth login` or set HF_TOKEN"
        )
    if status_of(error) in (401, 403):
        return f"{name}: {hub} refuses access ({status_of(error)}); check HF_TOKEN, or `hf auth login` again"
    if is_offline():
        return f"{name}: is not in the Hub's cache, and offline mode (HF_HUB_OFFLINE) is on; switch it off once"
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        reason += f" ({error.__cause__})"
    return f"{name}: could not be {verb} {hub}: {redacted(reason)}"


def redacted(text: str) -> str:
    """Return a message of others without the token, the user of an address, and what an address grants by its query."""
    from huggingface_hub import get_token

    token = get_token()
    text = text.replace(token, "…") if token else text
    return re.sub(r"\?[^\s'\")]+=[^\s'\")]*", "?…", re.sub(r"//[^/@\s]+@", "//", text))
