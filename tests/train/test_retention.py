"""What `checkpointing.keep` leaves of a run, that the preview foretells it, and that the run can always go on."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from picolm.schema import ConfigError
from picolm.store import Run
from picolm.store.listing import contents
from picolm.store.writer import Retention
from picolm.train.preview import preview

LEAN = (
    "training.max_steps=10",
    "training.optimization.lr_scheduler=constant",
    "checkpointing.keep.weights=every 4",
    "checkpointing.keep.optimizer=last 2",
    "checkpointing.keep.dynamics=last 1",
)


def held(run: Run) -> dict[int, set[str]]:
    kinds = {"weights": "weights", "optimizer": "optimizer", "gradients": "dynamics", "activations": "dynamics"}
    return {
        step: {kinds[kind] for kind in run[step].bytes_by_kind() if kind in kinds}
        for step in run
        if run[step].verify() == []
    }


@pytest.mark.slow
def test_older_checkpoints_are_thinned_and_the_newest_is_not(train: Callable[..., Run]) -> None:
    run = train(*LEAN)
    assert held(run) == {
        0: {"weights"},
        4: {"weights"},
        8: {"weights", "optimizer"},
        10: {"weights", "optimizer", "dynamics"},
    }
    assert run[4].meta["resumable"]  # it was when it was saved


@pytest.mark.slow
def test_a_run_goes_on_from_a_checkpoint_that_still_has_everything(train: Callable[..., Run]) -> None:
    """Step 4 says `resumable`, and lost its optimizer since: going on from it would be another training."""
    whole = train("training.max_steps=14", LEAN[1], "checkpointing.run_name=whole")
    run = train(*LEAN)
    (run[10].path / "model.safetensors").unlink()
    run = train(*LEAN, "training.max_steps=14")
    assert run.environment["starts"][-1]["step"] == 8
    assert run[14].manifest.files == whole[14].manifest.files


@pytest.mark.slow
def test_the_first_step_has_no_optimizer_state_to_lose(train: Callable[..., Run]) -> None:
    run = train("checkpointing.keep.optimizer=last 1")
    before = run[6].manifest.files
    (run[6].path / "optimizer.safetensors").unlink()
    run = train("checkpointing.keep.optimizer=last 1")
    assert run.environment["starts"][-1]["step"] == 0
    assert run[6].manifest.files == before


@pytest.mark.slow
def test_a_kill_between_the_last_save_and_what_follows_it_is_made_good(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Retention, "apply", lambda self, newest: None)
        assert len(held(train(*LEAN))) == 6
    assert held(train(*LEAN)) == {
        0: {"weights"},
        4: {"weights"},
        8: {"weights", "optimizer"},
        10: {"weights", "optimizer", "dynamics"},
    }


def test_the_preview_counts_what_is_left(make_config: Callable[..., Any], train: Callable[..., Run]) -> None:
    chosen = (*LEAN, "evaluation.metrics=null")
    line = next(line for line in preview(make_config(*chosen)).splitlines() if line.startswith("disk"))
    found = re.search(r"in all about ([\d.]+) kB", line)
    assert found is not None, line
    written = sum(entry.minimum_bytes for entry in contents(train(*chosen)))
    assert float(found[1]) * 1000 == pytest.approx(written, rel=0.01)


@pytest.mark.parametrize("rule", ["last", "last 0", "every -1", "newest 3", "last 3 of 4", "3"])
def test_what_is_no_rule(make_config: Callable[..., Any], rule: str) -> None:
    with pytest.raises(ConfigError, match=r"checkpointing\.keep\.weights: .*Checkpoints whose weights stay on disk"):
        make_config(f"checkpointing.keep.weights={rule}")
