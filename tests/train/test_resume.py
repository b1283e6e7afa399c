"""Going on with a run: from the last whole checkpoint, with the same experiment, or not at all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from picolm.errors import DataError, PicoError, StoreError
from picolm.store import Run
from picolm.train.resume import changes

Train = Callable[..., Run]


def test_a_finished_run_is_left_as_it_is(train: Train) -> None:
    first = train()

    def contents() -> dict[Path, bytes]:
        kept = (file for file in first.path.rglob("*") if file.is_file() and file.name not in (".lock", "train.log"))
        return {file: file.read_bytes() for file in kept}

    before = contents()
    assert before[first.path / "metrics.jsonl"]
    train()
    assert contents() == before


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


def test_data_may_move(train: Train, toy_data: Path, tmp_path: Path) -> None:
    train()
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in toy_data.glob("*.parquet"):
        (moved / file.name).write_bytes(file.read_bytes())
    assert train(f"data.dataset.name={moved}", "training.max_steps=8").latest().step == 8


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


def test_a_run_may_be_protected(train: Train) -> None:
    train()
    with pytest.raises(PicoError, match=r"holds a run already and checkpointing.training.auto_resume is false"):
        train("checkpointing.training.auto_resume=false")


def test_a_full_disk_ends_the_run_and_leaves_the_previous_checkpoint(
    train: Train, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from picolm.store import compose

    original = compose.write_tensors

    def full(path: Path, tensors: Any) -> Any:
        if "step_4" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(path, tensors)

    monkeypatch.setattr(compose, "write_tensors", full)
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


def test_the_configuration_in_the_run_is_complete(train: Train) -> None:
    text = (train().path / "training_config.yaml").read_text()
    assert yaml.safe_load(text)["model"]["position_emb_theta"] == 10000.0
