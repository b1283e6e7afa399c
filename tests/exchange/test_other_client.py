"""An independent client, `@huggingface/hub` of npm, reads what we sent, and we read what it sends."""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.exchange.conftest import digests
from tests.hub_writing import WritableHub
from tests.planted import TOKEN

from picolm.exchange.push import Sender, push
from picolm.store import Run
from picolm.store.hub import open_branch
from picolm.store.repository import Branch

PACKAGE = "@huggingface/hub@2.17.5"
REPO = {"type": "model", "name": "lab/run"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def installed() -> Path:
    """A folder, kept between runs, in which the package is installed."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed: the cross-check with the JavaScript client of the Hub is left out")
    folder = Path(tempfile.gettempdir()) / f"picolm-{PACKAGE.replace('/', '-')}"
    if not (folder / "node_modules/@huggingface/hub").exists():
        folder.mkdir(exist_ok=True)
        (folder / "package.json").write_text("{}")
        done = subprocess.run(["npm", "install", PACKAGE], cwd=folder, capture_output=True, text=True, timeout=180)
        if done.returncode:
            pytest.skip(f"npm cannot install {PACKAGE} (no registry?): the cross-check is left out")
    shutil.copy(Path(__file__).with_name("client.mjs"), folder)
    return folder


@pytest.fixture
def other(installed: Path, hub: WritableHub) -> Callable[..., list[Any]]:
    def ask(command: str, **request: Any) -> list[Any]:
        words = ["node", "client.mjs", hub.url, TOKEN, command, json.dumps({"repo": REPO, **request})]
        done = subprocess.run(words, cwd=installed, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        found: list[Any] = json.loads(done.stdout)
        return found

    return ask


def test_it_reads_what_we_sent(other: Callable[..., list[Any]], hub: WritableHub, make_run: Callable[..., Run]) -> None:
    run = make_run()
    push(Sender(run, "lab/run", private=True))
    commits = other("commits", revision="toy")
    ours = Branch("lab/run", "toy").commits()
    assert [(entry["sha"], entry["title"]) for entry in commits] == [(commit.sha, commit.title) for commit in ours]
    for step in run:
        whole = next(entry for entry in commits if f"Step {step} is whole with this commit" in entry["body"])
        assert whole["title"] == f"Saving HF Model -- Step {step}"
        files = {entry["path"]: entry for entry in other("files", revision=whole["sha"])}
        for name, record in run[step].files.items():  # type: ignore[union-attr]
            assert (files[name]["sha256"], files[name]["size"]) == (record.sha256, record.bytes)
            assert files[name]["lfs"] in ("", record.sha256)
        assert files["model.safetensors"]["lfs"]


def test_we_read_what_it_sends(
    other: Callable[..., list[Any]], hub: WritableHub, make_run: Callable[..., Run], tmp_path: Path
) -> None:
    run = make_run(steps=(0, 2))
    hub.create("lab/run")
    config = {"training_config.yaml": str(run.path / "training_config.yaml")}
    other("send", branch="by-hand", start=True, title="Saving Training Config -- Step 0", files=config)
    for step in run:
        files = {
            path.relative_to(run.step_path(step)).as_posix(): str(path) for path in run.step_path(step).rglob("*.*")
        }
        other("send", branch="by-hand", title=f"Saving HF Model -- Step {step}", files=files)
    there = open_branch(Branch("lab/run", "by-hand"))
    assert there.steps == [0, 2]
    assert digests(there) == digests(run)
    assert there.config == run.config
    assert [there.problems(step) for step in there] == [[], []]
