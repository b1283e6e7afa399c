"""Any step again: what a replay makes is, bit for bit, what the run had, and where it is not, it says so."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from picolm.cli import main
from picolm.errors import PicoError
from picolm.store import Run
from picolm.train import report, run_training
from picolm.train.history import config_at, parse_steps, recorded_digests, segments
from picolm.train.inspection import batch_at
from picolm.train.job import Due, Job
from picolm.train.replay import replay

Train = Callable[..., Run]
EVERYTHING = Due(weights=True, optimizer=True, dynamics=True)
SPARSE = ("checkpointing.save_every_n_steps=100", "checkpointing.run_name=sparse", "training.max_steps=7")
DENSE = ("checkpointing.save_every_n_steps=1", "checkpointing.run_name=dense", "training.max_steps=7")


def pico(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """The exit code of the command."""
    monkeypatch.setattr("sys.argv", ["pico", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def content(run: Run, step: int) -> dict[str, str]:
    """sha-256 by file of a step."""
    return {name: record.sha256 for name, record in run._sealed(step).files.items()}


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    original = report.step

    def and_stop(job: Any, at: int, *arguments: Any) -> None:
        original(job, at, *arguments)
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(report, "step", and_stop)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_every_step_comes_out_with_the_files_that_a_checkpoint_of_it_has(train: Train, optimizer: str) -> None:
    chosen = f"training.optimization.optimizer={optimizer}"
    sparse, dense = train(*SPARSE, chosen), train(*DENSE, chosen)
    assert sparse.steps == [0, 7]
    verdict = replay(sparse, [2, 5], kinds=EVERYTHING, destination=sparse, verify=True)
    assert sparse.steps == [0, 2, 5, 7]
    assert verdict.identical
    assert [found.step for found in verdict.compared] == [0, 2, 4, 6]
    assert (verdict.first, verdict.last) == (0, 6)
    for step in (2, 5):
        assert content(sparse, step) == content(dense, step)
        assert sparse._sealed(step).manifest.about["replayed"] == {"run": "sparse", "from_step": 0}
    again = replay(sparse, [6], kinds=EVERYTHING, destination=None, verify=True)
    assert (again.first, again.last) == (5, 6)  # as many updates as there are steps since the checkpoint before


@pytest.mark.slow
def test_what_is_captured_after_the_fact_is_what_was_captured_live(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = train(*DENSE, "checkpointing.learning_dynamics.positions=all", "checkpointing.learning_dynamics.layers=[1]")
    run, out = train(*SPARSE), live.path.parent / "captured"
    before = {step: content(run, step) for step in run}
    chosen = "{layers: [1], positions: all, what: [gradients, activations]}"
    assert pico(monkeypatch, "replay", run.path, "--steps", "2:4", "--capture", chosen, "--out", out) == 0
    captured = Run.open(out)
    assert captured.steps == [2, 3, 4]
    for step in captured:
        addresses = list(captured[step])
        assert {address.kind for address in addresses} == {"gradients", "activations"}
        assert {address.split for address in addresses} == {"train", "val"}
        assert addresses == [a for a in live[step] if a.split]
        assert [captured[step].digest(a) for a in addresses] == [live[step].digest(a) for a in addresses]
        assert captured[step].rows_digest("train") == live[step].rows_digest("train")
    assert {step: content(run, step) for step in run} == before


@pytest.mark.slow
def test_a_replay_that_differs_says_where_and_by_how_much(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train("training.max_steps=6", "checkpointing.save_optimizer=4", "checkpointing.save_every_n_steps=2")
    exact = Job.learning_rate
    monkeypatch.setattr(Job, "learning_rate", lambda job, step: exact(job, step) * (1.001 if step == 1 else 1.0))
    assert pico(monkeypatch, "replay", run.path, "--step", 3, "--verify") == 1
    said = capsys.readouterr().out
    assert "Different at step 2, relative difference" in said
    assert "Different at step 4" in said
    assert "The packages and the hardware are those of the run." in said
    verdict = replay(run, [3], kinds=Due(), verify=True)
    differences = {found.step: found.difference for found in verdict.compared}
    assert not verdict.identical
    assert differences[0] is None
    assert differences[2] is not None
    assert 0 < differences[2] < 1e-3


@pytest.mark.slow
def test_a_step_that_is_there_with_other_weights_is_left_alone(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(*SPARSE)
    replay(run, [3], kinds=EVERYTHING, destination=run)
    there = content(run, 3)
    replay(run, [3], kinds=EVERYTHING, destination=run)  # the same again: nothing to do
    run.thin(3, ["optimizer"])
    replay(run, [3], kinds=EVERYTHING, destination=run)  # what was thinned out comes back
    assert content(run, 3) == there
    run.thin(3, ["optimizer"])
    exact = Job.learning_rate
    monkeypatch.setattr(Job, "learning_rate", lambda job, step: exact(job, step) * 2)
    with pytest.raises(PicoError, match="step_3 is there with other weights; it is left as it is"):
        replay(run, [3], kinds=EVERYTHING, destination=run)
    with pytest.raises(PicoError, match=r"step_3 holds .* which the replay does not make"):
        replay(run, [3], kinds=Due(weights=True), destination=run)


@pytest.mark.slow
def test_each_stretch_is_made_with_the_configuration_it_had(
    train: Train, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        run_training(make_config(*SPARSE))
    run = train(*SPARSE, "training.optimization.lr=0.02", "training.max_steps=9")
    assert run.steps == [0, 4, 9]
    assert [(s.first, s.last, s.config.training.optimization.lr) for s in segments(run, 0, 9)] == [
        (0, 4, 0.01),
        (4, 9, 0.02),
    ]
    assert config_at(run, 3).training.max_steps == 7
    assert config_at(run, 4).training.max_steps == 9
    run.thin(4, ["optimizer"])
    verdict = replay(run, [8], kinds=Due(), verify=True)
    assert verdict.first == 0
    assert verdict.identical
    assert [found.step for found in verdict.compared] == [0, 2, 4, 6, 8]


@pytest.mark.slow
def test_a_change_on_the_way_leaves_no_mark_but_the_one_it_left_live(
    train: Train, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in the running averages either, which see each loss once."""
    runs = []
    for options in (SPARSE, DENSE):
        with monkeypatch.context() as patch:
            stop_at(patch, 3)
            run_training(make_config(*options))
        runs.append(train(*options, "training.optimization.lr=0.02", "training.max_steps=9"))
    sparse, dense = runs
    sparse.remove(4)
    replay(sparse, [4, 6, 8], kinds=EVERYTHING, destination=sparse)
    for step in (6, 8):
        assert content(sparse, step) == content(dense, step)
    assert sparse[4].meta["meters"] == dense[4].meta["meters"]
    assert sparse[4].meta["learning_rate"] == dense[4].meta["learning_rate"]


