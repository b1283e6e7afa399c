"""The theorems of training: it is repeatable, what was captured is what happened, and capture changes nothing."""

import hashlib
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from picolm.address import Address
from picolm.errors import PicoError, StoreError
from picolm.store import Run
from picolm.store.checkpoint import stored_weights_digest
from picolm.train import loop, report, run_training
from picolm.train.sample import load_model

Train = Callable[..., Run]


def digests(run: Run, step: int) -> dict[str, str]:
    """By file; plain SGD has nothing to remember and no optimizer file."""
    files = [run[step].path / name for name in ("model.safetensors", "optimizer.safetensors")]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.exists()}


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Send this process a real signal while `step` is under way."""
    original = report.step

    def and_kill(job: Any, at: int, *arguments: Any) -> None:
        original(job, at, *arguments)
        if at == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(report, "step", and_kill)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_an_interrupted_run_ends_with_the_same_bytes(
    train: Train, make_config: Any, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    options = (
        "training.max_steps=20",
        "checkpointing.save_every_n_steps=10",
        f"training.optimization.optimizer={optimizer}",
    )
    whole = train(*options, "checkpointing.run_name=whole")
    with monkeypatch.context() as patch:
        kill_at(patch, 6)
        assert run_training(make_config(*options)) == 128 + signal.SIGTERM
    partial = Run.open(whole.path.parent / "toy")
    assert partial.steps[-1] == 7
    continued = train(*options)
    assert digests(continued, 20) == digests(whole, 20)
    for step in (10, 20):
        assert continued[step].meta == whole[step].meta
    losses = [
        {entry["step"]: entry["train/loss"] for entry in run.metrics() if "train/loss" in entry}
        for run in (continued, whole)
    ]
    assert {step: losses[0][step] for step in losses[1]} == losses[1]


@pytest.mark.slow
def test_the_same_configuration_gives_the_same_bytes(train: Train) -> None:
    first, second = train("checkpointing.run_name=one"), train("checkpointing.run_name=two")
    assert [first[step].files for step in first] == [second[step].files for step in second]


@pytest.mark.slow
def test_the_stored_gradient_is_the_one_that_trained_the_model(train: Train) -> None:
    run = train(
        "checkpointing.learning_dynamics.what=[gradients]", "training.optimization.optimizer=sgd",
        "training.optimization.grad_clip_norm=null",
        "training.optimization.weight_decay=0", "training.optimization.lr=1.0", "checkpointing.save_every_n_steps=1",
        "checkpointing.learning_dynamics.layer_suffixes=[q_proj, k_proj, v_proj, o_proj, w_0, w_1, w_2, attention_norm,"
        " swiglu_norm, output_norm, embedding_proj, de_embedding_proj]",
    )  # fmt: skip
    assert len(run[0].select(kind="gradients", split="train")) == len(run[0].select(kind="weights")) == 21
    for step in range(6):
        before, after = run[step], run[step + 1]
        for address in before.select(kind="gradients", split="train"):
            weights = Address("weights", "", address.module)
            implied = (before[weights].double() - after[weights].double()) / before.meta["learning_rate"]
            rounding = 2**-23 * before[weights].abs().max().double() / before.meta["learning_rate"]
            assert (implied - before[address].double()).abs().max() <= rounding, address
            assert before[address].abs().max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["all", "[0, 3, -1]", "last", "random:5"])
def test_stored_activations_equal_a_forward_of_the_stored_weights(train: Train, positions: str) -> None:
    run = train(f"checkpointing.learning_dynamics.positions='{positions}'".replace("'[", "[").replace("]'", "]"))
    for step in run:
        checkpoint, model = run[step], load_model(run, step)
        for split in ("train", "val"):
            tokens_RS = torch.tensor(checkpoint.rows(split)["input_ids"].to_pylist())
            for address in checkpoint.select(kind="activations", split=split):
                seen: list[torch.Tensor] = []
                hook = model.get_submodule(address.module).register_forward_hook(
                    lambda m, i, out, seen=seen: seen.append(out)
                )
                for row_S in tokens_RS:  # row by row: the order is part of the claim
                    with torch.no_grad():
                        model(row_S[None, :-1])
                hook.remove()
                fresh = torch.cat(seen)
                at = checkpoint.meta["capture"]["positions"]
                if at is not None:
                    fresh = fresh[:, at[0]] if len(at) == 1 else fresh[:, at]
                assert checkpoint[address].shape == fresh.shape
                torch.testing.assert_close(checkpoint[address], fresh, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_capture_changes_no_byte_of_the_weights(train: Train) -> None:
    watched = train("checkpointing.run_name=watched", "checkpointing.learning_dynamics.positions=all")
    blind = train(
        "checkpointing.run_name=blind",
        "checkpointing.learning_dynamics.what=[]",
        "checkpointing.learning_dynamics.eval_data=null",
    )
    assert not blind[6].select(kind="activations") + blind[6].select(kind="gradients")
    assert digests(watched, 6) == digests(blind, 6)


@pytest.mark.slow
def test_accumulation_changes_rounding_only(train: Train) -> None:
    runs = [
        train(
            f"checkpointing.run_name=a{n}",
            f"training.optimization.gradient_accumulation_steps={n}",
            "training.max_steps=2",
        )
        for n in (1, 4)
    ]
    for address in runs[0][0].select(kind="gradients") + runs[0][0].select(kind="activations"):
        torch.testing.assert_close(runs[0][0][address], runs[1][0][address], atol=1e-6, rtol=1e-4)
    assert runs[0][0].rows("train").equals(runs[1][0].rows("train"))


@pytest.mark.slow
def test_the_rows_of_the_capture_are_those_of_the_batch(train: Train, toy_data: Path) -> None:
    run = train("checkpointing.learning_dynamics.max_rows=5")
    rows = run[2].rows("train")
    assert rows["row"].to_pylist() == [16, 17, 18, 19, 20]
    assert rows["source"].to_pylist() == ["even", "odd", "even", "odd", "even"]
    assert len(run[2][Address("activations", "train", "layers.1.swiglu.w_2")]) == 5


@pytest.mark.slow
def test_a_logged_step_tells_what_the_facts_ask_for(train: Train) -> None:
    entries = [entry for entry in train().metrics() if "train/loss" in entry]
    assert [entry["step"] for entry in entries] == [0, 2, 4, 6]
    first = entries[0]
    assert abs(first["train/loss"] - math.log(64)) < 0.1
    assert first["lr"] == pytest.approx(0.005)
    assert first["train/perplexity"] == pytest.approx(math.exp(first["train/loss"]))
    groups = {name.split("/")[1] for name in first if name.startswith("update_ratio/")}
    assert groups == {
        "embedding_proj",
        "attention",
        "attention_norm",
        "swiglu",
        "swiglu_norm",
        "output_norm",
        "de_embedding_proj",
    }
    assert {
        "grad_norm",
        "clip_coefficient",
        "weight_norm",
        "tokens",
        "tokens_per_s",
        "share_of_peak",
        "loss_spikes",
    } <= set(first)
    assert {f"time/{phase}_s" for phase in ("data", "forward", "backward", "update", "save")} <= set(first)
    assert entries[1]["tokens"] == 2 * 8 * 16


@pytest.mark.slow
def test_evaluation_is_by_source(train: Train) -> None:
    run = train()
    results = run.evaluation(6)
    assert results is not None
    both = [results["paloma/even/nats_per_token"], results["paloma/odd/nats_per_token"]]
    assert results["paloma/nats_per_token"] == pytest.approx(sum(both) / 2)
    assert results["paloma"] == pytest.approx(math.exp(results["paloma/nats_per_token"]))
    model, tokens_RS = load_model(run, 6), torch.tensor(run[6].rows("val")["input_ids"].to_pylist())
    logits = model(tokens_RS[:, :-1]).double()
    by_hand = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens_RS[:, 1:].flatten())
    assert results["paloma/nats_per_token"] == pytest.approx(by_hand.item(), rel=1e-5)


@pytest.mark.slow
def test_a_non_finite_gradient_skips_the_update_and_names_the_rows(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop.measure
    calls = iter(range(100))

    def poisoned(job: Any, loss: torch.Tensor) -> Any:
        gradient = original(job, loss)
        return gradient._replace(loss=math.nan, finite=False) if next(calls) == 3 else gradient

    monkeypatch.setattr(loop, "measure", poisoned)
    run = train("checkpointing.save_every_n_steps=1")
    for address in run[3].select(kind="weights"):
        assert torch.equal(run[3][address], run[4][address])
    assert run[6].meta["skipped_updates"] == 1
    assert [entry["rows"] for entry in run.metrics() if entry.get("skipped")] == [list(range(24, 32))]
    assert any(not torch.equal(run[4][a], run[5][a]) for a in run[4].select(kind="weights"))


def test_too_many_skipped_updates_stop_the_run_with_a_checkpoint(train: Train, make_config: Any) -> None:
    with pytest.raises(PicoError, match="3 updates in a row had a non-finite loss or gradient; stopped at step"):
        train(
            "training.max_steps=50", "training.max_skipped_steps=3", "training.optimization.optimizer=sgd",
            "training.optimization.lr=1e30", "training.optimization.grad_clip_norm=null", "checkpointing.save_every_n_steps=100",
        )  # fmt: skip
    run = Run.open(Path(make_config().checkpointing.runs_dir) / "toy")
    assert run.latest().meta["resumable"]
    assert run.latest().step > 0


@pytest.mark.slow
def test_a_second_process_on_the_same_run_is_refused_by_name(train: Train) -> None:
    run = train()
    with run.lock(), pytest.raises(StoreError, match=f"process {os.getpid()}"):
        train("training.max_steps=8")


@pytest.mark.slow
def test_rows_of_several_passes_are_permuted(train: Train) -> None:
    run = train(
        "training.max_steps=30", "checkpointing.save_every_n_steps=15", "monitoring.logging.log_every_n_steps=30"
    )
    numbers = [run[step].rows("train")["row"].to_pylist() for step in (0, 15, 30)]
    assert numbers[0] == list(range(8))
    assert numbers[1] != list(range(8))
    assert numbers[1] != numbers[2]
    assert all(len(set(rows)) == 8 and max(rows) < 120 for rows in numbers)


def test_a_module_that_is_not_called_is_refused(train: Train) -> None:
    with pytest.raises(PicoError, match=r"de_embedding_proj ran 0 times in 2 micro-batch.*capture only gradients"):
        train("checkpointing.learning_dynamics.layer_suffixes=[de_embedding_proj]")


@pytest.mark.slow
def test_what_is_logged_of_the_weights_is_of_those_that_the_step_has(train: Train) -> None:
    run = train("monitoring.logging.log_every_n_steps=2", "monitoring.logging.digest_every_n_steps=1")
    lines = {entry["step"]: entry for entry in run.metrics()}
    assert list(lines) == list(range(7))
    assert len({line["weights_digest"] for line in lines.values()}) == 7  # each update changes them
    for step in run:
        weights = [run[step][address].double() for address in run[step].select(kind="weights")]
        assert lines[step]["weights_digest"] == stored_weights_digest(run[step])
        assert lines[step]["weight_norm"] == pytest.approx(
            float(torch.cat([w.flatten() for w in weights]).norm()), rel=1e-6
        )


SOME = '''
from dataclasses import dataclass
import torch
from torch.nn.functional import cross_entropy
from picolm.models import Decoder, DecoderConfig, Loss
@dataclass(frozen=True)
class Config(DecoderConfig):
    model_type: str = "my_lab_some:Some"
class Some(Decoder):
    """Predicts every fourth token; nothing in a batch that begins with token NOTHING."""
    Config = Config
    def loss(self, tokens_BS, noise=None):
        nats_BT = cross_entropy(self(tokens_BS[:, :-1]).mT, tokens_BS[:, 1:], reduction="none")[:, ::4]
        predicted = nats_BT[tokens_BS[:, 0] != NOTHING]
        return Loss(predicted.sum(), torch.tensor(predicted.numel()))
'''


def some_model(folder: Path, monkeypatch: pytest.MonkeyPatch, nothing: str = "-1") -> tuple[str, ...]:
    name = f"my_lab_{hashlib.sha256(str(folder).encode()).hexdigest()}"  # a module is imported once in a process
    (folder / f"{name}.py").write_text(SOME.replace("NOTHING", nothing).replace("my_lab_some", name))
    monkeypatch.chdir(folder)
    return f"model.model_type={name}:Some", "training.optimization.grad_clip_norm=null"


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_loss_of_a_model_that_predicts_a_quarter_of_the_tokens_is_per_predicted_token(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    words = some_model(tmp_path, monkeypatch)
    run = train(*words, f"training.optimization.gradient_accumulation_steps={accumulation}")
    first = next(entry for entry in run.metrics() if "train/loss" in entry)
    assert first["train/loss"] == pytest.approx(math.log(64), rel=0.02)
    assert run.evaluation(0)["paloma/nats_per_token"] == pytest.approx(math.log(64), rel=0.02)
    assert run[0].meta["loss"] == first["train/loss"]


@pytest.mark.slow
def test_a_batch_in_which_nothing_is_predicted_makes_no_update(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = some_model(tmp_path, monkeypatch, nothing="tokens_BS[:, 0]")
    run = train(*words, "checkpointing.save_every_n_steps=1", "training.max_steps=2")
    assert "Step 0: the model predicted no token of the batch; the update is skipped (1 in a row)" in (
        capsys.readouterr().err
    )
    for address in run[0].select(kind="weights"):
        assert torch.equal(run[0][address], run[1][address])
