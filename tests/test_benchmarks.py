"""Every benchmark runs, at the smallest size there is: a script that nobody runs is soon one that does not run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SMALLEST = {  # script: (its arguments, what it prints then)
    "analyze": (["--shapes", "tiny", "--rows", "16", "--steps", "2"], "calls of algebra alone"),
    "corpora": (["--megabytes", "1", "--times", "2"], "| 4 workers | 2 |"),
    "crashes": (["--kills", "2"], "torn"),
    "observe": (
        ["--width", "64", "--layers", "2", "--checkpoints", "2", "--rows", "2", "--length", "16", "--analyze", "64x2"],
        "ours / plain",
    ),
    "nanogpt": (["--precisions", "float32", "--rounds", "2"], "| plain GPT |"),
    "probes": (
        [
            "--width",
            "64",
            "--layers",
            "2",
            "--vocabulary",
            "256",
            "--length",
            "16",
            "--rows",
            "4",
            "--checkpoints",
            "2",
            "--draws",
            "2",
        ],
        "| pico |",
    ),
    "probes_hessian": (
        ["--width", "16", "--layers", "1", "--vocabulary", "32", "--rows", "2", "--length", "8"],
        "| ours |",
    ),
    "reading": ([], "files have functions that are called"),
    "recorder": (["--steps", "2", "--width", "16", "--layers", "1", "--turns", "1"], "with / without"),
    "report": (["--values", "2000"], "toggle"),
    "safeguards": (["--rounds", "1", "--every", "1"], "no digests"),
    "step_time": (["--shapes", "tiny", "--precisions", "float32", "--modes", "eager", "--rounds", "1"], "| llama |"),
    "trainer": (["--steps", "2"], "trainer / bare"),
    "view": (
        [
            "data.tokenizer.vocab_size=512",
            "model.vocab_size=512",
            "model.max_seq_len=80",
            "data.dataloader.batch_size=2",
            "model.d_model=24",
            "model.activation_hidden_dim=48",
            "model.n_layers=1",
            "checkpointing.save_every_n_steps=2",
            "training.optimization.gradient_accumulation_steps=1",
            "evaluation.metrics=null",
            "--steps",
            "3",
            "--training",
            "40",
            "--rounds",
            "1",
        ],
        "with / without",
    ),
    "uploads": (["--rounds", "1", "--every", "1"], "saved and sent"),
}


def test_each_benchmark_is_listed_here() -> None:
    assert {script.stem for script in BENCHMARKS.glob("*.py")} == set(SMALLEST)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", SMALLEST)
def test_a_benchmark_prints_its_figures(name: str, tmp_path: Path) -> None:
    if name in ("report", "view") and not shutil.which("chromedriver"):
        pytest.skip("there is no Chromium here (make browser)")
    arguments, expected = SMALLEST[name]
    # As a command in this process may have set it; benchmarks import each other from their folder.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    script = subprocess.run(
        [sys.executable, BENCHMARKS / f"{name}.py", *arguments],
        capture_output=True, text=True, cwd=tmp_path, env=environment | {"GOMP_SPINCOUNT": "10000"},
    )  # fmt: skip
    assert script.returncode == 0, script.stderr
    assert expected in script.stdout


@pytest.mark.slow
def test_each_peer_of_masked_diffusion_is_measured() -> None:
    """Its parameters are compared with ours, in the sizes that are reported."""
    command = [sys.executable, str(BENCHMARKS / "step_time.py"), "--memory", "modernbert", "tiny", "float32"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) > 100  # MiB
