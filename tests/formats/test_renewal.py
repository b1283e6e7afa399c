"""`pico renew`: checkpoints get the modelling code of this version, and say so."""

import shutil
from pathlib import Path

import pytest
from tests.fox import STEP, same

from picolm.cli import app
from picolm.errors import PicoError
from picolm.formats.renewal import renew_steps
from picolm.models import Decoder
from picolm.store import Run
from picolm.store.selection import chosen, origin, united
from picolm.train.sample import load_model

OLD = "# of an older version\n"


@pytest.fixture
def old(fox: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run whose one step was written by a version with other modelling files, one of which is no more."""
    shutil.copytree(fox.path, tmp_path / "old")
    run = Run.open(tmp_path / "old")
    run.renew(STEP, {"pico_decoder.py": OLD, "decoder.py": OLD, "gone.py": OLD})
    return run


def test_a_renewed_step_has_the_files_of_now_and_the_same_tensors_and_digests(old: Run, fox: Run) -> None:
    before = old[STEP].manifest.digest
    found = dict(renew_steps(old, None))
    files = Decoder.modelling_files()
    assert found == {STEP: sorted({*files, "gone.py"})}
    checkpoint = old[STEP]
    assert {name for name in checkpoint.files if name.endswith(".py")} == set(files)
    assert all(checkpoint.read(name).decode() == text for name, text in files.items())
    assert not old.problems(STEP)
    assert same(old, fox)
    load_model(old)
    assert checkpoint.about["renewed"][-1] == {"was": before, "files": found[STEP], "without": []}


def test_renewing_twice_changes_nothing(old: Run) -> None:
    dict(renew_steps(old, [STEP]))
    digest = old[STEP].manifest.digest
    assert dict(renew_steps(old, [STEP])) == {STEP: []}
    assert old[STEP].manifest.digest == digest


def test_parts_of_a_step_before_and_after_are_two_states(old: Run) -> None:
    """So the Hub is sent the renewed step, and code of two versions is never mixed."""
    before = old[STEP].manifest
    dict(renew_steps(old, None))
    assert origin(old[STEP].manifest) != origin(before)
    with pytest.raises(PicoError, match="two different states have this number"):
        united(before, old[STEP].manifest)
    weights, rest = chosen(old[STEP], ["weights"]), chosen(old[STEP], ["dynamics"])
    assert united(weights, rest).digest == old[STEP].manifest.digest


def test_what_was_thinned_before_is_still_known_to_be_gone(old: Run) -> None:
    old.thin(STEP, ["tokenizer"])
    dict(renew_steps(old, None))
    assert "tokenizer.json" in old[STEP].dropped
    assert not old.problems(STEP)
    assert origin(old[STEP].manifest) == old[STEP].manifest.digest


def test_a_damaged_step_and_one_without_code_are_refused_and_stay(old: Run) -> None:
    with pytest.raises(PicoError, match="has no step 99"):
        dict(renew_steps(old, [99]))
    config = old.step_path(STEP) / "config.json"
    content = config.read_bytes()
    config.unlink()
    config.write_bytes(content[:-1] + b" ")
    with pytest.raises(PicoError, match=r"step 7 is damaged, and stays as it is: .*config\.json"):
        dict(renew_steps(old, None))
    assert (old.step_path(STEP) / "decoder.py").read_text() == OLD
    config.write_bytes(content)
    old.thin(STEP, ["weights"])
    with pytest.raises(PicoError, match="no checkpoint holds modelling code"):
        dict(renew_steps(old, None))
    with pytest.raises(PicoError, match="has no modelling code to renew"):
        dict(renew_steps(old, [STEP]))


def test_a_failure_in_the_middle_leaves_the_step_as_it_was(old: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from picolm.store import run as writing

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    digest = old[STEP].manifest.digest
    monkeypatch.setattr(writing, "exchange", full)
    with pytest.raises(PicoError, match="no space left"):
        dict(renew_steps(old, None))
    assert old[STEP].manifest.digest == digest
    assert not old.problems(STEP)
    assert [path.name for path in old.checkpoints_path.glob(".*partial*")] == []


def test_the_command_says_what_it_did(old: Run, capsys: pytest.CaptureFixture[str]) -> None:
    def pico(*words: str) -> str:
        app(list(words), standalone_mode=False)
        return capsys.readouterr().out

    out = pico("renew", str(old.path))
    assert "1 of 1 checkpoints" in out
    assert f"pico push {old.path}" in out
    out = pico("renew", str(old.path), "--steps", "7")
    assert out == f"0 of 1 checkpoints of {old.path} have new modelling code; the others had it already.\n"


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PicoError, match="no run here"):
        app(["renew", str(tmp_path)], standalone_mode=False)
