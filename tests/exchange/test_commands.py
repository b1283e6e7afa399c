"""`pico push`, `pull` and `data push` as they are typed: what they say, and that no token is in anything."""

import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.exchange.conftest import digests
from tests.hub_writing import WritableHub
from tests.planted import TOKEN, holders
from typer.testing import CliRunner

import picolm.cli
from picolm.cli.app import app
from picolm.errors import PicoError
from picolm.network import redacted
from picolm.store import Run


@pytest.fixture
def pico(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """A function that runs a command in `tmp_path`; returns its exit code and all that it said."""
    assert picolm.cli.main
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, words)
        if isinstance(done.exception, PicoError):  # as `main` shows it
            return done.exception.exit_code, f"{done.output}\n{done.exception}"
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done.exit_code, done.output

    return run


@pytest.mark.slow
def test_there_and_back(hub: WritableHub, make_run: Callable[..., Run], pico: Callable[..., tuple[int, str]]) -> None:
    run = make_run()
    code, said = pico("push", "runs/toy", "--repo-id", "lab/run")
    assert code == 0
    assert "lab/run@toy: sent 3 steps. To have it elsewhere:  pico pull lab/run@toy" in said
    code, said = pico("pull", "lab/run@toy", "--out", "elsewhere", "--steps", "1:4")
    assert code == 0
    assert "elsewhere: 2 steps, every digest as sent. For example:  pico list elsewhere" in said
    assert Run.open("elsewhere").steps == [2, 4]
    assert pico("pull", "hub:lab/run@toy", "--out", "elsewhere")[0] == 0
    assert digests(Run.open("elsewhere")) == digests(run)
    code, said = pico("push", "elsewhere", "--repo-id", "lab/run", "--branch", "toy")
    assert "nothing was missing" in said


@pytest.mark.slow
def test_where_to_is_remembered(
    hub: WritableHub, make_run: Callable[..., Run], pico: Callable[..., tuple[int, str]]
) -> None:
    make_run(steps=(0, 2))
    assert pico("push", "runs/toy")[1].endswith("where to? give --repo-id OWNER/NAME")
    assert pico("push", "runs/toy", "--repo-id", "nowhere")[1].endswith("give --repo-id OWNER/NAME, not 'nowhere'")
    assert pico("push", "runs/toy", "--repo-id", "lab/run", "--branch", "first", "--steps", "0")[0] == 0
    assert "lab/run@first: sent 1 step." in pico("push", "runs/toy")[1]


@pytest.mark.slow
def test_mistakes_are_explained(
    hub: WritableHub, make_run: Callable[..., Run], pico: Callable[..., tuple[int, str]]
) -> None:
    make_run(steps=(0, 2))
    assert (
        "has no step 7 to send (there are: 0, 2)" in pico("push", "runs/toy", "--repo-id", "lab/run", "--steps", "7")[1]
    )
    assert "--only gradients: no part" in pico("push", "runs/toy", "--repo-id", "lab/run", "--only", "gradients")[1]
    pico("push", "runs/toy", "--repo-id", "lab/run")
    assert "lab/run has no branch 'toys' on the Hub (there are: main, toy)" in pico("pull", "lab/run@toys")[1]
    assert "--steps 5:9: there is none of them (there are: 0, 2)" in pico("pull", "lab/run@toy", "--steps", "5:9")[1]
    assert "'hub:run' is not of the form hub:OWNER/REPOSITORY@BRANCH" in pico("pull", "run")[1]
    assert "each run is a branch (branches: main, toy)" in pico("pull", "lab/run")[1]


@pytest.mark.slow
def test_a_token_is_in_nothing_that_is_written_or_said(
    hub: WritableHub, make_run: Callable[..., Run], pico: Callable[..., tuple[int, str]], tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.DEBUG)
    make_run()
    said = [pico("push", "runs/toy", "--repo-id", "lab/run", "--steps", "0")[1]]
    for fault in (401, 403, 404, 503, "cut", "lost"):
        for part in ("/preupload/", "/commit/", "objects/batch", "/large/"):
            hub.faults[part] += [fault] * 5
            said.append(pico("push", "runs/toy", "--repo-id", "lab/run")[1])
            hub.faults.clear()
    said.append(pico("push", "runs/toy", "--repo-id", "lab/run")[1])
    said.append(pico("pull", "lab/run@toy", "--out", "elsewhere")[1])
    assert digests(Run.open("elsewhere")) == digests(Run.open("runs/toy"))
    assert hub.tokens == {f"Bearer {TOKEN}", ""}
    assert "X-Signature" not in "\n".join(said)  # nor what an address of the store grants
    assert TOKEN not in "\n".join(said) + caplog.text
    assert holders(tmp_path) == []
    assert [raw[:80] for raw in hub.raw if TOKEN.encode() in raw] == []


def test_secrets_in_messages_of_others_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    said = redacted(f"PUT https://me:secret@store/x/y?X-Amz-Signature=abc&Expires=9 failed for {TOKEN} (why? because)")
    assert said == "PUT https://store/x/y?… failed for … (why? because)"


@pytest.mark.slow
def test_code_that_a_run_on_the_hub_names_is_imported_only_with_the_flag(
    hub: WritableHub, make_run: Callable[..., Run], pico: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    run = make_run()
    run.write_config(run.config | {"model": run.config["model"] | {"model_type": "hub:Part"}})
    (tmp_path / "hub.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path)!r}, 'sprung').touch()\nPart = dict\n"
    )
    assert pico("push", "runs/toy", "--repo-id", "lab/run")[0] == 0
    shutil.rmtree("runs")
    there = "hub:lab/run@toy"
    for words in (["list", there], ["verify", there], ["pull", there], ["list", "runs/toy"]):
        assert pico(*words)[0] == 0, words
        assert not Path("sprung").exists(), words
    for place in (there, "runs/toy"):
        words = ["export", place, "--out", "exported"]
        code, said = pico(*words)
        assert (code, "names code of its own, model.model_type: hub:Part" in said) == (1, True), said
        assert not Path("sprung").exists()
    pico("export", there, "--out", "exported", "--trust-remote-code")
    assert Path("sprung").exists()
    sys.modules.pop("hub")
