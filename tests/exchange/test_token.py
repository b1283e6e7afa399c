"""The token goes to the Hub and nowhere else, and no answer of a Hub is followed or read without an end."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.hub_server import clients_of
from tests.planted import TOKEN
from tests.scripted_server import Scripted, serving

from picolm import network
from picolm.errors import PicoError, StoreError
from picolm.store.hub import open_branch, whole_steps
from picolm.store.repository import Branch, Commit

ENTRY = {"type": "file", "path": "a.bin", "oid": "0" * 40, "size": 3}


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with clients_of(monkeypatch, tmp_path):
        yield monkeypatch


def commit(number: int, title: str = "Saving HF Model -- Step 0", message: str | None = "") -> dict[str, Any]:
    return {"id": f"{number:040x}", "title": title, "message": message}


def test_a_next_page_on_another_host_is_refused_and_never_asked(client: pytest.MonkeyPatch) -> None:
    with serving(lambda request: request.reply([commit(2)])) as other:
        link = f'<{other.url}/api/models/lab/run/commits/main?p=1>; rel="next"'
        with serving(
            lambda request: request.reply([commit(1) if "commits" in request.path else ENTRY], Link=link)
        ) as hub:
            with pytest.raises(StoreError, match="next page of the list lies on another host"):
                Branch("lab/run", "main", hub.url).commits()
            with pytest.raises(StoreError, match="next page of the list lies on another host"):
                network.file_list("lab/run", "main", "model", StoreError, hub.url)
            assert {token for _, token in hub.seen} == {f"Bearer {TOKEN}"}
        assert other.seen == []


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_to_another_host_is_followed_without_the_token(client: pytest.MonkeyPatch, status: int) -> None:
    with serving(lambda request: request.reply([ENTRY])) as other:
        with serving(lambda request: request.reply(b"", status, Location=other.url + request.path)) as hub:
            assert list(network.file_list("lab/run", "main", "model", StoreError, hub.url)) == ["a.bin"]
            assert {token for _, token in hub.seen} == {f"Bearer {TOKEN}"}
        assert [token for _, token in other.seen] == [None]


def test_a_library_call_to_another_host_carries_no_token(client: pytest.MonkeyPatch) -> None:
    """As for the addresses of uploads, of their confirmation, and of pages that huggingface_hub follows itself."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers

    with serving(lambda request: request.reply({})) as other, serving(lambda request: request.reply([])) as hub:
        network.file_list("lab/run", "main", "model", StoreError, hub.url)
        for method in ("GET", "POST"):
            get_session().request(method, other.url + "/verify", headers=build_hf_headers())
            get_session().request(method, hub.url + "/verify", headers=build_hf_headers())
        assert {token for _, token in other.seen} == {None}
        assert {token for _, token in hub.seen} == {f"Bearer {TOKEN}"}


def test_a_file_stored_elsewhere_is_fetched_without_the_token(client: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def resolve(request: Scripted) -> None:
        headers = {"X_Repo_Commit": "1" * 40, "X_Linked_Size": "4", "X_Linked_ETag": f'"{"2" * 64}"'}
        request.reply(b"", 302, Location=f"{other.url}/blob", **headers)

    with serving(lambda request: request.reply(b"data")) as other, serving(resolve) as hub:
        path = network.fetch("lab/run", "a.bin", "1" * 40, StoreError, hub.url)
        assert path.read_bytes() == b"data"
        assert other.seen
        assert {token for _, token in other.seen} == {None}
        assert {token for _, token in hub.seen} == {f"Bearer {TOKEN}"}


def _link(request: Scripted) -> str:
    number = int(request.path.partition("p=")[2] or 0)
    return f'<{request.server.url}/api/models/lab/run/commits/main?p={number + 1}>; rel="next"'


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "message", "most"),
    [
        (lambda request: [], "has no end", 1),
        (lambda request: [commit(1)], "has no end: an empty page, or over 30 pages", 30),
        (lambda request: [commit(len(request.server.seen))], "has no end: an empty page, or over 30 pages", 30),
    ],
    ids=["empty", "the same", "new ones"],
)
def test_pages_without_an_end_are_given_up(client: pytest.MonkeyPatch, page: Any, message: str, most: int) -> None:
    client.setattr(network, "_PAGES", 30)
    with serving(lambda request: request.reply(page(request), Link=_link(request))) as hub:
        with pytest.raises(StoreError, match=message):
            Branch("lab/run", "main", hub.url).commits()
        assert len(hub.seen) == most


def test_an_answer_without_an_end_is_cut(client: pytest.MonkeyPatch) -> None:
    client.setattr(network, "_ANSWER_BYTES", 1 << 20)
    with serving(lambda request: request.drip(b" " * 65536)) as hub:
        with pytest.raises(StoreError, match="the answer holds more than 1,048,576 bytes"):
            Branch("lab/run", "main", hub.url).commits()
        with pytest.raises(StoreError, match="the answer holds more than 1,048,576 bytes"):
            Branch("lab/run", "main", hub.url).names()


