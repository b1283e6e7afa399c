"""Going on with a run: from the last whole checkpoint, with the same experiment, or not at all."""

import math
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from picolm.cli import main
from picolm.errors import DataError, PicoError, StoreError
from picolm.models.anatomy import CAPTURED
from picolm.store import Run
from picolm.train import loop, run_training
from picolm.train.fork import fork
from picolm.train.job import Due
from picolm.train.replay import replay
from picolm.train.sample import load_model
from picolm.train.state import changes

Train = Callable[..., Run]


@pytest.mark.slow
def test_a_finished_run_is_left_as_it_is(train: Train) -> None:
    first = train()

    def contents() -> dict[Path, bytes]:
        kept = (file for file in first.path.rglob("*") if file.is_file() and file.name not in (".lock", "train.log"))
        return {file: file.read_bytes() for file in kept}

    before = contents()
    assert before[first.path / "metrics.jsonl"]
    train()
    assert contents() == before


@pytest.mark.slow
def test_keys_that_may_change_are_recorded(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    train()
    run = train("training.max_steps=8", "training.optimization.lr=0.02")
    assert run.latest().step == 8
    assert run.config["training"]["optimization"]["lr"] == 0.02
    starts = run.environment["starts"]
    assert [start["step"] for start in starts] == [0, 6]
    assert starts[1]["changed"] == {"training.max_steps": [6, 8], "training.optimization.lr": [0.01, 0.02]}
    assert (
        "training.optimization.lr was 0.01 in this run until now and is 0.02 from step 6 on" in capsys.readouterr().err
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("model.d_model=48", "model.d_model: 24 in the run, 48 now"),
        ("training.seeds.data=1", "training.seeds.data: 42 in the run, 1 now"),
        ("data.dataloader.batch_size=16", "data.dataloader.batch_size: 8 in the run, 16 now"),
        ("training.optimization.optimizer=sgd", "training.optimization.optimizer: 'adamw' in the run, 'sgd' now"),
    ],
)
def test_what_makes_another_experiment_is_refused(train: Train, override: str, key: str) -> None:
    train()
    with pytest.raises(PicoError, match="is another experiment") as caught:
        train(override)
    assert key in str(caught.value)
    assert "Choose another checkpointing.run_name" in str(caught.value)


@pytest.mark.slow
def test_other_data_under_the_same_name_are_refused(train: Train, toy_data: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    train()
    other = tmp_path / "other"
    other.mkdir()
    for file in toy_data.glob("*.parquet"):
        tokens = [row[::-1] for row in pq.read_table(file)["input_ids"].to_pylist()]
        pq.write_table(pa.table({"input_ids": tokens}), other / file.name)
    with pytest.raises(
        PicoError, match=r"was trained on other data: fingerprint .* Point data.dataset.name to the same data"
    ):
        train(f"data.dataset.name={other}")


@pytest.mark.slow
def test_data_may_move(train: Train, toy_data: Path, tmp_path: Path) -> None:
    train()
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in toy_data.glob("*.parquet"):
        (moved / file.name).write_bytes(file.read_bytes())
    assert train(f"data.dataset.name={moved}", "training.max_steps=8").latest().step == 8


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "flip", "missing"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    train: Train, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train("checkpointing.run_name=whole", "training.max_steps=8")
    run = train()
    file = run[6].path / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(content[:-100])
    elif damage == "flip":
        content[-1] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()
    continued = train("training.max_steps=8")
    said = capsys.readouterr().err
    assert "Damaged checkpoint" in said
    assert "optimizer.safetensors" in said
    assert "from step 4" in said
    assert not continued[6].verify()
    assert [entry["step"] for entry in continued.metrics() if "train/loss" in entry] == [0, 2, 4, 6, 8]
    del whole


@pytest.mark.slow
def test_a_run_may_be_protected(train: Train) -> None:
    train()
    with pytest.raises(PicoError, match=r"holds a run already and checkpointing.training.auto_resume is false"):
        train("checkpointing.training.auto_resume=false")


def test_a_full_disk_ends_the_run_and_leaves_the_previous_checkpoint(
    train: Train, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from picolm.store import publish

    original = publish.write_tensors

    def full(path: Path, tensors: Any) -> Any:
        if "step_4" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(path, tensors)

    monkeypatch.setattr(publish, "write_tensors", full)
    with pytest.raises(StoreError, match="step 4"):
        train()
    run = Run.open(Path(make_config().checkpointing.runs_dir) / "toy")
    assert run.steps == [0, 2]
    assert not run[2].verify()
    assert not [entry for entry in run.checkpoints_path.iterdir() if "partial" in entry.name]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.dataset.name=/no/such/folder", "'/no/such/folder' is not found"),
        ("model.max_seq_len=32", "17 tokens"),
    ],
)
def test_data_that_do_not_fit(train: Train, override: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        train(override)


def test_a_token_beyond_the_vocabulary_is_named_before_it_is_used(train: Train) -> None:
    with pytest.raises(
        DataError, match=r"train-00000-of-00001.parquet.*row \d+.*token id 6\d is outside of the vocabulary of 60"
    ):
        train(
            "model.vocab_size=60", "data.tokenizer.vocab_size=60", "evaluation.metrics=null",
            "checkpointing.learning_dynamics.eval_data=null",
        )  # fmt: skip


def test_changes_are_told_by_dotted_key() -> None:
    assert changes({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3, "d": None}}) == {"a.c": (2, 3)}


