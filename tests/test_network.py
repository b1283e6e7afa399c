"""Requests to the Hub: what may pass is tried again, with growing waits or as asked; the rest is explained at once."""

from collections.abc import Callable
from typing import Any

import pytest

from picolm.errors import DataError, StoreError
from picolm.network import persist


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds waited for, without waiting."""
    asked: list[float] = []
    monkeypatch.setattr("time.sleep", asked.append)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return asked


@pytest.fixture
def answer() -> Callable[..., Exception]:
    """A function from a status and headers to the error that the client makes of such an answer."""
    from huggingface_hub import errors

    def make(status: int, **headers: str) -> Exception:
        class Response:
            status_code = status

        Response.headers = {name.replace("_", "-"): value for name, value in headers.items()}  # type: ignore[attr-defined]
        error = errors.HfHubHTTPError.__new__(errors.HfHubHTTPError)
        Exception.__init__(error, f"{status} Client Error")
        error.response = Response  # type: ignore[assignment]
        return error

    return make


def failing(*errors: Exception) -> Callable[[], Any]:
    remaining = list(errors)

    def call() -> Any:
        if remaining:
            raise remaining.pop(0)
        return "answer"

    return call


def test_waits_grow_until_patience_ends(waits: list[float]) -> None:
    with pytest.raises(DataError, match=r"x: could not be fetched from the Hub \(.*\): gone"):
        persist(failing(*[ConnectionError("gone")] * 9), "x", DataError)
    assert waits == [1, 2, 4, 8]
    assert persist(failing(*[ConnectionError("gone")] * 4), "x", DataError) == "answer"


def test_only_what_may_pass_is_repeated(waits: list[float], answer: Callable[..., Exception]) -> None:
    with pytest.raises(KeyError, match="a bug"):
        persist(failing(KeyError("a bug")), "x", DataError)
    with pytest.raises(StoreError, match=r"x: could not be fetched .*No space left"):
        persist(failing(OSError(28, "No space left on device")), "x", StoreError)
    with pytest.raises(
        StoreError, match=r"x: the Hub \(.*\) refuses access \(401\); check HF_TOKEN, or `hf auth login` again"
    ):
        persist(failing(answer(401)), "x", StoreError)
    assert waits == []


def test_a_server_that_says_how_long_to_wait_is_obeyed(waits: list[float], answer: Callable[..., Exception]) -> None:
    outer = FileNotFoundError("not in the cache")
    outer.__cause__ = answer(
        503, Retry_After="3"
    )  # how the client reports a busy server when it falls back to its cache
    errors = [answer(429, Retry_After="60"), outer, answer(503), answer(429, Retry_After="99999")]
    assert persist(failing(*errors), "x", StoreError) == "answer"
    assert waits == [60, 3, 4, 300]
