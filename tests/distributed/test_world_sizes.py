"""The same configuration gives the same run on 1, 2 and 3 processes, to the rounding of float32, and can change between them."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from picolm.store import Run
from picolm.train.sample import load_model
from picolm.train.state import State

from .conftest import PICO, torchrun
from .lab import Some, SomeConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FILES = ("model.safetensors", "optimizer.safetensors")
# Relative to the norm of a tensor. Sums over rows are taken in another order; Adam divides small numbers by small numbers.
LOOSEST = {"activations": 1e-4, "gradients": 1e-3, "weights": 1e-4, "exp_avg": 1e-3, "exp_avg_sq": 1e-3}
# The gradients of the two held-out rows, of random tokens, amplify the rounding of 25 updates: they differ by 2e-4 in float32,
# and by 2e-13 with `training.fabric.precision=64-true`.
FIRST = 1e-5  # before any update
PER_PROCESS = ("time/", "tokens_per_s", "flops_per_s", "share_of_peak", "noise_scale", "weights_digest")


def logged(run: Run) -> dict[int, dict[str, Any]]:
    entries = [entry for entry in run.metrics() if "train/loss" in entry]
    steps = [entry["step"] for entry in entries]
    assert steps == sorted(set(steps))  # each step is logged once, whatever the number of processes
    return dict(zip(steps, entries))


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    assert one.dtype == other.dtype
    return float((one.double() - other.double()).norm() / one.double().norm().clamp_min(1e-30))


def check_same_numbers(run: Run, other: Run) -> None:
    """Every logged number of every step, but those that tell of the machine."""
    entries, others = logged(run), logged(other)
    assert list(entries) == list(others) == list(range(51))
    for step, entry in entries.items():
        assert {key for key in entry if key != "noise_scale"} == {key for key in others[step] if key != "noise_scale"}
        for key, value in entry.items():
            if isinstance(value, float) and not key.startswith(PER_PROCESS):
                assert others[step][key] == pytest.approx(value, rel=1e-5 if key == "train/loss" else 1e-4), (step, key)
    assert "train/bits_per_byte" in entries[0]
    assert entries[0]["train/bits_per_byte"] != pytest.approx(entries[0]["train/loss"], rel=0.1)
    assert min(entry["clip_coefficient"] for entry in entries.values()) < 0.9
    assert other.evaluation(50) == pytest.approx(run.evaluation(50), rel=1e-5)


def check_same_checkpoints(run: Run, other: Run, steps: tuple[int, ...]) -> None:
    """The same files and tensors; the same rows in the same order; activations and gradients equal to rounding."""
    for step in steps:
        there, here = run[step], other[step]
        assert set(there.files) == set(here.files)
        assert list(there) == list(here)
        assert {address.split for address in there.select(kind="activations")} == {"train", "val"}
        for split, count in (("train", 12), ("val", 2)):
            assert there.rows(split).equals(here.rows(split))
            for address in there.select(kind="activations", split=split):
                assert there[address].shape[:2] == (count, 3)
                per_row = (there[address] - here[address]).flatten(1).norm(dim=1) / there[address].flatten(1).norm(
                    dim=1
                )
                assert per_row.max() < 1e-3, address  # each row in its place
        for address in there:
            loosest = LOOSEST.get(address.kind, 1e-3) if step else FIRST
            assert difference(there[address], here[address]) < loosest, address
        assert here.meta["capture"] == there.meta["capture"]


def test_one_configuration_on_one_two_and_three_processes(
    launch: Any, open_run: Any, environment: dict[str, str]
) -> None:
    one, three = launch("one"), launch("three", 3, "training.fabric.strategy=ddp")
    two = launch("two", 2, "training.fabric.strategy=fsdp2", launcher=torchrun(2))
    for done in (one, two, three):
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("step 7/50 ") == 1  # only the first process speaks
        assert done.stderr.count("Trained 50 steps") == 1
        assert done.stdout == ""
    base = open_run("one")
    for name in ("two", "three"):
        other = open_run(name)
        check_same_numbers(base, other)
        check_same_checkpoints(base, other, (0, 25, 50))
        assert (other.path / "logs" / "train.log").read_text().count("step 7/50 ") == 1
        for address in base[0].select(kind="weights"):
            assert torch.equal(base[0][address], other[0][address])
    check_stopped_and_continued(launch, open_run, "two", 2, "training.fabric.strategy=fsdp2")
    command = [*PICO, "replay", str(open_run("two").path), "--step", "27", "--verify"]
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert (again.stdout + again.stderr).count("Identical: the weights have the recorded digest") == 1


def check_stopped_and_continued(launch: Any, open_run: Any, whole: str, processes: int, *words: str) -> None:
    """SIGTERM at one process stops all at one step; as many processes, however started, go on to the same bytes."""
    options = (*words, "data.dataset.name=lab:source")
    stopped = launch("again", processes, *options, HOW="SIGTERM", BAD_RANK="1")
    assert stopped.returncode == 128 + 15, stopped.stderr
    assert stopped.stderr.count("SIGTERM at another process: finishing this step and saving.") == 1
    assert "to go on: give the same command again" in stopped.stderr.lower()
    partial = open_run("again")
    assert 0 < partial.steps[-1] < 25
    assert partial[partial.steps[-1]].meta["resumable"]
    continued = launch("again", processes, *options, HOW="nothing", BAD_RANK="-1")
    assert continued.returncode == 0, continued.stderr
    for name in FILES:
        assert open_run("again")[50].files[name] == open_run(whole)[50].files[name]


def test_a_run_moves_between_numbers_of_processes(launch: Any, open_run: Any) -> None:
    """With Muon, whose update needs whole matrices, and a model that is noisy: the noise belongs to the rows."""
    words = ("training.optimization.optimizer=muon", "model.model_type=lab:Noisy", "checkpointing.save_every_n_steps=6")
    whole = launch("whole", 1, *words, "training.max_steps=18", "training.optimization.gradient_accumulation_steps=1")
    assert whole.returncode == 0, whole.stderr
    for processes, strategy, until in ((2, "ddp", 6), (3, "model_parallel", 12), (1, "auto", 18)):
        done = launch("moved", processes, *words, f"training.fabric.strategy={strategy}", f"training.max_steps={until}")
        assert done.returncode == 0, done.stderr
    base, moved = open_run("whole"), open_run("moved")
    assert list(base.steps) == list(moved.steps) == [0, 6, 12, 18]
    for step in base.steps:
        assert list(base[step]) == list(moved[step])
        for address in base[step].select(kind="weights") + base[step].select(kind="momentum_buffer"):
            assert difference(base[step][address], moved[step][address]) < 1e-3, (step, address)
    losses = {entry["step"]: entry["train/loss"] for entry in base.metrics() if "train/loss" in entry}
    for entry in moved.metrics():
        if "train/loss" in entry:
            assert entry["train/loss"] == pytest.approx(losses[entry["step"]], rel=1e-5)


def test_a_state_space_model_is_the_same_on_one_process_and_three(config: Path, launch: Any, open_run: Any) -> None:
    """In float64: 50 updates of a model that no longer fits its few held-out rows amplify the rounding of float32 to 1e-3."""
    shape = "model: {model_type: pico_statespace, d_model: 20, n_layers: 2, state_size: 6, head_dim: 10,"
    text = re.sub(r"model: {d_model.*\n", shape + "\n", config.read_text())
    config.write_text(text.replace("attention_norm, v_proj, w_2]", "ssm_norm, ssm.value, ssm]"))
    for name, processes in (("one", 1), ("three", 3)):
        strategy = "ddp" if processes > 1 else "auto"
        done = launch(name, processes, f"training.fabric.strategy={strategy}", "training.fabric.precision=64-true")
        assert done.returncode == 0, done.stderr
    check_same_numbers(open_run("one"), open_run("three"))
    check_same_checkpoints(open_run("one"), open_run("three"), (0, 25, 50))


def test_masked_diffusion_hides_the_same_tokens_on_any_number_of_processes(launch: Any, open_run: Any) -> None:
    """The numbers of hidden tokens are spread over the rows of all processes together."""
    words = ("model.model_type=pico_diffusion", "training.max_steps=12", "checkpointing.save_every_n_steps=6")
    whole = launch("whole", 1, *words)
    one = launch("one", 1, *words, "training.optimization.gradient_accumulation_steps=1")
    three = launch("three", 3, *words, "training.fabric.strategy=ddp")
    two = launch("two", 2, *words, "training.fabric.strategy=fsdp2")
    for done in (whole, one, three, two):
        assert done.returncode == 0, done.stderr
    base = open_run("whole")
    for name in ("one", "three", "two"):
        other = open_run(name)
        assert list(base.steps) == list(other.steps) == [0, 6, 12]
        for step in base.steps:
            assert list(base[step]) == list(other[step])
            for address in base[step]:
                loosest = LOOSEST.get(address.kind, 1e-3) if step else FIRST
                assert difference(base[step][address], other[step][address]) < loosest, (name, step, address)
        assert other.evaluation(12) == pytest.approx(base.evaluation(12), rel=1e-5)
    assert "paloma_bound/bound_nats_per_token" in (base.evaluation(12) or {})


def test_losses_are_normalised_by_the_tokens_that_all_processes_predict(launch: Any, open_run: Any) -> None:
    """The counts differ by micro-batch and process; a micro-batch of one row may predict nothing."""
    words = ("model.model_type=lab:Some", "training.max_steps=4", "training.optimization.grad_clip_norm=null",
             "checkpointing.learning_dynamics.layer_suffixes=[v_proj, w_2]", "checkpointing.save_every_n_steps=2")  # fmt: skip
    for name, processes, strategy, accumulation in (
        ("one", 1, "auto", 1), ("twelve", 1, "auto", 12), ("two", 2, "ddp", 1), ("shards", 2, "fsdp2", 6),
    ):  # fmt: skip
        more = (f"training.fabric.strategy={strategy}",
                f"training.optimization.gradient_accumulation_steps={accumulation}")  # fmt: skip
        done = launch(name, processes, *words, *more)
        assert done.returncode == 0, done.stderr
    base = open_run("one")
    tokens_RS = torch.tensor(base[0].rows("train")["input_ids"].to_pylist())
    model = Some(SomeConfig(d_model=20, n_layers=2, attention_n_heads=2, attention_n_kv_heads=1, vocab_size=300,
                            activation_hidden_dim=40, max_seq_len=16))  # fmt: skip
    State(model, []).restore_weights(base[0])
    nats, tokens = model.loss(tokens_RS)
    counts = [model.loss(row_S[None]).tokens for row_S in tokens_RS]
    assert 0 in counts
    assert len(set(counts)) > 2
    assert 0 < tokens == sum(counts) < tokens_RS[:, 1:].numel()
    (nats / tokens).backward()
    for name in ("one", "twelve", "two", "shards"):
        run = open_run(name)
        first = logged(run)[0]
        assert first["train/loss"] == pytest.approx(float(nats.detach()) / tokens, rel=1e-5)
        for address in run[0].select(kind="gradients", split="train"):
            true = model.get_parameter(f"{address.module}.weight").grad
            assert difference(true, run[0][address]) < 1e-4, (name, address)
        assert run.evaluation(4) == pytest.approx(base.evaluation(4), rel=1e-4)
        assert "train/bits_per_byte" not in first


def test_the_noise_scale_of_two_processes_without_accumulation(launch: Any, open_run: Any) -> None:
    """Each process's own gradient, before the averaging, is the small batch."""
    words = ("training.max_steps=0", "training.optimization.gradient_accumulation_steps=1")
    done = launch("two", 2, "training.fabric.strategy=ddp", *words)
    assert done.returncode == 0, done.stderr
    run = open_run("two")
    tokens_RS = torch.tensor(run[0].rows("train")["input_ids"].to_pylist())
    model = load_model(run, 0)
    squares = []
    for rows_RS in (tokens_RS, tokens_RS[0::2], tokens_RS[1::2]):
        model.zero_grad()
        nats, tokens = model.loss(rows_RS)
        (nats / tokens).backward()
        squares.append(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
    large, small = squares[0], (squares[1] + squares[2]) / 2
    line = logged(run)[0]
    assert line["noise_scale/S"] == pytest.approx((small - large) / (1 / 6 - 1 / 12), rel=1e-3)
    assert line["noise_scale/G2"] == pytest.approx((12 * large - 6 * small) / 6, rel=1e-3)
    sharded = launch("shards", 2, "training.fabric.strategy=fsdp2", *words)
    assert sharded.returncode == 0, sharded.stderr
    assert sharded.stderr.count("No noise_scale: a sharded model (fsdp2) averages its gradients") == 1
