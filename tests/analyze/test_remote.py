"""What an analysis asks of other machines: the files it needs of a run on the Hub and no more, and Weights & Biases."""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.hub_server import FakeHub, History, clients_of
from tests.picotrain import push_step, write_step

from picolm.address import Address
from picolm.analyze.command import analyze_runs
from picolm.analyze.config import AnalysisConfig
from picolm.analyze.engine import analyze
from picolm.analyze.work import Outcome
from picolm.schema import load
from picolm.store import Run
from picolm.store.hub import open_branch
from picolm.store.repository import Branch

MODEL = {"d_model": 8, "n_layers": 2, "attention_n_heads": 4, "attention_n_kv_heads": 2}
STEPS = range(0, 125_000, 1000)


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> History:
    """A branch `long` of 125 steps, each with weights, both captures of both splits, and a state."""
    folder = tmp_path_factory.mktemp("step")
    config = {"model": MODEL, "training": {"fabric": {"num_nodes": 1, "num_devices": 1}}}
    history = History()
    history.commit(
        "long", "Saving Training Config -- Step 0", {"training_config.yaml": yaml.safe_dump(config).encode()}
    )
    shapes = {f"layers.{layer}.swiglu.w_2": (8, 12) for layer in (0, 1)}
    captured = [
        ("weights", ""),
        *((kind, split) for kind in ("activations", "gradients") for split in ("train", "val")),
    ]
    for step in STEPS:
        generator = torch.Generator().manual_seed(step)
        tensors = {
            Address(*kind, name): torch.randn(shape, generator=generator)
            for kind in captured
            for name, shape in shapes.items()
        }
        push_step(history, "long", step, write_step(folder, tensors))
    return history


@pytest.fixture
def hub(history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub({"models/lab/run": history}).serving() as server, clients_of(monkeypatch, tmp_path):
        branch = Branch("lab/run", "long", server.url)
        monkeypatch.setattr(Run, "open", lambda place: open_branch(branch) if place == "hub:lab/run@long" else None)
        yield server


def analysis(folder: Path, text: str, progress: Callable[[int, int], None] = lambda done, total: None) -> Outcome:
    (folder / "a.yaml").write_text(f"{text}\nmonitoring: {{output_dir: {folder}/results}}\n")
    return analyze(load(folder / "a.yaml", AnalysisConfig), ["hub:lab/run@long"], progress=progress)


GRADIENTS = "metrics: [{metric_name: hoyer, components: [{data_type: gradients, layer_suffixes: swiglu.w_2}]}]"


def fetched(hub: FakeHub) -> Counter[str]:
    return Counter(path.rsplit("/", 1)[1] for verb, path, _ in hub.log if verb == "GET" and "/resolve/" in path)


@pytest.mark.slow
def test_of_125_steps_on_the_hub_only_the_files_that_are_needed_are_fetched_and_once(
    hub: FakeHub, tmp_path: Path
) -> None:
    assert analysis(tmp_path, f"steps: {{start: 0, end: 100000, step: 50000}}\n{GRADIENTS}").computed == 2 * 3
    assert fetched(hub) == {"train_gradients.pt": 3, "training_config.yaml": 1}
    assert analysis(tmp_path, GRADIENTS).computed == 2 * (125 - 3)
    assert fetched(hub) == {"train_gradients.pt": 125, "training_config.yaml": 1}
    asked = len(hub.log)
    assert analysis(tmp_path, GRADIENTS).computed == 0
    assert len(hub.log) - asked < 20, "the third time it is only asked which steps there are"


@pytest.mark.slow
def test_the_bar_counts_the_steps_that_are_fetched_and_then_those_that_are_analyzed(
    hub: FakeHub, tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    analysis(tmp_path, f"steps: [0, 1000, 2000, 3000]\n{GRADIENTS}", lambda *counts: seen.append(counts))
    assert seen == 2 * [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.slow
def test_weights_and_biases_gets_the_values_by_step(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "analysis.yaml").write_text(
        f"{GRADIENTS}\nmonitoring: {{save_to_wandb: true, output_dir: {tmp_path}/results}}"
    )
    outcome = analyze_runs(tmp_path / "analysis.yaml", [], [str(runs["narrow"])])
    assert outcome is not None
    (written,) = (tmp_path / "results" / "analysis" / "wandb").glob("offline-run-*/*.wandb")
    assert len(outcome.rows) == 2 * 4
    deadline = time.monotonic() + 30  # the file is written by a process of its own
    while missing := [row for row in outcome.rows if not _is_in(written.read_bytes(), row)]:
        assert time.monotonic() < deadline, missing
        time.sleep(0.1)


def _is_in(stored: bytes, row: dict[str, Any]) -> bool:
    """Whether records of plain text hold the value of a row under its name."""
    name, value = re.escape(f"hoyer_train/{row['module']}.{row['kind']}"), re.escape(str(row["value"]))
    return bool(re.search(name + ".{1,8}" + value, stored.decode("latin-1"), re.S))
