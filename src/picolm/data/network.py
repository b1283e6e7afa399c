"""Requests to the Hugging Face Hub, with patience and with reasons.

A busy or unreachable server is tried again, after 1, 2, 4 and 8 s; what cannot get better by waiting is said at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from picolm.errors import DataError

Result = TypeVar("Result")

_ATTEMPTS = 5
_FIRST_WAIT_S = 1.0


def is_offline() -> bool:
    """Whether huggingface_hub is told to stay off the network (`HF_HUB_OFFLINE=1`)."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def persist(call: Callable[[], Result], name: str, endpoint: str | None = None) -> Result:
    """The result of a request, tried again while the server is busy or away. Raises DataError saying why there is none."""
    from huggingface_hub import errors

    # hf_xet, which moves large files, reports what goes wrong on the network as a RuntimeError
    troubles = (OSError, RuntimeError, errors.HTTPError, errors.EntryNotFoundError, errors.HFValidationError)
    for attempt in range(_ATTEMPTS):
        try:
            return call()
        except troubles as error:
            if attempt + 1 == _ATTEMPTS or not _may_pass(error):
                raise _explain(error, name, endpoint) from error
            time.sleep(_FIRST_WAIT_S * 2**attempt)
    raise AssertionError("unreachable")


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


def _explain(error: Exception, name: str, endpoint: str | None) -> DataError:
    from huggingface_hub import constants, errors

    hub = f"the Hub ({endpoint or constants.ENDPOINT})"
    if isinstance(error, errors.RevisionNotFoundError | errors.RemoteEntryNotFoundError):
        return DataError(f"{name}: is not on {hub}; check the revision and the file")
    if isinstance(error, errors.GatedRepoError):
        return DataError(f"{name}: access is restricted; ask for it on its page on {hub}, then `hf auth login`")
    if isinstance(error, errors.RepositoryNotFoundError):
        return DataError(
            f"{name}: is neither a folder here nor a repository on {hub} that may be read without further rights; "
            "check the name, or for a private one `hf auth login` or set HF_TOKEN"
        )
    if is_offline():
        return DataError(
            f"{name}: is not in the Hub's cache, and offline mode (HF_HUB_OFFLINE) is on; switch it off once"
        )
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return DataError(f"{name}: could not be fetched from {hub}: {reason}")
