"""One command trains what is missing, analyzes all and compares; given again it does nothing twice."""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from picolm.errors import PicoError
from picolm.store import Run
from picolm.suite.command import run_suite
from picolm.suite.config import load_suite
from picolm.suite.standing import standing, standings

EXAMPLES = Path(__file__).parents[2] / "examples"
SEEDS = "matrix: {size: {small: {model.d_model: 24}, wide: {model.d_model: 32}}, seed: [1, 2]}"


def digests(runs: Path) -> dict[str, str]:
    return {run.name: str(Run.open(run)[6].files["model.safetensors"]) for run in runs.iterdir()}


@pytest.mark.slow
def test_what_is_done_is_not_done_again_and_what_is_added_is_done(
    toy_suite: Callable[..., Path], trained_here: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, folder = toy_suite(), tmp_path / "suites" / "toys"
    assert run_suite(file, ["matrix.size.wide.model.d_model=32"]) == 0
    assert trained_here == ["toys-small", "toys-wide"]
    before, page = digests(tmp_path / "runs"), (folder / "report.html").read_bytes()
    assert "0 of them computed" not in capsys.readouterr().err

    assert run_suite(file) == 0
    assert len(trained_here) == 2
    said = capsys.readouterr().err
    assert "values, 0 of them computed now" in said
    assert "report.html, as it was" in said  # where it lies is said each time
    assert digests(tmp_path / "runs") == before
    assert (folder / "report.html").read_bytes() == page

    assert run_suite(toy_suite(), ["matrix.size.third={model.d_model: 16}"]) == 0
    assert trained_here[2:] == ["toys-third"]
    assert set(pd.read_parquet(folder / "both" / "results.parquet")["run"]) == {"toys-small", "toys-wide", "toys-third"}
    assert (folder / "report.html").read_bytes() != page


@pytest.mark.slow
def test_sizes_are_compared_with_intervals_over_seeds(
    toy_suite: Callable[..., Path], trained_here: list[str], tmp_path: Path
) -> None:
    assert run_suite(toy_suite(SEEDS), report=False) == 0
    members = pd.read_csv(tmp_path / "suites/toys/members.csv", dtype={"seed": str}).set_index("run")
    compared = pd.read_csv(tmp_path / "suites/toys/comparison.csv")
    losses = compared[compared["figure"] == "val/paloma/nats_per_token"].set_index("group")
    assert members["group"].tolist() == ["small", "small", "wide", "wide"]
    assert members["seed"].tolist() == ["1", "2", "1", "2"]
    own = [
        [
            entry["val/paloma/nats_per_token"]
            for entry in Run.open(run).metrics()
            if "val/paloma/nats_per_token" in entry
        ][-1]
        for run in sorted((tmp_path / "runs").glob("toys-small-*"))
    ]
    assert losses.loc["small", "mean"] == pytest.approx(sum(own) / 2)
    assert (losses["n"] == 2).all()
    assert (losses["low"] < losses["mean"]).all()
    assert set(compared["metric"].dropna()) == {"cka", "per"}


@pytest.mark.slow
def test_the_report_begins_with_the_sizes_side_by_side(
    toy_suite: Callable[..., Path], trained_here: list[str], tmp_path: Path
) -> None:
    from picolm.report.assembly import compose
    from picolm.report.material import gather
    from picolm.suite.comparison import SECTION, side_by_side

    assert run_suite(toy_suite(SEEDS)) == 0
    folder = tmp_path / "suites/toys"
    runs = [str(path) for path in sorted((tmp_path / "runs").glob("toys-*"))]
    first = compose(gather(runs, [str(folder / "both")]), [SECTION])[0]
    assert first.title == "The suite"
    assert first.items[0].frame.columns.tolist() == ["of", "figure", "small", "wide"]  # type: ignore[union-attr]
    page = (folder / "report.html").read_text()
    assert "<title>toys" in page
    assert page.index("The suite") < page.index("The runs")

    compared = pd.DataFrame([
        {"group": "a", "figure": "last", "mean": 0.12345, "low": 0.1, "high": 0.16, "n": 2, "of": 3, "metric": "per"},
        {"group": 7, "figure": "last", "mean": 2.0, "low": math.nan, "high": math.nan, "n": 1, "of": 1, "metric": "per"},
        {"group": "a", "figure": "train/loss", "mean": math.nan, "low": math.nan, "high": math.nan, "n": 0, "of": 3},
    ])  # fmt: skip
    assert side_by_side(compared).fillna("").to_dict("records") == [
        {"of": "per", "figure": "last", "a": "0.123 ± 0.037 (2 of 3)", "7": "2.000"},
        {"of": "loss", "figure": "train/loss", "a": "none of 3", "7": ""},
    ]


def test_the_step_at_which_a_run_was_interrupted_is_not_compared(
    toy_suite: Callable[..., Path], trained_here: list[str]
) -> None:
    from picolm.suite.comparison import planned

    members = load_suite(toy_suite()).members
    values = pd.DataFrame({"run": ["toys-small"] * 5 + ["toys-wide"], "step": [0, 2, 3, 4, 6, 5]})
    assert planned(values, members)["step"].tolist() == [0, 2, 4, 6]


@pytest.mark.slow
def test_an_interrupted_member_goes_on(
    toy_suite: Callable[..., Path], trained_here: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from picolm.train import run_training

    member = load_suite(toy_suite()).members[0]
    run_training(member.config)
    whole = digests(tmp_path / "runs")["toys-small"]
    run = Run.open(member.path)
    for step in (4, 6):
        run.remove(step)
    run.truncate_metrics(3)
    assert standing(member)[1:3] == ("interrupted", 2)
    assert run_suite(toy_suite(), report=False) == 0
    assert "2 runs: 1 interrupted, 1 new." in capsys.readouterr().err
    assert digests(tmp_path / "runs")["toys-small"] == whole


@pytest.mark.slow
def test_a_folder_with_another_experiment_is_refused(toy_suite: Callable[..., Path], trained_here: list[str]) -> None:
    assert run_suite(toy_suite(), report=False) == 0
    with pytest.raises(PicoError) as raised:
        run_suite(toy_suite(), ["overrides.training.optimization.lr=0.02"], report=False)
    assert str(raised.value).count("training.optimization.lr: 0.01 in the run, 0.02 in the suite") == 2
    assert "choose another suite_name" in str(raised.value)
    assert len(trained_here) == 2
    moved = standings(load_suite(toy_suite(), ["overrides.checkpointing.save_every_n_steps=3"]).members)
    assert {s.saved_otherwise for s in moved} == {("checkpointing.save_every_n_steps",)}
    assert {s.state for s in moved} == {"finished"}


@pytest.mark.slow
def test_a_run_that_another_process_writes_is_left_to_it(
    toy_suite: Callable[..., Path], trained_here: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_suite(toy_suite(), report=False) == 0
    member = load_suite(toy_suite()).members[1]
    run = Run.open(member.path)
    run.remove(6)
    with run.lock():
        assert run_suite(toy_suite(), report=False) == 1
    assert "Not finished: toys-wide: another process is training it" in capsys.readouterr().err
    assert len(trained_here) == 2


@pytest.mark.slow
def test_a_dry_run_says_what_it_will_take_and_makes_nothing(
    toy_suite: Callable[..., Path], trained_here: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_suite(toy_suite(SEEDS), dry_run=True) == 0
    text = capsys.readouterr().out
    assert text.count("13,560") == 2  # parameters of the two small ones
    assert "3,072" in text  # tokens of all
    assert "Members differ in model.d_model, training.seeds.init; everything else is the same." in text
    assert not (tmp_path / "suites").exists()
    assert not (tmp_path / "runs").exists()
    assert trained_here == []


@pytest.mark.slow
def test_a_dry_run_tells_what_is_done(
    toy_suite: Callable[..., Path], trained_here: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_suite(toy_suite(), report=False) == 0
    capsys.readouterr()
    assert run_suite(toy_suite(), ["matrix.size.third={model.d_model: 24}"], dry_run=True) == 0
    lines = capsys.readouterr().out.splitlines()
    states = {words[0]: words[1] for line in lines if (words := line.split())[:1] and words[0].startswith("toys-")}
    assert states == {"toys-small": "finished", "toys-wide": "finished", "toys-third": "new"}


def test_an_unknown_executor(toy_suite: Callable[..., Path]) -> None:
    with pytest.raises(PicoError, match=r"unknown executor 'slrm' \(there are: local, slurm\)"):
        run_suite(toy_suite(), executor="slrm")


@pytest.mark.slow
def test_one_that_fails_does_not_take_the_rest(
    toy_suite: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked = tmp_path / "runs" / "toys-small"
    blocked.parent.mkdir()
    blocked.write_text("a file where the folder should be")
    assert run_suite(toy_suite(), jobs=2, report=False) == 1
    text = capsys.readouterr().err
    assert "Not finished: toys-small: exit code 1: " in text
    assert "1 of 2 runs are not finished. The same command tries them again." in text
    assert set(pd.read_parquet(tmp_path / "suites/toys/both/results.parquet")["run"]) == {"toys-wide"}
    blocked.unlink()
    assert run_suite(toy_suite(), report=False) == 0
    assert "2 runs: 1 new, 1 finished." in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_suite_that_is_asked_to_stop_saves_and_goes_on_later(toy_suite: Callable[..., Path], tmp_path: Path) -> None:
    file = toy_suite()
    words = ["overrides.training.max_steps=20000", "overrides.checkpointing.save_every_n_steps=20000"]
    command = [sys.executable, "-m", "picolm", "suite", str(file), *words]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "runs" / "toys-small" / "metrics.jsonl"
    until = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size) and time.monotonic() < until:
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=120)
    assert running.returncode == 128 + signal.SIGTERM
    assert "Stopped; every run is saved. To go on: give the same command again." in said
    found = standings(load_suite(file, words).members)
    assert [s.state for s in found] == ["interrupted", "new"]
    assert Run.open(tmp_path / "runs" / "toys-small").steps[-1] == found[0].step > 0


@pytest.mark.slow
def test_a_model_that_the_suite_names_is_trusted_in_its_analysis_and_in_no_other(
    toy_suite: Callable[..., Path], tmp_path: Path
) -> None:
    """Two architectures side by side, one of them the user's own; a stranger's run with the same name asks for trust."""
    (tmp_path / "attention_only.py").write_text((EXAMPLES / "induction" / "attention_only.py").read_text())
    file = toy_suite(
        "matrix: {kind: {full: {model.model_type: pico_decoder},"
        ' attention: {model.model_type: "attention_only:AttentionOnly"}}}'
    )
    (tmp_path / "analysis.yaml").write_text(
        "analysis_name: both\nobserve: {rows: val}\nprobes: [{probe_name: in_context}]\nmetrics: [{metric_name: per}]\n"
    )
    pico = [sys.executable, "-m", "picolm"]
    done = subprocess.run([*pico, "suite", str(file)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "trust-remote-code" not in done.stderr
    values = pd.read_parquet(tmp_path / "suites/toys/both/results.parquet")
    scores = values[values["metric"] == "in_context.in_context_score"]
    assert set(scores["run"]) == {"toys-full", "toys-attention"}
    assert scores["value"].notna().all()
    of_mlp = values[values["module"].str.contains("swiglu")]
    assert set(of_mlp[of_mlp["value"].notna()]["run"]) == {"toys-full"}

    analysis = [*pico, "analyze", "analysis.yaml", "--run", "runs/toys-attention"]
    alone = subprocess.run(analysis, cwd=tmp_path, capture_output=True, text=True)
    assert "is done only with --trust-remote-code" in alone.stderr