def test_a_slow_answer_is_given_up(client: pytest.MonkeyPatch) -> None:
    client.setattr(network, "_SILENCE_S", 0.3)
    with (
        serving(lambda request: request.drip(b" ", 0.05)) as hub,
        pytest.raises(StoreError, match="the answer comes too slowly"),
    ):
        Branch("lab/run", "main", hub.url).commits()


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["9" * 5000, "86400", "²", "-5", "tomorrow"])
@pytest.mark.parametrize("name", ["Retry_After", "RateLimit"])
def test_no_server_makes_us_wait_as_long_as_it_likes(client: pytest.MonkeyPatch, name: str, asked: str) -> None:
    waits: list[float] = []
    client.setattr("time.sleep", waits.append)

    def answer(request: Scripted) -> None:
        value = (asked if name == "Retry_After" else f'"api";r=0;t={asked}').encode("utf-8").decode("latin-1")
        busy = len(request.server.seen) < 3
        request.reply([] if busy else [commit(1)], 429 if busy else 200, **({name: value} if busy else {}))

    with serving(answer) as hub:
        assert len(Branch("lab/run", "main", hub.url).commits()) == 1
    assert len(waits) == 2
    assert max(waits) <= 301


def test_a_file_larger_than_it_may_be_is_not_fetched_whole(client: pytest.MonkeyPatch) -> None:
    def resolve(request: Scripted) -> None:
        size = str(1 << 24)
        headers = {"X_Repo_Commit": "1" * 40, "ETag": '"abc"', "Content_Length": size}
        request.reply(b"x" * 100_000 if request.command == "GET" else b"", **headers)

    with serving(resolve) as hub, pytest.raises(StoreError, match="holds more than 1,000 bytes"):
        Branch("lab/run", "main", hub.url).find("manifest.json", "1" * 40, 1000)


@pytest.mark.parametrize(
    "answer",
    [
        [5],
        {"id": "x"},
        [{"id": 5, "title": "x"}],
        [{"title": "x"}],
        "text",
        None,
        [commit(1, message=None) | {"title": ["x"]}],
        json.loads("[" * 150 + "]" * 150),
    ],
)
def test_what_is_no_list_of_commits_is_a_message(client: pytest.MonkeyPatch, answer: Any) -> None:
    with (
        serving(lambda request: request.reply(answer)) as hub,
        pytest.raises(StoreError, match="does not answer as a Hub does; check HF_ENDPOINT"),
    ):
        Branch("lab/run", "main", hub.url).commits()


@pytest.mark.parametrize("answer", [[], {}, None, 5, {"branches": 5}, {"branches": [5]}, {"branches": [{"name": 1}]}])
def test_what_the_client_cannot_read_is_a_message(client: pytest.MonkeyPatch, answer: Any) -> None:
    with serving(lambda request: request.reply(answer)) as hub, pytest.raises(StoreError, match="could not be fetched"):
        Branch("lab/run", "main", hub.url).names()


@pytest.mark.parametrize("link", ["\x1b[31m", "http://[", "http://a b/", "//", "?p=\x7f", "http://127.0.0.1:99999/"])
def test_an_address_that_is_none_is_a_message(client: pytest.MonkeyPatch, link: str) -> None:
    client.setattr(network, "_PAGES", 9)  # some lead to the same page again, and so on
    with (
        serving(lambda request: request.reply([commit(1)], Link=f'<{link}>; rel="next"')) as hub,
        pytest.raises(StoreError),
    ):
        Branch("lab/run", "main", hub.url).commits()


def test_deeply_nested_json_is_a_message(client: pytest.MonkeyPatch) -> None:
    deep = b"[" * 100_000 + b"]" * 100_000
    with serving(lambda request: request.reply(deep)) as hub, pytest.raises(StoreError, match="recursion limit"):
        Branch("lab/run", "main", hub.url).commits()


@pytest.mark.parametrize("number", ["9" * 5000, "٣", "²", "-1", "1_0", "01", " 7", "1e3", ""])
def test_a_title_with_an_odd_number_is_no_step_and_hides_no_other(client: pytest.MonkeyPatch, number: str) -> None:
    titles = [f"Saving HF Model -- Step {number}", "Saving HF Model -- Step 7", f"Saving {'x' * 9000} -- Step 8"]
    listed = [commit(i, title, f"Step {number} is whole with this commit; its manifest has the digest {'0' * 64}.")
              for i, title in enumerate(titles)]  # fmt: skip
    with serving(lambda request: request.reply(listed)) as hub:
        assert open_branch(Branch("lab/run", "main", hub.url)).steps == [7]


def test_the_message_of_a_commit_names_whole_numbers_only() -> None:
    body = "Step {} is whole with this commit; its manifest has the digest " + "a" * 64
    commits = [Commit("1", "t", body.format(number)) for number in ("9" * 5000, "12", "x5")]
    assert list(whole_steps(commits)) == [12]


def test_a_link_in_the_cache_may_not_lead_out_of_it(client: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    snapshot = tmp_path / "hub_cache/models--lab--run/snapshots" / ("1" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "manifest.json").symlink_to(tmp_path / "secret")
    with pytest.raises(PicoError, match="leads out of the cache of the Hub"):
        Branch("lab/run", "main").find("manifest.json", "1" * 40)
