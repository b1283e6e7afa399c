"""A compiled run is the eager one up to rounding; capture still changes nothing, and what it says still holds."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from picolm.address import Address
from picolm.store import Run
from picolm.train.sample import load_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="compiling for a CPU needs a C++ compiler"
    ),
]

Train = Callable[..., Run]
BLIND = ("checkpointing.learning_dynamics.what=[]", "checkpointing.learning_dynamics.eval_data=null")
EVERYWHERE = (
    "checkpointing.learning_dynamics.layer_suffixes=[embedding_proj, attention, v_proj, swiglu_norm, w_0, layers.1]"
)


@pytest.fixture
def compiled(make_config: Any, tmp_path: Path) -> Train:
    """A function from a name and overrides to the finished run of a process that compiles for itself."""
    make_config()  # writes the file

    def run(name: str, *overrides: str) -> Run:
        command = [sys.executable, "-c", "from picolm.cli import main; main()", "train", f"{tmp_path}/toy.yaml"]
        done = subprocess.run(
            [*command, "training.compile=true", f"checkpointing.run_name={name}", *overrides],
            capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return Run.open(tmp_path / "runs" / name)

    return run


def losses(run: Run) -> list[float]:
    return [entry["train/loss"] for entry in run.metrics() if "train/loss" in entry]


def digests(run: Run, step: int) -> list[str]:
    files = [run[step].path / name for name in ("model.safetensors", "optimizer.safetensors")]
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-5), ("bf16-mixed", 5e-3)])
def test_compiling_changes_rounding_and_capture_changes_nothing(
    train: Train, compiled: Train, precision: str, tolerance: float
) -> None:
    precise = f"training.fabric.precision={precision}"
    eager = train(precise, "checkpointing.run_name=eager")
    watched, blind = compiled("watched", precise, EVERYWHERE), compiled("blind", precise, *BLIND)
    assert losses(watched) == pytest.approx(losses(eager), abs=tolerance)
    assert losses(watched) != losses(eager)  # or it was not compiled
    assert len(watched[6].select(kind="activations")) == 2 * 10
    for step in (2, 4, 6):
        assert digests(watched, step) == digests(blind, step)


def test_what_is_stored_is_what_happened(compiled: Train) -> None:
    run = compiled(
        "run", "training.optimization.optimizer=sgd", "training.optimization.grad_clip_norm=null", EVERYWHERE,
        "training.optimization.weight_decay=0", "training.optimization.lr=1.0", "checkpointing.save_every_n_steps=1",
    )  # fmt: skip
    for step in range(6):
        before, after = run[step], run[step + 1]
        for address in before.select(kind="gradients", split="train"):
            weights = Address("weights", "", address.module)
            implied = (before[weights].double() - after[weights].double()) / before.meta["learning_rate"]
            rounding = 2**-23 * before[weights].abs().max().double() / before.meta["learning_rate"]
            assert (implied - before[address].double()).abs().max() <= rounding, address
        model = load_model(run, step)
        for split in ("train", "val"):
            check_forward_and_backward(run, step, split, model)


def check_forward_and_backward(run: Run, step: int, split: str, model: Any) -> None:
    """Activations and gradients of a step against a plain pass of its weights over its rows."""
    tokens_RS = torch.tensor(run[step].rows(split)["input_ids"].to_pylist())
    activations = run[step].select(kind="activations", split=split)
    seen: dict[Address, torch.Tensor] = {}
    hooks = [
        model.get_submodule(address.module).register_forward_hook(
            lambda m, i, out, at=address: seen.update({at: out[:, -1]})
        )
        for address in activations
    ]
    model.zero_grad()
    loss = model.loss(tokens_RS)
    (loss.nats / loss.tokens).backward()
    for hook in hooks:
        hook.remove()
    for address in activations:
        torch.testing.assert_close(run[step][address], seen[address], atol=1e-5, rtol=1e-5)
    for address in run[step].select(kind="gradients", split=split):
        gradient = model.get_parameter(f"{address.module}.weight").grad
        torch.testing.assert_close(run[step][address], gradient, atol=1e-6, rtol=1e-4)


def test_a_compiled_run_goes_on_with_the_same_bytes(compiled: Train) -> None:
    options = ("training.optimization.lr_scheduler=constant", "training.optimization.optimizer=muon")
    whole = compiled("whole", *options)
    compiled("parts", *options, "training.max_steps=4")
    assert digests(compiled("parts", *options), 6) == digests(whole, 6)
