"""`pico suite --executor slurm` on a real cluster: jobs that are waited for, stopped when their time is up, and cancelled."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.slurm.conftest import Slurm, wait_for

from picolm.store import Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LONG = ("overrides.training.max_steps=600", "overrides.monitoring.logging.log_every_n_steps=10")


@pytest.fixture
def suite(make_config: Callable[..., Any], tmp_path: Path) -> Path:
    """Two sizes of the toy."""
    make_config()  # writes toy.yaml
    file = tmp_path / "suite.yaml"
    file.write_text(
        f"suite_name: toys\nbase: toy.yaml\noutput_dir: {tmp_path}/suites\nslurm: {{timeout_min: 20}}\n"
        "matrix: {size: {small: {model.d_model: 24}, wide: {model: {d_model: 32}}}}\n"
    )
    return file


def digests(place: Path) -> dict[int, Any]:
    run = Run.open(place)
    return {step: run[step].manifest.files for step in run}  # type: ignore[attr-defined]


def logged(place: Path) -> int:
    """The last step that a run logged, -1 before the first."""
    run = Run.open(place) if (place / "run.json").exists() else None
    return max((entry["step"] for entry in run.metrics()), default=-1) if run else -1


def test_members_are_trained_as_jobs_and_compared(slurm: Slurm, suite: Path, tmp_path: Path) -> None:
    said = slurm("pico", "suite", suite, "--executor", "slurm")
    assert (tmp_path / "suites/toys/report.html").exists(), said
    slurm("pico", "suite", suite, "suite_name=alone", "overrides.checkpointing.runs_dir=here", "run_name=toys-{size}")
    for size in ("small", "wide"):
        assert digests(tmp_path / f"runs/toys-{size}") == digests(tmp_path / f"here/toys-{size}")
    assert slurm.jobs == {}


def test_when_its_time_is_up_a_member_saves_is_queued_again_and_goes_on(
    slurm: Slurm, suite: Path, tmp_path: Path
) -> None:
    """With a process on each of two nodes."""
    run = tmp_path / "runs/toys-small"
    words = ["suite", suite, "matrix.size={small: {}}", *LONG, "overrides.checkpointing.save_every_n_steps=100000"]
    with slurm.start(*words, "overrides.training.fabric.num_nodes=2", "--executor", "slurm") as command:
        wait_for(lambda: logged(run) > 20)
        slurm("scancel", "--signal=USR2", slurm.number("toys-small"))  # what SLURM sends
        said = command.communicate(timeout=300)[0]
    assert command.returncode == 0, said
    first, stopped, last = Run.open(run).steps
    assert (first, last) == (0, 600)
    assert 20 < stopped < 600
    here = ["suite_name=alone", "overrides.checkpointing.runs_dir=here", "run_name=toys-{size}"]
    slurm("pico", *words, *here, "overrides.training.fabric.num_devices=2")
    whole = digests(tmp_path / "here/toys-small")
    assert {step: files for step, files in digests(run).items() if step != stopped} == whole


def test_a_cancelled_job_is_told_and_goes_on_with_the_next_command(slurm: Slurm, suite: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs/toys-small"
    words = ["suite", suite, "matrix.size={small: {}}", *LONG, "--executor", "slurm"]
    with slurm.start(*words) as command:
        wait_for(lambda: logged(run) > 20)
        with slurm.start(*words) as second:
            assert second.stdout is not None
            assert next(line for line in second.stdout if "toys-small" in line).startswith(
                "toys-small: waiting for job"
            )
            slurm("scancel", slurm.number("toys-small"))
            said, again = command.communicate(timeout=120)[0], second.communicate(timeout=120)[0]
    assert (command.returncode, second.returncode) == (1, 1), said + again
    for words_of_one in (said, again):
        assert re.search(r"Not finished: toys-small: job \d+ left the queue without a result: it was", words_of_one)
    assert "Traceback" not in said + again
    stopped = Run.open(run).steps[-1]
    assert stopped > 20  # it saved before it left
    slurm("pico", *words)
    assert Run.open(run).steps[-1] == 600
