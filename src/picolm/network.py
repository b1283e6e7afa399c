"""Requests to the Hugging Face Hub, with patience and with reasons.

A busy or unreachable server is tried again, after 1, 2, 4 and 8 s or when it says; what cannot get better by waiting is said at
once. What was fetched lies in the Hub's own cache, whole or not at all. `HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME` and `HF_HUB_OFFLINE`
mean what they mean to huggingface_hub.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from picolm.errors import PicoError

Result = TypeVar("Result")

_ATTEMPTS = 5
_FIRST_WAIT_S = 1.0
_LONGEST_WAIT_S = 300.0


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
    **options: Any,
) -> Path:
    """The path of a file of a repository in the Hub's cache, downloaded if it is not there. Raises `failure`.

    endpoint None: that of the environment. name: what the file is called in messages. options: of `hf_hub_download`.
    """
    from huggingface_hub import hf_hub_download

    def download() -> str:
        return hf_hub_download(
            repository, file, revision=revision, endpoint=endpoint, tqdm_class=_silent_bar(), **options
        )

    return Path(persist(download, name or f"{repository}: {file}", failure, endpoint))


def persist(call: Callable[[], Result], name: str, failure: type[PicoError], endpoint: str | None = None) -> Result:
    """The result of a request, tried again while the server is busy or away. Raises `failure`, saying why there is none.

    name: what is asked for, for the message.
    """
    from huggingface_hub import errors

    # hf_xet, which moves large files, reports what goes wrong on the network as a RuntimeError
    troubles = (OSError, RuntimeError, errors.HTTPError, errors.EntryNotFoundError, errors.HFValidationError)
    for attempt in range(_ATTEMPTS):
        try:
            return call()
        except troubles as error:
            if attempt + 1 == _ATTEMPTS or not _may_pass(error):
                raise failure(_explanation(error, name, endpoint)) from error
            time.sleep(max(_FIRST_WAIT_S * 2**attempt, _asked_wait_s(error)))
    raise AssertionError("unreachable")


def _asked_wait_s(error: BaseException | None) -> float:
    """The seconds that the server asked to wait (`Retry-After`), 0 where it did not."""
    if error is None:
        return 0.0
    headers = getattr(getattr(error, "response", None), "headers", {})
    seconds = headers.get("Retry-After", "")
    return min(float(seconds), _LONGEST_WAIT_S) if seconds.isdigit() else _asked_wait_s(error.__cause__)


def _may_pass(error: BaseException | None) -> bool:
    """Whether trying again may help: 408, 429, 5xx, a lost or refused connection, a download that came short."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response is not None and (
            error.response.status_code in (408, 429) or error.response.status_code >= 500
        )
    if isinstance(error, HTTPError | ConnectionError | TimeoutError | RuntimeError):
        return not is_offline()
    return "Consistency check" in str(error) or (error is not None and _may_pass(error.__cause__))


def _explanation(error: Exception, name: str, endpoint: str | None) -> str:
    from huggingface_hub import constants, errors

    hub = f"the Hub ({endpoint or constants.ENDPOINT})"
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
    return f"{name}: could not be fetched from {hub}: {reason}"


def _silent_bar() -> type:
    """A progress bar that does not draw over the one of the training."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    class Silent(tqdm):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options | {"disable": True})

    return Silent
