"""The same tensors give the same table, whoever wrote the run and wherever it is."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from tests.hub_server import FakeHub, History
from tests.picotrain import write_step
from tests.store.test_hub_run import push_step
from torch import Tensor

from picolm.address import Address
from picolm.analyze.command import analyze_runs
from picolm.analyze.table import load
from picolm.errors import StoreError
from picolm.store import Run

STEPS = (0, 1000, 2000)
CONFIG = {
    "model": {"d_model": 8, "n_layers": 2, "attention_n_heads": 4, "attention_n_kv_heads": 2},
    "training": {"fabric": {"num_nodes": 1, "num_devices": 1}},
    "checkpointing": {"learning_dynamics": {"batch_size": 8, "sequence_idx": -1}},
}
SHAPES = {"attention.v_proj": (4, 8), "attention.o_proj": (8, 8), "swiglu.w_2": (8, 12)}
IDS = torch.arange(21 * 5).reshape(21, 5)
ANALYSIS = """
metrics:
  - {metric_name: cka, target_checkpoint: last, components: [{component_name: ov_circuit, data_type: activations}]}
  - {metric_name: pwcca, target_checkpoint: last, components: [{component_name: mlp, data_type: activations}]}
  - {metric_name: per, components: [{component_name: ov_circuit, data_type: gradients}, {data_type: gradients}]}
  - {metric_name: norm, norm_type: nuclear, components: [{component_name: ov_circuit}]}
monitoring: {output_dir: OUT}
"""


def tensors(step: int) -> dict[Address, Tensor]:
    generator = torch.Generator().manual_seed(step)
    found = {}
    for name, (out, into) in ((f"layers.{i}.{n}", shape) for i in (0, 1) for n, shape in SHAPES.items()):
        found[Address("weights", "", name)] = torch.randn(out, into, generator=generator)
        for split in ("train", "val"):
            found[Address("gradients", split, name)] = torch.randn(out, into, generator=generator)
            found[Address("activations", split, name)] = torch.randn(21, out, generator=generator)
    return found


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    run = Run.create(tmp_path / "ours" / "one", CONFIG, {})
    tables = {split: {"input_ids": IDS.numpy().astype(np.int32)} for split in ("train", "val")}
    for step in STEPS:
        run.commit(step, tensors(step), meta={"capture": {"positions": [4], "val_positions": [4]}}, tables=tables)
    return run.path


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """As pico-train writes it on one device: pickled, with prefixed names and scrambled activations."""
    folder = tmp_path / "theirs" / "one"
    folder.mkdir(parents=True)
    (folder / "training_config.yaml").write_text(yaml.safe_dump(CONFIG))
    for step in STEPS:
        place = folder / "checkpoints" / f"step_{step}"
        write_step(place, tensors(step), tables={"train": IDS, "val": IDS})
    return folder


def table_of(place: str, folder: Path) -> pd.DataFrame:
    folder.mkdir()
    (folder / "analysis.yaml").write_text(ANALYSIS.replace("OUT", str(folder)))
    analyze_runs(folder / "analysis.yaml", [], [place])
    return load(folder / "analysis")


@pytest.mark.slow
def test_a_run_of_pico_train_gives_the_table_of_the_same_tensors_in_our_layout(
    ours: Path, theirs: Path, tmp_path: Path
) -> None:
    first, second = table_of(str(ours), tmp_path / "a"), table_of(str(theirs), tmp_path / "b")
    assert len(first) == 3 * (8 + 2 + 8 + 6 + 8)
    assert first["value"].notna().all()
    pd.testing.assert_frame_equal(first, second)


@pytest.mark.slow
def test_a_run_on_the_hub_gives_the_table_of_the_one_on_disk(theirs: Path, tmp_path: Path) -> None:
    history = History()
    history.commit(
        "one",
        "Saving Training Config -- Step 0",
        {"training_config.yaml": (theirs / "training_config.yaml").read_bytes()},
    )
    for step in STEPS:
        push_step(history, "one", step, theirs / f"checkpoints/step_{step}")
    (tmp_path / "hub.yaml").write_text(ANALYSIS.replace("OUT", str(tmp_path / "there")))
    pico = [sys.executable, "-c", "from picolm.cli import main; main()", "analyze", str(tmp_path / "hub.yaml")]
    with FakeHub({"models/lab/run": history}).serving() as server:
        environment = {
            **os.environ,
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
        }
        environment["PICO_CACHE"] = str(tmp_path / "cache")

        def analyze(*words: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run([*pico, *words], env=environment, capture_output=True, text=True, timeout=200)

        done = analyze("--repo_id", "lab/run", "--branch", "one")
        assert done.returncode == 0, done.stderr
        asked = {path for verb, path, _ in server.log if verb == "GET" and "/resolve/" in path}
        assert not [path for path in asked if "checkpoint.pt" in path or "tokenizer" in path]
        missing = analyze("--repo_id", "lab/nothing", "--branch", "one")
    assert missing.returncode == 1
    assert "lab/nothing" in missing.stderr
    assert "Traceback" not in missing.stderr
    pd.testing.assert_frame_equal(table_of(str(theirs), tmp_path / "here"), load(tmp_path / "there" / "analysis"))


def test_a_pickle_with_code_in_it_is_refused_and_nothing_is_written(theirs: Path, tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, ("touch " + str(tmp_path / "harm"),)

    torch.save({"layers.0.swiglu.w_2": Harm()}, theirs / "checkpoints/step_1000/learning_dynamics/val_activations.pt")
    with pytest.raises(StoreError, match=r"val_activations.pt"):
        table_of(str(theirs), tmp_path / "a")
    assert not (tmp_path / "harm").exists()
    assert not (tmp_path / "a" / "analysis" / "results.parquet").exists()


def test_a_damaged_checkpoint_is_named_and_nothing_is_written(ours: Path, tmp_path: Path) -> None:
    file = ours / "checkpoints/step_1000/learning_dynamics/val_activations.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)
    with pytest.raises(StoreError, match=r"step_1000.*val_activations.safetensors"):
        table_of(str(ours), tmp_path / "a")
    assert not (tmp_path / "a" / "analysis" / "results.parquet").exists()


def test_a_run_without_a_checkpoint_is_told(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "empty", CONFIG, {})
    with pytest.raises(Exception, match="holds no checkpoint yet"):
        table_of(str(run.path), tmp_path / "a")
