"""The camp that is attacked, built once, and copies of it for each case."""

import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from tests.planted import TOKEN
from tests.siege import camp
from tests.siege.forging_hub import ForgingHub
from tests.siege.sandbox import Result, Sandbox

Case = TypeVar("Case")
CASES = int(os.environ.get("PICO_SIEGE", "0"))
"""Mutated copies of each kind of file; 0 takes the few that every run can afford."""
EACH = bool(os.environ.get("PICO_SIEGE_EACH"))
"""Whether a case goes through all commands that read its file. By default through one: the commands take turns."""
FEW = 5
LOG = os.environ.get("PICO_SIEGE_LOG")
"""A file that gets the first failures of each kind at once: the whole siege takes hours."""


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForgingHub]:
    """A Hub that takes what is pushed, and has the run `lab/toy@toy` and the rows `lab/rows`."""
    with ForgingHub(tmp_path_factory.mktemp("hub"), TOKEN).serving() as server:
        assert isinstance(server, ForgingHub)
        yield server


@pytest.fixture(scope="session")
def sandbox(hub: ForgingHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """Where commands run: against the loopback Hub, with caches of its own."""
    home = tmp_path_factory.mktemp("home")
    process = Sandbox(
        {
            "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(home), "HOME": str(home), "WANDB_MODE": "offline",
        }
    )  # fmt: skip
    yield process
    process.close()


@pytest.fixture(scope="session")
def healthy(sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The camp as its owner left it; never changed, only copied."""
    folder = tmp_path_factory.mktemp("healthy") / "camp"
    folder.mkdir()
    camp.build(folder, sandbox)
    return folder


@pytest.fixture
def copy(healthy: Path, tmp_path: Path) -> Callable[[], Path]:
    """A function that makes a fresh copy of the camp; only the newest is kept."""
    numbers = itertools.count()
    last: list[Path] = []

    def make() -> Path:
        for old in last:
            shutil.rmtree(old)
        last[:] = [tmp_path / f"camp{next(numbers)}"]
        shutil.copytree(healthy, last[0], symlinks=True)
        return last[0]

    return make


class Attack:
    """Cases of one test: runs them, and collects what fails instead of stopping at the first."""

    def __init__(self, sandbox: Sandbox, healthy: Path, copy: Callable[[], Path], readers: dict[str, dict[str, Any]]):
        self.sandbox, self.healthy, self.copy, self.readers = sandbox, healthy, copy, readers
        self.cases = 0
        self._failures: dict[tuple[str, ...], list[str]] = {}

    def newest(self, kind: str) -> str:
        """The last file of a kind."""
        return [name for name in camp.files(self.healthy) if camp.kind(name) == kind][-1]

    def fresh(self, *without: str) -> Path:
        """A copy of the camp without some of its folders."""
        folder = self.copy()
        for name in without:
            shutil.rmtree(folder / name)
        return folder

    def some(self, cases: Iterable[Case], most: int) -> list[tuple[int, Case]]:
        """All cases with their numbers in the full siege, else at most so many of them, evenly spread."""
        every = list(enumerate(cases))
        return every if CASES or len(every) <= most else [every[i * len(every) // most] for i in range(most)]

    def commands(self, kind: str, number: int) -> list[str]:
        """The commands that read a kind of file and get the case of this number."""
        return self.turn(list(self.readers[kind]), number)

    def turn(self, commands: list[str], number: int) -> list[str]:
        """Those of the commands that get the case of this number."""
        return commands if EACH else [commands[number % len(commands)]]

    def run(self, command: str, folder: Path, case: Any) -> Result:
        """Run a command of the camp; a fault of any kind is noted. case: what was done to it, for the message."""
        self.cases += 1
        result = camp.run(self.sandbox, command, folder)
        self.note(result.fault, result.place, command, case)
        return result

    def note(self, failure: Any, place: str, command: str, case: Any) -> None:
        """Keep a failure, unless None. place: what failures are grouped by."""
        if failure is None:
            return
        text = f"{camp.COMMANDS[command]} {case}: {failure}"[:600]
        cases = self._failures.setdefault((place, str(failure)[:60]), [])
        cases.append(text)
        if LOG and len(cases) <= 3:
            with open(LOG, "a") as file:
                file.write(f"{place}: {text}\n")

    def judge(self) -> None:
        """Fail with one example of each failure."""
        found = [f"{len(cases)} x {place}: {cases[0]}" for (place, _), cases in sorted(self._failures.items())]
        assert self.cases
        assert not found, f"{len(found)} kinds of failure in {self.cases} cases:\n" + "\n".join(found)


@pytest.fixture
def attack(sandbox: Sandbox, healthy: Path, copy: Callable[[], Path], readers: Any) -> Attack:
    """Where the cases of a test are run."""
    return Attack(sandbox, healthy, copy, readers)


@pytest.fixture(scope="session")
def readers(sandbox: Sandbox, healthy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Result]]:
    """By kind of file the commands that open it, each with what it did in a healthy camp."""
    folder = tmp_path_factory.mktemp("watched")
    numbers = itertools.count()

    def make() -> Path:
        return Path(shutil.copytree(healthy, folder / str(next(numbers)), symlinks=True))

    return camp.readers(sandbox, make)