@pytest.mark.slow
def test_the_configuration_in_the_run_is_complete(train: Train) -> None:
    text = (train().path / "training_config.yaml").read_text()
    assert yaml.safe_load(text)["model"]["position_emb_theta"] == 10000.0


def rewrite(run: Run, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the stored configuration of a run, as a version with other keys would have written it."""
    file = run.path / "training_config.yaml"
    config = yaml.safe_load(file.read_text())
    change(config)
    file.write_text(yaml.safe_dump(config, sort_keys=False))


LACKING = {
    "a key of the model": lambda config: config["model"].pop("init"),
    "a key of the data": lambda config: config["data"]["dataset"].pop("shuffle"),
    "a seed": lambda config: config["training"]["seeds"].pop("noise"),
    "a section": lambda config: config["checkpointing"].pop("keep"),
    "an empty section": lambda config: config["checkpointing"].update(keep={}),
    "a key of the optimization": lambda config: config["training"]["optimization"].pop("decay_norms_and_embeddings"),
}


@pytest.mark.slow
@pytest.mark.parametrize("lacking", LACKING)
def test_a_key_that_came_later_makes_no_other_experiment(
    train: Train, lacking: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An old run has it at its default: on resume, replay and fork."""
    rewrite(train(), LACKING[lacking])
    run = train("training.max_steps=8")
    assert run.latest().step == 8
    assert run.environment["starts"][1]["changed"] == {"training.max_steps": [6, 8]}
    rewrite(run, LACKING[lacking])
    verdict = replay(run, [3, 7], kinds=Due(), verify=True)
    assert verdict.identical
    assert len(verdict.compared) == 4
    assert fork(run, 4, "other", []).training.max_steps == 6
    assert Run.open(run.path.parent / "other").environment["forked_from"]["changed"] == {}


@pytest.mark.slow
def test_another_value_than_the_default_is_still_another_experiment(train: Train) -> None:
    rewrite(train(), LACKING["a key of the model"])
    with pytest.raises(PicoError, match=r"model.init: 'normal' in the run, 'torch_default' now"):
        train("model.init=torch_default")


@pytest.mark.slow
def test_keys_that_a_run_does_not_follow_are_not_noted_as_changed(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train()
    capsys.readouterr()
    train(
        "training.max_steps=8", "checkpointing.checkpoints_dir=elsewhere", "checkpointing.logs_dir=journal",
        "checkpointing.learning_dynamics_dir=dynamics", "checkpointing.evaluation.eval_results_dir=results",
        "checkpointing.fabric_checkpoint_dir=fabric", "monitoring.pico_report.auto_commit=false",
        "monitoring.save_to_picolabs=true", "model.batch_size=7", "checkpointing.training.auto_resume=true",
    )  # fmt: skip
    said = capsys.readouterr().err
    assert "checkpoints_dir stays 'checkpoints', not 'elsewhere'" in said
    assert "was 'checkpoints' in this run until now" not in said
    assert run.environment["starts"][1]["changed"] == {"training.max_steps": [6, 8]}
    assert Run.open(run.path).config["checkpointing"]["checkpoints_dir"] == "checkpoints"
    assert run.steps == [0, 2, 4, 6, 8]
    assert not {"elsewhere", "journal", "results"} & {file.name for file in run.path.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.update(model=None), r"model: .*should be"),
        (lambda config: config["training"].update(lookahead=3), "training.lookahead: is not known to this version"),
    ],
)
def test_a_stored_configuration_that_cannot_be_used_names_the_key(
    train: Train, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    run = train()
    rewrite(run, change)
    with pytest.raises(PicoError, match=message):
        load_model(Run.open(run.path))


HOPELESS = (
    "training.max_steps=20", "training.max_skipped_steps=3", "training.optimization.optimizer=sgd",
    "training.optimization.lr=1e30", "training.optimization.grad_clip_norm=null", "training.optimization.lr_warmup_steps=0",
    "checkpointing.save_every_n_steps=2",
)  # fmt: skip


def commands(message: str) -> list[list[str]]:
    """The commands in a message, word by word."""
    return [shlex.split(line) for line in message.splitlines() if line.strip().startswith("pico ")]


def give(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a command, and expect it to succeed."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 0


@pytest.mark.slow
def test_a_run_that_stopped_for_non_finite_updates_continues_by_the_command_of_its_message(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PicoError) as caught:
        train(*HOPELESS)
    fork, _ = commands(str(caught.value))
    assert fork[:2] == ["pico", "fork"]
    stopped = Run.open(fork[2])
    steps, last = stopped.steps, stopped.latest()
    assert math.isnan(last.meta["loss"]) or math.isinf(last.meta["gradient_norm"])
    give(fork, monkeypatch)
    continued = Run.open(stopped.path.with_name(stopped.name + "-2"))
    first = int(fork[fork.index("--step") + 1])
    assert continued.steps == [step for step in range(0, 21, 2) if step >= first]
    assert math.isfinite(continued.latest().meta["loss"])
    assert continued.latest().meta["skipped_updates"] == continued[first].meta["skipped_updates"]
    assert Run.open(stopped.path).steps == steps  # nothing of the user is deleted
    with pytest.raises(PicoError, match=f"--run-name {stopped.name}-3 "):
        train(*HOPELESS)


@pytest.mark.slow
def test_a_run_that_met_bad_batches_continues_after_them(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second command of the message: nothing is changed, and the weights are well."""
    original = loop.measure

    def poisoned(job: Any, loss: Any) -> Any:
        gradient = original(job, loss)
        return gradient._replace(loss=math.nan, finite=False) if 3 <= job.state.step < 7 else gradient

    monkeypatch.setattr(loop, "measure", poisoned)
    with pytest.raises(PicoError) as caught:
        train("training.max_steps=12", "training.max_skipped_steps=3")
    _, onward = commands(str(caught.value))
    give(onward, monkeypatch)
    run = Run.open(Path(onward[2]).parent)
    assert run.latest().step == 12
    assert run.latest().meta["skipped_updates"] == 4
    assert replay(run, [9], kinds=Due(), verify=True).identical  # it came past them, so a replay does


@pytest.mark.slow
def test_runs_without_a_name_that_start_in_one_second_are_two_runs(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "strftime", lambda *arguments: "2026-01-02_03-04-05")
    runs = Path(make_config().checkpointing.runs_dir)
    for _ in range(3):
        run_training(make_config("checkpointing.run_name=null", "training.max_steps=1"))
    names = ["2026-01-02_03-04-05", "2026-01-02_03-04-05-2", "2026-01-02_03-04-05-3"]
    assert sorted(folder.name for folder in runs.iterdir()) == names
    assert all(Run.open(runs / name).latest().step == 1 for name in names)


def test_a_run_without_a_name_that_cannot_start_leaves_no_folder(make_config: Any) -> None:
    with pytest.raises(DataError):
        run_training(make_config("checkpointing.run_name=null", "data.dataset.name=/no/such/folder"))
    assert list(Path(make_config().checkpointing.runs_dir).iterdir()) == []


def test_modules_that_an_earlier_version_captured_by_default_are_the_roles_of_now() -> None:
    def config(*suffixes: str) -> dict[str, Any]:
        return {"checkpointing": {"learning_dynamics": {"layer_suffixes": list(suffixes)}}}

    before = config("attention.v_proj", "attention.o_proj", "swiglu.w_2")
    then, now = config("attention.value", "attention.output", "mlp.output"), config(*CAPTURED)
    assert changes(before, now) == changes(now, before) == changes(then, now) == changes(now, then) == {}
    assert list(changes(before, config("attention.value"))) == ["checkpointing.learning_dynamics.layer_suffixes"]
