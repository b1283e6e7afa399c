"""A run that a released version pushed is read from the Hub, comes back as it was, and is continued there.

released/pushed/VERSION.tar.xz is the repository lab/old of the loopback Hub, made once by that version's own `pico push` from
the run in released/VERSION.tar.xz.
"""

import tarfile
from pathlib import Path

import pytest
from tests.commands import Pico, command
from tests.hub_writing import WritableHub

from picolm.analyze import load
from picolm.store import Run

RELEASED = Path(__file__).parents[1] / "released"
PUSHED = sorted((RELEASED / "pushed").glob("*.tar.xz"))


@pytest.fixture(params=PUSHED, ids=lambda path: path.name.removesuffix(".tar.xz"))
def pico(
    request: pytest.FixtureRequest,
    hub: WritableHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Pico:
    """A function that runs a command in the folder of a released version, whose run is also on the Hub."""
    for file, place in ((RELEASED / request.param.name, tmp_path), (request.param, hub.storage)):
        with tarfile.open(file) as archive:
            archive.extractall(place, filter="data")
    hub.create("lab/old")
    monkeypatch.chdir(tmp_path)
    return command(monkeypatch, capsys)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_it_is_listed_analyzed_and_generated_from_where_it_is(pico: Pico) -> None:
    firsts = [line.split()[0] for line in pico("list", "hub:lab/old@old").splitlines() if line.strip()]
    assert [word for word in firsts if word.isdigit()] == ["0", "4", "8"]
    pico("analyze", "analysis.yaml", "--run", "hub:lab/old@old", "analysis_name=there")
    pico("analyze", "analysis.yaml", "--run", "runs/old", "analysis_name=here")
    there, here = (load(Path("analysis_results", name)) for name in ("there", "here"))
    assert len(there) == len(here) > 100
    assert there.value.equals(here.value)
    text = ("--prompt", "the", "--temperature", "0", "--max-new-tokens", "8")
    assert pico("generate", "hub:lab/old@old", *text) == pico("generate", "runs/old", *text)


@pytest.mark.slow
def test_what_comes_back_is_the_run_and_goes_on_there(pico: Pico, hub: WritableHub) -> None:
    pico("pull", "lab/old@old", "--out", "back/old")
    before, after = contents(Path("runs/old")), contents(Path("back/old"))
    assert {name: data for name, data in after.items() if name in before} == before
    pico("verify", "back/old")
    pico("train", "config.yaml", "training.max_steps=12", "checkpointing.runs_dir=back")
    known = len(hub.repository("lab/old").commits("old") or ())
    assert "sent 1 step" in pico("push", "back/old", "--repo-id", "lab/old")
    titles = [commit.title for commit in hub.repository("lab/old").commits("old") or ()]
    assert [title for title in titles[: len(titles) - known] if "HF Model" in title] == ["Saving HF Model -- Step 12"]
    pico("pull", "lab/old@old", "--out", "again/old")
    assert Run.open("again/old")[12].manifest.digest == Run.open("back/old")[12].manifest.digest
