"""What of older steps goes, when, and what never does."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from picolm.store import Checkpoint, Run
from picolm.store import run as run_module
from picolm.store.writer import Retention, surplus

PARTS = ("weights", "optimizer", "dynamics")
Content = dict[str, Any]


def parts(checkpoint: Checkpoint) -> set[str]:
    found = set()
    for address in checkpoint:
        found.add("dynamics" if address.split else "weights" if address.kind == "weights" else "optimizer")
    return found


def resumable(checkpoint: Checkpoint) -> bool:
    return {"weights", "optimizer"} <= parts(checkpoint)


def write(run: Run, steps: range, content: Content, keep: dict[str, str]) -> None:
    retention = Retention(run, keep, resumable)
    for step in steps:
        run.commit(step, **content)
        retention.apply(step)


def left(run: Run) -> dict[int, set[str]]:
    assert all(run.problems(step) == [] for step in run.step_directories())
    assert not list(run.checkpoints_path.glob(".step_*"))
    return {step: parts(run[step]) for step in run}


@pytest.mark.slow
def test_each_part_has_its_rule(run: Run, content: Content) -> None:
    write(run, range(10), content, {"weights": "every 4", "optimizer": "last 3", "dynamics": "last 1"})
    assert left(run) == {
        0: {"weights"},
        4: {"weights"},
        7: {"optimizer"},
        8: {"weights", "optimizer"},
        9: {"weights", "optimizer", "dynamics"},
    }
    assert (run.checkpoints_path / "latest").resolve() == run.step_path(9)


def test_all_keeps_everything(run: Run, content: Content) -> None:
    write(run, range(3), content, dict.fromkeys(PARTS, "all"))
    assert left(run) == {step: set(PARTS) for step in range(3)}


def test_a_step_of_which_nothing_is_kept_is_gone(run: Run, content: Content) -> None:
    write(run, range(5), content, dict.fromkeys(PARTS, "last 2"))
    assert left(run) == {step: set(PARTS) for step in (3, 4)}


def test_with_the_weights_goes_what_belongs_to_them(run: Run, content: Content) -> None:
    write(run, range(2), content, {"weights": "last 1", "optimizer": "all", "dynamics": "all"})
    names = set(run[0].files)
    assert names & {"model.safetensors", "config.json", "modeling_x.py", "tokenizer.json"} == set()
    assert names >= {"optimizer.safetensors", "trainer_state.json", "learning_dynamics/train_data.parquet"}
    assert run[0].dropped >= {"model.safetensors", "tokenizer.json"}


@pytest.mark.slow
def test_the_newest_step_to_go_on_from_keeps_what_that_takes(run: Run, content: Content) -> None:
    """Steps 5 and 6 have weights only, so the rules alone would leave no step with both."""
    write(run, range(5), content, {"weights": "last 1", "optimizer": "last 1", "dynamics": "last 1"})
    bare = {address: tensor for address, tensor in content["tensors"].items() if address.kind == "weights"}
    retention = Retention(run, dict.fromkeys(PARTS, "last 1"), resumable)
    for step in (5, 6):
        run.commit(step, **content | {"tensors": bare, "tables": {}})
        retention.apply(step)
    assert left(run) == {4: {"weights", "optimizer", "dynamics"}, 6: {"weights"}}


def test_nothing_goes_before_the_newer_step_is_whole(
    run: Run, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[int]] = []

    def watched(partial: Path, target: Path, *rest: Any) -> None:
        publish(partial, target, *rest)
        seen.append({step for step in run.steps if "optimizer.safetensors" in run[step].files})

    publish = run_module.publish
    monkeypatch.setattr(run_module, "publish", watched)
    write(run, range(4), content, {"weights": "all", "optimizer": "last 1", "dynamics": "all"})
    assert seen == [{0}, {0, 1}, {1, 2}, {2, 3}]


def test_steps_of_an_earlier_start_follow_the_rules_too(run: Run, content: Content) -> None:
    write(run, range(4), content, {})
    write(Run.open(run.path), range(4, 5), content, dict.fromkeys(PARTS, "last 2"))
    assert left(run) == {step: set(PARTS) for step in (3, 4)}


@pytest.mark.slow
def test_steps_beyond_the_one_just_written_count_for_nothing(run: Run, content: Content) -> None:
    """A run that goes on from step 1 finds 5 and 6 of its earlier life; 2 must not fall behind them."""
    write(run, range(7), content, {})
    write(run, range(2, 3), content, dict.fromkeys(PARTS, "last 1"))
    assert set(left(run)) == {2, 3, 4, 5, 6}


def test_a_step_that_was_asked_for_by_name_stays(run: Run, content: Content) -> None:
    run.commit(1, **content, about={"replayed": {"from": 0}})
    write(run, range(2, 5), content, dict.fromkeys(PARTS, "last 1"))
    assert set(left(run)) == {1, 4}


def test_a_damaged_step_is_left_for_people_to_look_at(run: Run, content: Content) -> None:
    write(run, range(2), content, {})
    (run.step_path(0) / "manifest.json").write_text("{}")
    write(run, range(2, 4), content, dict.fromkeys(PARTS, "last 1"))
    assert run.step_directories() == [0, 3]


@pytest.mark.parametrize("call", ["thin", "remove"])
def test_what_cannot_be_deleted_stays_and_the_training_goes_on(
    run: Run, content: Content, call: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    keep = dict.fromkeys(PARTS if call == "remove" else ("optimizer",), "last 1")
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "discard" if call == "remove" else "write_thinned", full)
        write(run, range(2), content, keep)
    assert "Step 0 keeps its " in caplog.text
    assert "no space left" in caplog.text
    assert left(run) == {step: set(PARTS) for step in (0, 1)}
    write(run, range(2, 3), content, keep)
    assert "optimizer" not in left(run).get(0, set()) | left(run).get(1, set())


@pytest.mark.slow
@pytest.mark.parametrize("call", ["thin", "remove"])
def test_killed_at_any_operation_of_a_deletion_each_step_is_whole_or_gone(
    run: Run, content: Content, call: str
) -> None:
    """The first, the second, … operation on a directory is the last one that happens."""

    class KilledError(BaseException):
        pass

    def dying(real: Callable[..., Any], countdown: list[int]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            countdown[0] -= 1
            if countdown[0] <= 0:
                raise KilledError
            return real(*arguments, **options)

        return wrapped

    killed, operations = True, 0
    while killed:
        run.commit(0, **content, replace=True)
        run.commit(1, **content)
        with pytest.MonkeyPatch.context() as patch:
            operations += 1
            countdown = [operations]
            for name in ("rename", "replace", "link", "fsync", "unlink", "rmdir"):
                patch.setattr(os, name, dying(getattr(os, name), countdown))
            patch.setattr(shutil, "rmtree", dying(shutil.rmtree, countdown))
            try:
                run.thin(0, {"optimizer"}) if call == "thin" else run.remove(0)
                killed = False
            except KilledError:
                pass
        reader = Run.open(run.path)
        assert reader.problems(1) == []
        assert 0 not in reader.step_directories() or reader.problems(0) == []
        assert call == "remove" or 0 in reader.steps
    assert operations > 3


def test_removing_the_newest_step_moves_the_link(run: Run, content: Content) -> None:
    run.commit(0, **content)
    run.commit(1, **content)
    run.remove(1)
    assert (run.checkpoints_path / "latest").resolve() == run.step_path(0)


rules = st.one_of(st.just("all"), st.integers(1, 5).map("last {}".format), st.integers(1, 5).map("every {}".format))


@given(
    held=st.dictionaries(st.integers(0, 30), st.sets(st.sampled_from(PARTS), min_size=1), min_size=1),
    keep=st.fixed_dictionaries(dict.fromkeys(PARTS, rules)),
)
def test_one_application_at_the_end_is_the_same_as_one_after_each_step(
    held: dict[int, set[str]], keep: dict[str, str]
) -> None:
    """So the preview may tell what a run will hold; and at each moment there is a step to go on from if ever there was."""

    def apply(now: dict[int, set[str]]) -> dict[int, set[str]]:
        whole = [step for step in now if {"weights", "optimizer"} <= now[step]]
        going = surplus(now, keep, whole)
        assert not going or max(whole, default=-1) not in going or "weights" not in going[max(whole)]
        return {step: kept for step in now if (kept := now[step] - going.get(step, set()))}

    gradually: dict[int, set[str]] = {}
    for step in sorted(held):
        gradually = apply(gradually | {step: held[step]})
        assert gradually[step] == held[step]
    assert gradually == apply(held)
