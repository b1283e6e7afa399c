"""How fast the microscope starts and answers, how much memory it takes, and what it costs a training beside it.

    python benchmarks/view.py [--run runs/demo] [--steps 1000] [--config demo] [--training 300] [--rounds 3]

`start` is from the command to the first answer about a text. `never seen` is a step whose answer is not kept yet, `seen` one
whose answer is, over HTTP, both for 64 tokens. The run of `--steps` steps is the first one with its last step linked so many
times; `memory` is that of the server after all of them were visited, once and twice. The training is `pico train CONFIG` with
and without `--view` and a browser that shows its page, in turns. Its speed is the median of the tokens per second that it logs;
those differ by several hundredths from one training to the next, so what the page costs it is told by CPU time too.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from urllib.request import Request, urlopen

from picolm.report.browser import WORDS, find
from picolm.store import Run
from picolm.store.manifest import MANIFEST, Manifest

TOKENS = 64
START_S = 8  # after which the server and the page are there
PICO = [sys.executable, "-m", "picolm"]


@contextmanager
def served(run: Path, cache: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Yield the process of a server of a run, and its address. cache: the folder of its answers."""
    environment = os.environ | {"PICO_CACHE": str(cache), "PYTHONUNBUFFERED": "1"}
    command = [*PICO, "view", str(run), "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().split()[-1]
        finally:
            process.terminate()


def post(address: str, endpoint: str, body: dict[str, object]) -> bytes:
    """Return the answer to a question."""
    request = Request(f"{address}api/{endpoint}", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=600) as answer:
        found: bytes = answer.read()
    return found


def text_of(run: Run) -> str:
    """Return a text of TOKENS tokens of the run's own tokenizer."""
    from picolm.observe.rows import tokenizer_of

    tokenizer = tokenizer_of(run)[1]
    ids = tokenizer.encode("The people of the United States and the government of the Union. " * TOKENS).ids
    return str(tokenizer.decode(ids[:TOKENS]))


def timed(address: str, body: dict[str, object]) -> float:
    """Return the milliseconds of a question about a text."""
    began = time.perf_counter()
    post(address, "text", body)
    return 1000 * (time.perf_counter() - began)


def answering(run: Run, folder: Path) -> None:
    """Print the time to the first answer, and those of steps that were never seen and that were."""
    text, steps = text_of(run), run.steps
    began = time.perf_counter()
    with served(run.path, folder / "cache") as (_, address):
        post(address, "text", {"run": 0, "step": steps[-1], "text": text})
        start = time.perf_counter() - began
        times = {
            words: [timed(address, {"run": 0, "step": step, "text": f"{text} again"}) for step in steps]
            for words in ("never seen", "seen")
        }
    print("| start, s | a step never seen, ms: median, worst | a step seen, ms: median, worst |\n|---|---|---|")
    cells = [f"{statistics.median(each):.0f}, {max(each):.0f}" for each in times.values()]
    print(f"| {start:.2f} | {' | '.join(cells)} |\n")


def with_steps(run: Run, target: Path, count: int) -> Path:
    """Make a run of `count` steps: the first one with its last step linked so many times. Returns its folder."""
    shutil.copytree(run.path, target, symlinks=True)
    last = run.steps[-1]
    source = target / "checkpoints" / f"step_{last}"
    manifest = Manifest.from_bytes((source / MANIFEST).read_bytes(), str(source))
    for step in range(last + 1, last + 1 + count):
        folder = source.with_name(f"step_{step}")
        shutil.copytree(source, folder, copy_function=os.link)
        (folder / MANIFEST).unlink()
        (folder / MANIFEST).write_bytes(replace(manifest, step=step).to_bytes())
    return target


def visiting(run: Run, folder: Path, count: int) -> None:
    """Print what many steps cost."""
    place, text = with_steps(run, folder / "many", count), text_of(run)
    with served(place, folder / "cache") as (process, address):
        began = time.perf_counter()
        with urlopen(f"{address}api/session", timeout=600) as answer:
            there = len(json.load(answer)["runs"][0]["steps"])
        listed, sizes = time.perf_counter() - began, list[float]()
        began = time.perf_counter()
        for turn in range(2):
            post(address, "history", {"run": 0, "text": f"{text} {turn}"})
            sizes.append(resident(process.pid) / 2**20)
        each = (time.perf_counter() - began) / (2 * there)
    print("| steps | listed, s | each step of a history, ms | memory after one visit, two, MiB |\n|---|---|---|---|")
    print(f"| {there} | {listed:.2f} | {1000 * each:.1f} | {sizes[0]:.0f}, {sizes[1]:.0f} |\n")


def resident(process: int) -> int:
    """Return the bytes of memory that a process has (Linux)."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Cost(NamedTuple):
    """What a training with a page beside it showed: the median of the logged tokens per second; the seconds of CPU of the server
    until it answered, and the parts of a core that it and a browser took from then on (0 without them).
    """

    tokens_per_s: float
    start_s: float
    server: float
    browser: float


def trained(config: list[str], folder: Path, steps: int, view: bool) -> Cost:
    """Train a run; if `view`, with its page open in a browser, at the newest step, in the panel with all curves."""
    name = f"run{time.monotonic_ns()}"
    command = [*PICO, "train", *config, f"training.max_steps={steps}", f"checkpointing.run_name={name}"]
    words = [f"checkpointing.runs_dir={folder}", "monitoring.logging.log_every_n_steps=10"]
    start_s = server = browser = 0.0
    with subprocess.Popen(
        [*command, *words, *(["--view"] if view else [])], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "http://" in line:
                start_s, server, browser = costs(process.pid, line.split()[-1])
    if process.returncode:
        raise SystemExit(f"the training failed: {' '.join(command)}")
    speeds = [entry["tokens_per_s"] for entry in Run.open(folder / name).read_metrics(("tokens_per_s",))]
    return Cost(statistics.median(speeds[len(speeds) // 4 :]), start_s, server, browser)  # without the start of both


def costs(training: int, address: str) -> tuple[float, float, float]:
    """Open the page of a training, and measure until its server ends. Returns the last three numbers of a Cost (Linux)."""
    words = ["pgrep", "-P", str(training), "-f", "picolm view"]
    server = int(subprocess.run(words, capture_output=True, check=True).stdout.split()[0])
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = [*WORDS, "--remote-debugging-port=0", f"--user-data-dir={profile}", f"{address}#panel=training"]
        browser = subprocess.Popen([find(), *options], stderr=subprocess.DEVNULL, start_new_session=True)
        time.sleep(START_S)
        began, before, shares = time.perf_counter(), (0.0, 0.0), (0.0, 0.0)
        with suppress(OSError):  # the server ended, with its training
            before = cpu_seconds(server), cpu_of_session(browser.pid)
            while True:
                now = cpu_seconds(server), cpu_of_session(browser.pid)
                passed = max(time.perf_counter() - began, 1e-9)
                shares = (now[0] - before[0]) / passed, (now[1] - before[1]) / passed
                time.sleep(0.5)
        os.killpg(browser.pid, signal.SIGKILL)
        browser.wait()
    return before[0], *shares


def cpu_of_session(leader: int) -> float:
    """Return the seconds of CPU of all processes of a session."""
    found = subprocess.run(["pgrep", "-s", str(leader)], capture_output=True).stdout.split()
    return sum(cpu_seconds(int(process)) for process in found)


def cpu_seconds(process: int) -> float:
    """Return the seconds of CPU that a process has taken (Linux). Raises OSError where it is gone."""
    user, system = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def beside(config: list[str], folder: Path, steps: int, rounds: int) -> None:
    """Print what the server and the browser take, and the speed of a training with and without the page, in turns."""
    found: dict[bool, list[Cost]] = {False: [], True: []}
    for number in range(rounds):
        for view in (False, True) if number % 2 else (True, False):
            found[view].append(trained(config, folder, steps, view))
    ratios = [
        with_it.tokens_per_s / without.tokens_per_s for without, with_it in zip(found[False], found[True], strict=True)
    ]
    _, start_s, server, browser = (statistics.median(column) for column in zip(*found[True], strict=True))
    print(
        "| start, CPU s | server, part of a core | browser | tokens/s with / without: median, rounds |\n|---|---|---|---|"
    )
    shown = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    print(f"| {start_s:.2f} | {server:.2%} | {browser:.2%} | {statistics.median(ratios):.3f} ({shown}) |")


def main() -> None:
    """Measure, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="a run with a tokenizer (default: one is trained from the configuration)")
    parser.add_argument("--config", default="demo")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--training", type=int, default=300, help="steps of each training")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("words", nargs="*", help="key=value for the trainings")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, config = Path(name), [given.config, *given.words]
        if given.run is None:
            trained(config, folder / "made", given.training, view=False)
        run = Run.open(given.run or next((folder / "made").iterdir()))
        answering(run, folder)
        visiting(run, folder, given.steps)
        beside(config, folder / "runs", given.training, given.rounds)


if __name__ == "__main__":
    main()
