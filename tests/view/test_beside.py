"""A training with its page beside it, and the page in a notebook."""

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.view.page_driver import started
from tests.view.test_page import OF_KIND, ROOT, SMALL, TEXT, made
from tests.view.test_server import digest_of

import picolm
from picolm.errors import PicoError
from picolm.store import Run

__all__ = ["made"]
WITHIN_S = 2.0


def command(steps: int, *words: str) -> list[str]:
    config, own = OF_KIND["decoder"]
    plain = [word for word in SMALL if not word.startswith(("training.max_steps", "checkpointing.save_schedule"))]
    further = [f"training.max_steps={steps}", "checkpointing.save_every_n_steps=20", "checkpointing.run_name=live"]
    return [sys.executable, "-m", "picolm", "train", str(ROOT / "configs" / config), *plain, *own, *further, *words]


class Listener:
    """The events that a page receives, with the time of each, until the server ends."""

    def __init__(self, address: str):
        self.events: list[tuple[float, dict[str, Any]]] = []
        self.thread = threading.Thread(target=self._listen, args=[address])
        self.thread.start()

    def _listen(self, address: str) -> None:
        try:
            with httpx.stream("GET", f"{address}api/events", timeout=60) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: "):
                        self.events.append((time.time(), json.loads(line[6:])))
        except httpx.HTTPError:
            pass  # the server ended

    def until(self, kind: str, seconds: float = 60) -> dict[str, Any]:
        """Wait for the first event of a kind."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for _, event in self.events:
                if event["type"] == kind:
                    return event
            time.sleep(0.05)
        raise AssertionError(f"no event {kind}: {self.events[-3:]}")


@pytest.mark.slow
def test_a_training_with_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PICO_CACHE", str(tmp_path / "cache"))
    with started(command(100_000, "--view"), cwd=tmp_path) as (training, address):
        place = address()
        listener = Listener(place)
        assert listener.until("metrics")["lines"][0]["step"] >= 0
        new = listener.until("steps")["steps"][-1]["step"]
        answer = httpx.post(f"{place}api/text", json={"run": 0, "step": new, "text": TEXT}, timeout=60)
        assert answer.status_code == 200
        run = httpx.get(f"{place}api/session", timeout=60).json()["runs"][0]
        assert run["live"] is True
        training.send_signal(signal.SIGINT)
        assert training.wait(60) == 130
        listener.thread.join(20)
        assert not listener.thread.is_alive()  # the server ended with the training
        with pytest.raises(httpx.HTTPError):
            httpx.get(place, timeout=5)
    logged = Run.open(tmp_path / "runs" / "live").metrics()
    told = [line for _, event in listener.events if event["type"] == "metrics" for line in event["lines"]]
    assert all(line in logged for line in told)
    assert [line["step"] for line in told] == sorted(line["step"] for line in told)


@pytest.mark.slow
def test_the_page_ends_with_a_training_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PICO_CACHE", str(tmp_path / "cache"))
    with started(command(100_000, "--view"), cwd=tmp_path) as (training, address):
        place = address()
        assert httpx.get(place, timeout=60).status_code == 200
        training.kill()
        end = time.monotonic() + 30
        while time.monotonic() < end:
            try:
                httpx.get(place, timeout=5)
            except httpx.HTTPError:
                return
            time.sleep(0.2)
    raise AssertionError("the server outlives its training")


@pytest.mark.slow
def test_lines_are_told_soon_and_a_run_that_is_continued_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Appended by hand, so that the time of each line is known on a busy machine too."""
    from tests.view.page_driver import server

    monkeypatch.setenv("PICO_CACHE", str(tmp_path / "cache"))
    with started(command(40), cwd=tmp_path) as (training, _):
        assert training.wait(200) == 0
    run = Run.open(tmp_path / "runs" / "live")
    with server(run.path) as place:
        listener = Listener(place)
        time.sleep(2)
        for step in (42, 44):
            count, began = len(listener.events), time.time()
            run.append_metrics({"step": step, "train/loss": float("nan")})
            while len(listener.events) == count and time.time() < began + 20:
                time.sleep(0.01)
            at, event = listener.events[count]
            assert event == {"type": "metrics", "run": 0, "lines": [{"step": step, "train/loss": "NaN"}]}
            assert at - began < WITHIN_S
        loss = {each["name"]: each for each in httpx.get(f"{place}api/training?run=0").json()["series"]}["train/loss"]
        assert loss["steps"][-1] == 44
        assert loss["values"][-1] is None
        count = len(listener.events)
        run.truncate_metrics(20)  # as a run that is continued does
        run.append_metrics({"step": 22, "train/loss": 1.5})
        while len(listener.events) == count:
            time.sleep(0.01)
        assert listener.events[-1][1]["lines"][-1] == {"step": 22, "train/loss": 1.5}
        run.remove(40)
        assert listener.until("steps")["removed"] == [40]
        moved = run.path.rename(run.path.with_name("moved"))
        listener.until("gone")
        moved.rename(run.path)
        listener.until("back")


@pytest.mark.slow
def test_a_run_without_a_name_has_no_page(tmp_path: Path) -> None:
    with started(command(1, "checkpointing.run_name=null", "--view"), cwd=tmp_path) as (training, _):
        assert training.wait(60) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_notebook_shows_the_saved_page(
    made: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import html

    monkeypatch.setenv("PICO_CACHE", str(tmp_path / "cache"))
    place = made("decoder")
    before = digest_of(place)
    shown = picolm.view(place, text=TEXT, steps=[0, 8], panels=["text"])
    frame = shown._repr_html_()
    assert frame.startswith('<iframe sandbox="allow-scripts allow-downloads" srcdoc="')
    assert html.unescape(re.search('srcdoc="([^"]*)"', frame)[1]) == shown.html  # type: ignore[index]
    assert shown.save(tmp_path / "page.html").read_text() == shown.html
    table = json.loads(re.search(r'id="data">(.*?)</script>', shown.html, re.S)[1])  # type: ignore[index]
    assert f'text {{"run":0,"step":8,"text":{json.dumps(TEXT)}}}' in table["answers"]
    of_row = picolm.view(Run.open(place), panels=["text"], steps=[8]).html
    assert '{\\"row\\":{\\"index\\":0,\\"split\\":\\"val\\"' in of_row
    with pytest.raises(PicoError, match="no step 3"):
        picolm.view(place, text=TEXT, steps=[3])
    with pytest.raises(PicoError, match="no run here"):
        picolm.view(tmp_path, text=TEXT)
    with pytest.raises(PicoError, match="cannot be written"):
        shown.save(tmp_path / "nowhere" / "page.html")
    assert digest_of(place) == before
    assert os.environ["PICO_CACHE"] == str(tmp_path / "cache")
