"""The preview says what a run will be, without data, device or a file; and the run then is it."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import Tensor

from picolm.models import Decoder
from picolm.store import Run
from picolm.store.listing import contents
from picolm.train.preview import preview

PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


def sizes(text: str) -> dict[str, float]:
    """The bytes of the line `disk`, by kind."""
    line = next(line for line in text.splitlines() if line.startswith("disk")).removeprefix("disk")
    found = re.findall(r"([a-z][a-z ]*?)(?: about)? ([\d.e+]+) (B|kB|MB|GB|TB)", line)
    return {name.strip(): float(number) * UNITS[unit] for name, number, unit in found}


def memory_of(text: str) -> float:
    """The bytes of the line `memory`."""
    number, unit = re.findall(r"memory +about ([\d.]+) (\w+) per (?:process|device)", text)[0]
    return float(number) * UNITS[unit]


def test_the_figures_of_a_run(make_config: Callable[..., Any]) -> None:
    text = preview(make_config("training.max_steps=10", "checkpointing.save_every_n_steps=4"))
    embeddings, blocks, norm = 2 * 64 * 24, 2 * (24 * 24 * 2 + 24 * 12 * 2 + 3 * 24 * 48 + 2 * 24), 24
    for line in (
        f"parameters       {embeddings + blocks + norm:,} ({blocks + norm:,} without embeddings)",
        "tokens per step  128",
        "tokens in all    1,280 in 10 steps",
        "saved steps      4: 0, 4, 8, 10",
    ):
        assert line in text.splitlines()
    flops = 6 * (blocks + norm + 64 * 24 - 5 * 24 + 2 * 24 * 17)  # matrices and the output, and (16 + 1) / 2 keys twice
    assert f"{flops:,} FLOP per token, {flops * 1280:.3g} FLOP in all" in text


def test_the_configuration_is_shown_resolved(make_config: Callable[..., Any]) -> None:
    text = preview(make_config("training.fabric.precision=auto", "training.fabric.accelerator=auto"))
    shown = yaml.safe_load(text.split("\n\n")[0])
    assert shown["training"]["fabric"]["precision"] in ("bf16-mixed", "32-true")
    assert shown["training"]["fabric"]["accelerator"] in ("cpu", "cuda", "mps")
    assert shown["training"]["optimization"]["betas"] == [0.9, 0.999]
    assert shown["model"]["position_emb_theta"] == 10000.0


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("training.fabric.precision=bf16-mixed", "checkpointing.learning_dynamics.max_rows=5"),
        ("training.fabric.precision=64-true", "training.optimization.optimizer=muon"),
        ("training.optimization.optimizer=sgd", "checkpointing.learning_dynamics.positions=all"),
        ("training.optimization.optimizer=sgd", "training.optimization.momentum=0.9", "checkpointing.save_optimizer=last",
         "checkpointing.save_weights=4", "checkpointing.save_schedule=log"),
        ("checkpointing.learning_dynamics.layer_suffixes=[embedding_proj, attention, swiglu_norm, layers.1, w_0]",
         "checkpointing.learning_dynamics.positions=random:3", "training.fabric.precision=bf16-mixed"),
        ("checkpointing.learning_dynamics.dtype=float16", "checkpointing.learning_dynamics.eval_data=null",
         "checkpointing.learning_dynamics.layers=[1]"),
        ("checkpointing.learning_dynamics.what=[gradients]", "checkpointing.save_learning_dynamics=4"),
    ],
)  # fmt: skip
def test_the_bytes_that_are_foretold_are_those_of_the_tensors_of_the_run(
    make_config: Callable[..., Any], train: Callable[..., Run], overrides: tuple[str, ...]
) -> None:
    overrides = ("evaluation.metrics=null", "training.max_steps=4", *overrides)
    foretold = sizes(preview(make_config(*overrides)))
    run = train(*overrides)
    written = dict.fromkeys(("weights", "optimizer", "learning dynamics"), 0)
    for step in run:
        for address, record in run[step].manifest.tensors.items():
            written[
                "learning dynamics" if address.split else "weights" if address.kind == "weights" else "optimizer"
            ] += record.bytes
    assert foretold.pop("in all") == pytest.approx(sum(entry.minimum_bytes for entry in contents(run)), rel=0.01)
    assert foretold == pytest.approx(written, rel=0.01)


@pytest.mark.slow
def test_nothing_is_needed_and_nothing_is_made(make_config: Callable[..., Any], tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    text = preview(
        make_config("data.dataset.name=/nowhere/yet", "training.fabric.accelerator=cuda", "training.fabric.num_devices=4",
                    "model.d_model=24576", "model.n_layers=12", "model.activation_hidden_dim=98304",
                    "checkpointing.learning_dynamics.eval_data=somebody/rows")
    )  # fmt: skip
    assert sizes(text)["weights"] > 1e11
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_more_rows_at_once_take_more_memory(make_config: Callable[..., Any]) -> None:
    def memory(accumulation: int) -> float:
        accumulated = f"training.optimization.gradient_accumulation_steps={accumulation}"
        return memory_of(preview(make_config(accumulated, *words)))

    words = ("checkpointing.learning_dynamics.eval_data=null", "training.fabric.accelerator=cuda")

    assert memory(1) > memory(2) > memory(8)
    parameters = 2 * 64 * 24 + 2 * (24 * 24 * 2 + 24 * 12 * 2 + 3 * 24 * 48 + 2 * 24) + 24
    assert memory(8) > 7 * 4 * parameters  # weights, gradients, two moments, and the snapshot of all but the gradients
    accumulated = ("training.optimization.gradient_accumulation_steps=8", "training.fabric.accelerator=cuda")
    assert memory_of(preview(make_config(*accumulated))) > memory(8)  # eight held-out rows are captured at once


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux counts it")
@pytest.mark.parametrize("architecture", ["", "statespace-", "diffusion-"])
def test_the_memory_that_is_foretold_is_the_peak_of_the_training(architecture: str, tmp_path: Path) -> None:
    words = [
        f"pico-{architecture}nano-1m", "training.fabric.precision=32-true", "training.fabric.accelerator=cpu",
        "training.max_steps=2", "data.dataloader.batch_size=96", "training.optimization.gradient_accumulation_steps=1",
        "checkpointing.save_every_n_steps=2", "evaluation.metrics=[]",
    ]  # fmt: skip
    command = [sys.executable, "-m", "picolm", "train", *words]
    told = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, cwd=tmp_path, check=True).stdout
    measured = subprocess.run(
        [sys.executable, "-c", PEAK, *command], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert memory_of(told) == pytest.approx(1024 * int(measured.stdout.split()[-1]), rel=0.15)


@pytest.mark.slow
def test_a_loss_whose_shapes_depend_on_values_has_a_lower_bound(
    make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = Decoder.loss

    def chosen(self: Decoder, tokens_BS: Tensor, noise: object) -> Any:
        return usual(self, tokens_BS[tokens_BS.nonzero()[:, 0]], noise)

    monkeypatch.setattr(Decoder, "loss", chosen)
    text = preview(make_config())
    assert re.search(r"^memory +more than [\d.]+ kB: what a pass takes depends on values$", text, re.MULTILINE), text
