"""Requests to the Hugging Face Hub through huggingface_hub, with limits, more retries and clear error messages.

huggingface_hub retries lists and uploads, and resumes interrupted downloads. `persist` retries other calls, after 1, 2,
4 and 8 s or when the server says. A downloaded file is in the Hub's own cache, complete or not there at all.
`HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME` and `HF_HUB_OFFLINE` mean the same as in huggingface_hub. huggingface_hub reads the
token for each request; it is not stored here, and secrets are removed from messages.
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
_SILENCE_S = 120.0  # time-out of a request: longest time without any data
_SLOWEST = 1000.0  # bytes per second; the download of a response may take _SILENCE_S longer than at this speed
_ANSWER_BYTES = 64 << 20  # most bytes of a response without a length, or with JSON
_ENCODED_BYTES = 1 << 20  # the same for a compressed response, which may expand by a factor of 1000
_PAGES = 2000  # most pages of one list

_endpoints: set[tuple[str, str, int | None]] = set()  # origins of Hubs given by callers; they may get the token
_most_bytes: ContextVar[int | None] = ContextVar("most_bytes", default=None)


def cache_folder() -> Path:
    """Return `$PICO_CACHE`, else `~/.cache/pico`."""
    return Path(os.environ.get("PICO_CACHE") or "~/.cache/pico").expanduser()


def is_offline() -> bool:
    """Return whether offline mode of huggingface_hub is on (`HF_HUB_OFFLINE=1`)."""
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

    endpoint: None for that of the environment. name: the file in messages. most_bytes: the size of the file, or the
    most bytes that it may have. options: of `hf_hub_download`.
    """
    from huggingface_hub import hf_hub_download

    def download() -> str:
        return hf_hub_download(repository, file, revision=revision, endpoint=endpoint, **options)

    with answers_of(most_bytes):
        return Path(persist(download, name or f"{repository}: {file}", failure, endpoint))


def in_cache(path: Path, folder: Path | None = None) -> Path:
    """Return the regular file behind a path in the cache of huggingface_hub, where names are links to the content.

    folder: another cache than that of this process. Raises FileError if it leads out of the cache.
    """
    from huggingface_hub import constants

    target, cache = path.resolve(), (folder or Path(constants.HF_HUB_CACHE)).resolve()
    if not target.is_relative_to(cache):
        raise FileError(f"{path}: leads out of the cache of the Hub ({cache}); delete it, and it is fetched again")
    require_regular(target)
    return target


@dataclass(frozen=True)
class LargeFile:
    """The Hub's entry for a large file, which is not stored in git itself. oid: its sha-256."""

    oid: str


@dataclass(frozen=True)
class TreeEntry:
    """An entry in the file list of a repository. size: in bytes. oid: the id of the git object."""

    type: str
    path: str
    oid: str
    size: int = 0
    lfs: LargeFile | None = None

    @property
    def sha256(self) -> str:
        """The sha-256 of a large file; empty for any other file."""
        return self.lfs.oid if self.lfs else ""


def file_list(
    repository: str,
    revision: str,
    kind: Literal["model", "dataset"],
    failure: type[PicoError],
    endpoint: str | None = None,
    name: str | None = None,
) -> dict[str, TreeEntry]:
    """Return the files of a repository at a revision, by path. Raises `failure`."""
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
    """Return the entries of a list of the Hub's API, parsed as `form`, up to the first for which `is_last` is true.

    Raises `failure`, also if the list does not end or if its next page is on another host: the request of a page
    contains the token, and the URL of the next page comes from the response.
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
    """Return the body of a page of a list, and the URL of the next page, or None."""
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
    """Call huggingface_hub, with retries while the server is busy or unreachable. Returns the result of the call.

    name, verb: the requested object and the action that failed, for messages. Raises `failure` with the reason.
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
    """Return whether an error comes from the network, the disk, the server or the Hub client, not from Pico's own code.

    hf_xet, which transfers large files, raises RuntimeError for network errors. huggingface_hub may raise any exception
    for a response that it cannot read.
    """
    from huggingface_hub import errors

    if isinstance(error, OSError | RuntimeError | ValueError | errors.HTTPError | errors.EntryNotFoundError):
        return True
    innermost = list(walk_tb(error.__traceback__))[-1][0]
    return str(innermost.f_globals.get("__name__")).startswith(("huggingface_hub", "httpx"))


@cache
def bound_requests() -> None:
    """Set up the HTTP client of huggingface_hub for this process.

    Requests have a time-out, responses a limit in bytes; the token is sent only to the Hub; and huggingface_hub neither
    logs its retries nor draws progress bars.
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
    """Remove the token from a request to another host: URLs of pages, uploads and redirects come from responses."""
    if _origin(str(request.url)) not in {_origin(_hub(None)), *_endpoints}:
        request.headers.pop("authorization", None)


def _bound_answer(response: Any) -> None:
    """Make reading the body of a response raise FileError if it is too large or too slow."""
    encoded = response.headers.get("content-encoding", "identity") != "identity"
    whole = "content-length" in response.headers and "json" not in response.headers.get("content-type", "")
    most = _ENCODED_BYTES if encoded else None if whole else _ANSWER_BYTES
    limits = [limit for limit in (most, _most_bytes.get() if response.is_success else None) if limit is not None]
    module = sys.modules[type(response).__module__.partition(".")[0]]  # httpx or httpx2, whichever huggingface_hub uses
    response.stream = _bounded(response.stream, redacted(str(response.url)), min(limits, default=None), module)


def _bound_wait(response: Any) -> None:
    """Limit the waiting time in a response's headers: huggingface_hub waits for as long as the server says."""
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
    """Limit successful responses that are read in this block to `most_bytes`; None sets no limit."""
    token = _most_bytes.set(most_bytes)
    try:
        yield
    finally:
        _most_bytes.reset(token)


def _hub(endpoint: str | None) -> str:
    from huggingface_hub import constants

    return (endpoint or constants.ENDPOINT).rstrip("/")


def _origin(url: str) -> tuple[str, str, int | None]:
    """Return the scheme, host and port of a URL."""
    try:
        parsed = urlsplit(url)
        return parsed.scheme, parsed.hostname or "", parsed.port or {"http": 80, "https": 443}.get(parsed.scheme)
    except ValueError:  # not a URL
        return "", url, None


def asked_wait_s(error: BaseException | None) -> float:
    """Return the seconds that the server asked to wait (`Retry-After`), at most 300; 0 if it did not ask."""
    if error is None:
        return 0.0
    seconds = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
    return min(float(seconds), _LONGEST_WAIT_S) if seconds.isdigit() else asked_wait_s(error.__cause__)


def status_of(error: BaseException | None) -> int | None:
    """Return the HTTP status of the response in an error; None if it has none."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _may_pass(error: BaseException | None) -> bool:
    """Return whether a retry may help: 408, 429, 5xx, a lost or refused connection, an incomplete response."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    if isinstance(error, HfHubHTTPError):
        status = status_of(error) or 0
        return status in (408, 429) or status >= 500
    if isinstance(error, HTTPError | ConnectionError | TimeoutError | RuntimeError):  # hf_xet raises RuntimeError
        return not is_offline()
    if isinstance(error, JSONDecodeError):  # a truncated response, or one from a proxy
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
    """Return a message without secrets: without the token, and the credentials and query parameters of URLs."""
    from huggingface_hub import get_token

    token = get_token()
    text = text.replace(token, "…") if token else text
    return re.sub(r"\?[^\s'\")]+=[^\s'\")]*", "?…", re.sub(r"//[^/@\s]+@", "//", text))