@pytest.mark.slow
def test_nothing_is_made_of_steps_that_were_never_trained_or_of_other_data(
    train: Train, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(*SPARSE)
    (tmp_path / "others").mkdir()
    shutil.copy(next(toy_data.glob("val-*")), tmp_path / "others" / "train-00000-of-00001.parquet")
    for words, message in (
        (("--step", 8), "has been trained up to step 7; there is no step 8 to make again"),
        (("--step", 3, "training.max_steps=5"), "training.max_steps: a step is made again as it was"),
        (("--steps", "3:x"), "'3:x' names no steps"),
        (("--steps", "5:2"), "'5:2' names no steps"),
        (("--steps", "5:2:-1"), "'5:2:-1' names no steps"),
        (("--steps", "2:5:0"), "'2:5:0' names no steps"),
        ((), "which step?"),
        (("--step", 3, "--capture", "{layer: all}"), "layer: unknown key; did you mean 'layers'?"),
        (("--step", 3, "--capture", "[all"), "--capture is not valid YAML"),
        (
            ("--step", 3, "--commit", "--out", tmp_path / "x"),
            "--commit adds the steps as the run would have saved them",
        ),
        (("--step", 3, f"data.dataset.name={tmp_path}/others"), "was trained on other data"),
    ):
        assert pico(monkeypatch, "replay", run.path, *words) != 0
        assert message in capsys.readouterr().err
    other = train("checkpointing.run_name=other")
    assert pico(monkeypatch, "replay", run.path, "--step", 3, "--out", other.path) == 1
    assert "holds another run; choose another folder with --out" in capsys.readouterr().err


def test_steps_are_written_in_three_ways() -> None:
    assert parse_steps("7") == [7]
    assert parse_steps("9,5,5") == [5, 9]
    assert parse_steps("2:4") == [2, 3, 4]
    assert parse_steps("0:10:5") == [0, 5, 10]
    for wrong in ("", "4:2", "a", "1:2:3:4", "-1", "1:2:0"):
        with pytest.raises(PicoError, match="names no steps"):
            parse_steps(wrong)


@pytest.mark.slow
def test_a_fork_without_a_change_ends_as_its_parent_did(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(*SPARSE)
    assert pico(monkeypatch, "fork", run.path, "--step", 3, "--run-name", "same") == 0
    same = Run.open(run.path.parent / "same")
    assert same.steps == [3, 7]
    files = ("model.safetensors", "optimizer.safetensors", "trainer_state.json")
    assert all(content(same, 7)[name] == content(run, 7)[name] for name in files)
    parent = same._sealed(3).manifest.about["forked_from"]
    assert (parent["run"], parent["step"], parent["changed"]) == ("sparse", 3, {})
    assert same.environment["forked_from"]["weights_digest"] == recorded_digests(same)[3]
    assert replay(same, [5], kinds=Due(), verify=True).identical


@pytest.mark.slow
def test_a_fork_goes_another_way_from_its_step_on(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(*SPARSE)
    changed = ("training.optimization.lr=0.02", "training.seeds.data=7", "checkpointing.save_every_n_steps=3")
    assert pico(monkeypatch, "fork", run.path, "--step", 3, "--run-name", "other", *changed) == 0
    other = Run.open(run.path.parent / "other")
    assert other.steps == [3, 6, 7]
    replayed = replay(run, [3], kinds=EVERYTHING, destination=run)
    assert replayed.first == 0
    weights = other[3].select(kind="weights")
    assert all(torch.equal(other[3][a], run[3][a]) for a in weights)
    assert not all(torch.equal(other[7][a], run[7][a]) for a in weights)
    assert other[3].select(kind="gradients")  # its first checkpoint tells what its own first batch does
    assert set(other.environment["forked_from"]["changed"]) == {
        "training.optimization.lr", "training.seeds.data", "checkpointing.save_every_n_steps",
    }  # fmt: skip
    for words, message in (
        (("--step", 3, "--run-name", "other"), "holds a run already"),
        (("--step", 3, "--run-name", "x", "model.d_model=48"), "model.d_model: a fork goes on with the weights"),
        (("--step", 3, "--run-name", "x", "training.max_steps=2"), "there is nothing to do after step 3"),
        (("--step", 9, "--run-name", "x"), "there is no step 9"),
    ):
        assert pico(monkeypatch, "fork", run.path, *words) == 1
        assert message in capsys.readouterr().err
    assert not (run.path.parent / "x").exists()


@pytest.mark.slow
def test_a_fork_is_not_sent_to_where_its_parent_is_sent_unless_the_user_says_so(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The parent may be somebody else's run, whose configuration would send the steps of the fork to that person."""
    run = train(*SPARSE)
    theirs = {
        "checkpointing": {
            "save_to_hf": True,
            "hf_checkpoint": {"repo_id": "them/run", "collection_slug": "them/all-1"},
        },
        "monitoring": {"save_to_wandb": True, "wandb": {"project": "theirs", "entity": "them"}},
    }
    run.write_config({key: run.config[key] | theirs.get(key, {}) for key in run.config})
    assert pico(monkeypatch, "fork", run.path, "--step", 3, "--run-name", "mine", "--no-train") == 0
    config = Run.open(run.path.parent / "mine").config
    assert not config["checkpointing"]["save_to_hf"]
    assert config["checkpointing"]["hf_checkpoint"] == {"repo_id": "", "collection_slug": None}
    assert config["monitoring"]["save_to_wandb"] is False
    assert config["monitoring"]["wandb"] == {"project": "", "entity": ""}
    said = " ".join(capsys.readouterr().out.split())
    assert "To send it, set these keys: checkpointing.save_to_hf, checkpointing.hf_checkpoint.repo_id," in said
    assert "monitoring.save_to_wandb" in said
    words = ("monitoring.save_to_wandb=true", "monitoring.wandb.project=ours")
    assert pico(monkeypatch, "fork", run.path, "--step", 3, "--run-name", "sent", "--no-train", *words) == 0
    sent = Run.open(run.path.parent / "sent").config
    assert sent["monitoring"]["save_to_wandb"] is True
    assert sent["monitoring"]["wandb"] == {"project": "ours", "entity": ""}
    assert not sent["checkpointing"]["save_to_hf"]


@pytest.mark.slow
@pytest.mark.parametrize("stop", [None, PicoError("no"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_fork_touches_no_folder_of_the_user_and_leaves_none_of_its_own(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stop: BaseException | None
) -> None:
    run = train()
    notes = run.path.with_name("notes")
    notes.mkdir()
    (notes / "thoughts.md").write_text("mine")

    def fail(*arguments: Any, **options: Any) -> Any:
        raise stop  # type: ignore[misc]

    name, message = ("notes", "is there already (it holds thoughts.md)") if stop is None else ("other", "")
    before = sorted(path.name for path in run.path.parent.iterdir())
    with monkeypatch.context() as patched:
        if stop is not None:
            patched.setattr("picolm.train.fork.replay", fail)
        assert pico(patched, "fork", run.path, "--step", 3, "--run-name", name, "--no-train") != 0
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in run.path.parent.iterdir()) == before
    assert [path.name for path in notes.iterdir()] == ["thoughts.md"]
    if stop is not None:
        assert pico(monkeypatch, "fork", run.path, "--step", 3, "--run-name", name, "--no-train") == 0
        assert Run.open(run.path.with_name(name)).steps == [3]


def test_replayed_steps_are_not_written_into_a_folder_that_holds_something_else(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train()
    notes = run.path.with_name("notes")
    notes.mkdir()
    (notes / "environment.json").write_text("mine")
    assert pico(monkeypatch, "replay", run.path, "--step", 3, "--out", notes) == 1
    assert "is there already (it holds environment.json)" in capsys.readouterr().err
    assert [path.name for path in notes.iterdir()] == ["environment.json"]
    assert (notes / "environment.json").read_text() == "mine"


@pytest.mark.slow
def test_a_fork_that_lost_its_first_step_does_not_start_from_nothing(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(*SPARSE)
    assert pico(monkeypatch, "fork", run.path, "--step", 3, "--run-name", "lost", "--no-train") == 0
    lost = Run.open(run.path.parent / "lost")
    assert lost.steps == [3]
    (lost.step_path(3) / "model.safetensors").unlink()
    with pytest.raises(PicoError, match="a fork whose first checkpoint is not there or not whole"):
        run_training(config_at(lost, 3))


@pytest.mark.slow
def test_the_batch_of_a_step_is_the_one_that_was_trained_on(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = train("monitoring.logging.log_every_n_steps=1", "training.optimization.gradient_accumulation_steps=1")
    losses = {entry["step"]: entry["train/loss"] for entry in run.metrics() if "train/loss" in entry}
    batch = batch_at(run, 2, loss=True)
    rows = run[2].rows("train")
    assert batch.rows.tokens_RS.tolist() == rows.column("input_ids").to_pylist()
    assert batch.rows.numbers.tolist() == rows.column("row").to_pylist()
    assert batch.rows.labels == rows.column("source").to_pylist()
    assert batch.before_RT is not None
    assert batch.after_RT is not None
    assert float(batch.before_RT.mean()) == pytest.approx(losses[2], rel=1e-6)
    assert batch.after_RT.mean() < batch.before_RT.mean()  # the update that the batch makes lowers its own loss
    last = batch_at(run, 6, loss=True, rows=2)
    assert last.after_RT is None
    assert len(last.rows.numbers) == 2
    out = tmp_path / "batch.csv"
    assert pico(monkeypatch, "batch", run.path, "--step", 2, "--rows", 1, "--loss", "--out", out) == 0
    said = capsys.readouterr().out
    assert "row 16" in said
    assert "even" in said
    assert "before the update" in said
    lines = out.read_text().splitlines()
    assert lines[0] == "row,source,position,token,text,loss_before,loss_after"
    assert len(lines) == 1 + 16
    assert pico(monkeypatch, "batch", run.path, "--step", 2, "--out", tmp_path / "x.txt") == 1
    assert "can be written as .csv or .parquet" in capsys.readouterr().err


def test_runs_of_others_are_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (tmp_path / "checkpoints" / "step_0" / "learning_dynamics").mkdir(parents=True)
    torch.save({"a": torch.ones(2)}, tmp_path / "checkpoints" / "step_0" / "learning_dynamics" / "train_gradients.pt")
    assert pico(monkeypatch, "replay", tmp_path, "--step", 0) == 1
    assert "only runs of picolm can be trained on exactly" in capsys.readouterr().err


@pytest.mark.slow
def test_a_replay_that_is_stopped_leaves_whole_steps_only(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(*SPARSE)
    out = Run.create(run.path.parent / "out", run.config, run.environment)
    stop_at(monkeypatch, 3)
    verdict = replay(run, [2, 5], kinds=EVERYTHING, destination=out)
    assert verdict.stopped == signal.SIGTERM
    assert out.steps == [2]
    assert out.problems(2) == []
