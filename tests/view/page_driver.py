"""A microscope in a headless browser: a server in a process of its own, and what a reader does with the page."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from picolm.report.browser import view

ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+/[\w-]+/")
BUSY_S = 120


@contextmanager
def server(*runs: Path, words: tuple[str, ...] = ()) -> Iterator[str]:
    """Start `pico view RUN… --no-browser`; yield its address, and end it."""
    command = [sys.executable, "-m", "picolm", "view", *map(str, runs), "--no-browser", *words]
    with started(command) as (process, address):
        yield address()
        assert process.poll() is None, f"the server ended by itself, with code {process.returncode}"


@contextmanager
def started(command: list[str], **options: Any) -> Iterator[tuple[subprocess.Popen[str], Callable[[], str]]]:
    """Start a command that prints the address of a page; yield it and a function that waits for the address."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, **options
    )
    lines: list[str] = []
    assert process.stdout is not None
    reading = threading.Thread(target=lambda out: lines.extend(iter(out.readline, "")), args=[process.stdout])
    reading.start()

    def address() -> str:
        until = time.monotonic() + 200
        while time.monotonic() < until:
            if found := ADDRESS.search("".join(lines)):
                return found[0]
            assert process.poll() is None, "".join(lines)
            time.sleep(0.05)
        raise AssertionError("no address was printed: " + "".join(lines))

    try:
        yield process, address
    finally:
        process.terminate()
        process.wait(20)
        reading.join(20)
        process.stdout.close()


class Page:
    """The page in a browser, and what a reader does with it."""

    def __init__(self, chromium: Any, address: str):
        self.chromium, self.address = chromium, address

    def open(self, width: int = 1280, height: int = 900, theme: str = "light", **state: object) -> "Page":
        """Open the page at a state, as a link says it."""
        self.chromium.get("about:blank")
        self.chromium.get_log("browser")
        self.chromium.get_log("performance")
        view(self.chromium, width, height, theme)
        fragment = "&".join(f"{key}={quote(str(value))}" for key, value in state.items())
        self.chromium.get(f"{self.address}#{fragment}")
        return self.settle()

    def settle(self) -> "Page":
        """Wait until what is shown is the answer to what is asked."""
        return self.until("return document.body?.dataset.busy === 'false'")

    def until(self, condition: str, *words: Any, seconds: float = BUSY_S) -> "Page":
        until = time.monotonic() + seconds
        while not self.ask(condition, *words):
            assert time.monotonic() < until, f"{condition} did not come true; {self.trouble()}; {self.complaints()}"
            time.sleep(0.03)
        return self

    def ask(self, script: str, *words: Any) -> Any:
        return self.chromium.execute_script(script, *words)

    def one(self, selector: str) -> Any:
        return self.chromium.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        return list(self.chromium.find_elements("css selector", selector))

    def trouble(self) -> str:
        return str(self.ask("return document.getElementById('trouble')?.textContent ?? ''"))

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.chromium.get_log("browser")]

    def requests(self) -> list[str]:
        """Return the addresses that were asked since the page was opened, other than those within the page."""
        messages = [json.loads(entry["message"])["message"] for entry in self.chromium.get_log("performance")]
        sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith(("data:", "blob:", "about:"))]

    def keys(self, *keys: str) -> "Page":
        """Press keys, one after the other, wherever the focus is."""
        from selenium.webdriver.common.action_chains import ActionChains

        chain = ActionChains(self.chromium)
        for key in keys:
            chain.send_keys(key)
        chain.perform()
        return self.settle()

    def type(self, text: str) -> "Page":
        """Replace the text and wait for the answer."""
        self.ask("const t = document.getElementById('text'); t.focus(); t.select();")
        self.one("#text").send_keys(text)
        self.until("return new URLSearchParams(location.hash.slice(1)).get('text') === arguments[0]", text)
        return self.settle()

    def press(self, text: str, inside: str = "body") -> "Page":
        """Press the button with a text."""
        button = next(b for b in self.all(f"{inside} button") if b.text == text)
        self.ask("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", button)
        button.click()
        return self.settle()

    def panel(self, key: str) -> "Page":
        self.ask("document.getElementById(arguments[0]).click()", f"tab-{key}")
        return self.settle()

    def to(self, end: str) -> "Page":
        """Move the slider with a key: Home, End, ArrowRight, …"""
        from selenium.webdriver.common.keys import Keys

        self.ask("document.getElementById('track').focus()")
        return self.keys(getattr(Keys, {"ArrowRight": "ARROW_RIGHT", "ArrowLeft": "ARROW_LEFT"}.get(end, end.upper())))

    def step(self) -> int:
        return int(self.ask("return document.getElementById('track').getAttribute('aria-valuenow')"))

    def values(self, selector: str) -> list[float | None]:
        """Return the numbers that elements carry, None where one has none."""
        found = self.ask(
            "return [...document.querySelectorAll(arguments[0])].map((node) => node.dataset.value ?? '')", selector
        )
        return [float(value) if value != "" else None for value in found]

    def data(self, selector: str) -> list[dict[str, str]]:
        return list(
            self.ask(
                "return [...document.querySelectorAll(arguments[0])].map((node) => ({...node.dataset, text: node.textContent}))",
                selector,
            )
        )

    def history(self, key: str) -> "Page":
        """Wait until the curves of a panel have all their steps."""
        return self.until("return document.getElementById(arguments[0]).dataset.history > 0", f"panel-{key}")
