"""The page beside a training: it follows the log and the steps, through the end of the training and its continuation."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.view.page_driver import Page, server
from tests.view.test_page import OF_KIND, ROOT, SMALL, TEXT, chromium

pytestmark = pytest.mark.slow
__all__ = ["chromium"]
WITHIN_S = 2.0
PLENTY = [word for word in SMALL if not word.startswith(("training.max_steps", "checkpointing.save_schedule"))]


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """A training of many steps, each fifth saved."""
    config, own = OF_KIND["decoder"]
    words = [
        *PLENTY,
        *own,
        "training.max_steps=100000",
        "checkpointing.save_every_n_steps=20",
        "checkpointing.run_name=live",
        "evaluation.every_n_steps=null",
    ]
    return [sys.executable, "-m", "picolm", "train", str(ROOT / "configs" / config), *words]


@pytest.fixture
def start(command: list[str], tmp_path: Path) -> Iterator[Any]:
    """A function that starts or continues the training."""
    started = list[subprocess.Popen[bytes]]()

    def begin() -> subprocess.Popen[bytes]:
        log = (tmp_path / "training.log").open("ab")
        started.append(subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log))
        log.close()
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


def steps_of(run: Path) -> list[int]:
    return sorted(int(place.name.removeprefix("step_")) for place in (run / "checkpoints").glob("step_*"))


def last_line(run: Path) -> int:
    """The step of the newest whole line with a loss."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return int(next(line for line in map(json.loads, reversed(lines)) if "train/loss" in line)["step"])


def until(condition: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def shown_step(page: Page) -> int:
    """The step of the line of the log that the page shows."""
    words = page.ask("return document.getElementById('live').textContent")
    return int(words.partition("step ")[2].partition(" ")[0].replace(",", "") or -1)


def newest_shown(page: Page) -> int:
    return int(page.ask("return document.getElementById('track').getAttribute('aria-valuemax')"))


def test_the_page_follows_a_training_that_is_killed_and_continued(start: Any, tmp_path: Path, chromium: Any) -> None:
    run, training = tmp_path / "runs/live", start()
    until(lambda: (run / "metrics.jsonl").exists() and len(steps_of(run)) > 1, 200)
    with server(run) as address:
        page = Page(chromium, address).open(text=TEXT)
        page.until("return document.getElementById('live').textContent.includes('loss')", seconds=30)
        page.ask("window.same = true")
        delays = list[float]()
        for _ in range(4):  # each line is on the page within two seconds
            seen = last_line(run)
            until(lambda seen=seen: last_line(run) > seen)
            wanted, begun = last_line(run), time.monotonic()
            until(lambda wanted=wanted: shown_step(page) >= wanted, 30)
            delays.append(time.monotonic() - begun)
        assert max(delays) < WITHIN_S, delays
        before = newest_shown(page)
        until(lambda: newest_shown(page) > before)
        assert newest_shown(page) in steps_of(run)

        training.send_signal(signal.SIGKILL)
        training.wait()
        page.until("return document.getElementById('live').dataset.kind === 'ended'", seconds=60)
        ended = newest_shown(page)
        start()
        until(lambda: newest_shown(page) > ended)
        page.until("return document.getElementById('live').dataset.kind === 'live'", seconds=30)
        until(lambda: page.settle().step() > ended)  # it stood at the end, and went along
        assert page.ask("return window.same") is True  # it was never loaded anew
        print("line of the log to page:", [f"{delay:.2f} s" for delay in delays])


def test_a_deleted_run_is_told_and_the_page_stays(start: Any, tmp_path: Path, chromium: Any) -> None:
    import shutil

    run, training = tmp_path / "runs/live", start()
    until(lambda: (run / "checkpoints").exists() and len(steps_of(run)) > 1, 200)
    training.kill()
    training.wait()
    with server(run) as address:
        page = Page(chromium, address).open(text=TEXT)
        shown = page.values(".text-panel .tokens span")
        shutil.rmtree(run)
        page.until("return document.getElementById('live').textContent.includes('deleted')", seconds=30)
        assert page.values(".text-panel .tokens span") == shown
        page.to("Home")
        assert page.trouble() != "" or page.step() == 0
