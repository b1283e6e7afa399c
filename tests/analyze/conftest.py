"""Tiny trained runs that the tests of the analysis share: two widths and two seeds, on the same rows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from picolm.analyze.command import analyze_runs
from picolm.analyze.table import load

LAYERS = "[v_proj, o_proj, q_proj, k_proj, w_2, embedding_proj]"


@pytest.fixture(scope="session")
def runs(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of runs by name: `narrow`, `wide` (another width), `other` (narrow with another seed)."""
    from picolm.schema import load as load_config
    from picolm.train import run_training
    from picolm.train.config import schema_for

    folder = tmp_path_factory.mktemp("runs")
    for name, width, seed in (("narrow", 24, 42), ("wide", 48, 42), ("other", 24, 43)):
        (folder / "c.yaml").write_text(f"""
data: {{dataset: {{name: {toy_data}}}, dataloader: {{batch_size: 8}}, tokenizer: {{vocab_size: 64}}}}
model: {{d_model: {width}, n_layers: 2, attention_n_heads: 4, attention_n_kv_heads: 2, activation_hidden_dim: 48,
  vocab_size: 64, max_seq_len: 16}}
training: {{max_steps: 6, seeds: {{init: {seed}}}, fabric: {{accelerator: cpu, precision: 32-true}},
  optimization: {{lr: 0.01, lr_warmup_steps: 2, gradient_accumulation_steps: 1}}}}
checkpointing: {{run_name: {name}, runs_dir: {folder}, save_every_n_steps: 2,
  learning_dynamics: {{layer_suffixes: {LAYERS}, positions: [3, 9, 15]}}}}
monitoring: {{logging: {{log_level: ERROR}}}}
""")
        run_training(load_config(folder / "c.yaml", schema_for))
    return {name: folder / name for name in ("narrow", "wide", "other")}


@pytest.fixture
def analyze(runs: dict[str, Path], tmp_path: Path) -> Callable[..., Any]:
    """A function from YAML text and names of runs to (outcome, data frame)."""

    def run(text: str, *names: str, **options: Any) -> Any:
        (tmp_path / "analysis.yaml").write_text(f"{text}\nmonitoring: {{output_dir: {tmp_path}/results}}\n")
        places = [str(runs.get(name, name)) for name in names or ("narrow",)]
        outcome = analyze_runs(tmp_path / "analysis.yaml", [], places, **options)
        return outcome, load(tmp_path / "results" / "analysis")

    return run
