"""One small configuration, and a way to start it on several processes as a user would."""

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).parent
VOCABULARY, LENGTH = 300, 16
WORDS = ("the", "sea", "of", "a", "river", "and", "grey", "stone", "léger", "weighs")
PICO = [sys.executable, "-m", "picolm"]
Launch = Callable[..., subprocess.CompletedProcess[str]]


def torchrun(processes: int) -> list[str]:
    """The words before `train`, on this machine alone, at a free port."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc-per-node", str(processes), "--no-python", str(Path(sys.executable).with_name("pico"))]


@pytest.fixture(scope="session")
def text_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared rows with a tokenizer, from two sources; and two held-out rows in a folder of their own, `few`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from picolm.data.prepare import prepare

    folder = tmp_path_factory.mktemp("text_rows")
    words = random.Random(0)
    for name in ("letters", "essays"):
        (folder / "text" / name).mkdir(parents=True)
        for number in range(60):
            text = " ".join(words.choice(WORDS) for _ in range(400))
            (folder / "text" / name / f"{number}.txt").write_text(text)
    prepare([folder / "text"], folder / "rows", vocab_size=VOCABULARY, seq_len=LENGTH, val_fraction=0.05)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (2, LENGTH + 1)).astype(np.int32)
    (folder / "few").mkdir()
    pq.write_table(pa.table({"input_ids": list(tokens)}), folder / "few" / "val-00000-of-00001.parquet")
    return folder


@pytest.fixture
def config(text_rows: Path, tmp_path: Path) -> Path:
    """The configuration: uneven shards over 3 processes, clipping that acts, fewer held-out rows than processes."""
    file = tmp_path / "toy.yaml"
    file.write_text(f"""
data: {{dataset: {{name: {text_rows}/rows}}, dataloader: {{batch_size: 12}}, tokenizer: {{vocab_size: {VOCABULARY}}}}}
model: {{d_model: 20, n_layers: 2, attention_n_heads: 2, attention_n_kv_heads: 1, activation_hidden_dim: 40,
  vocab_size: {VOCABULARY}, max_seq_len: {LENGTH}}}
training:
  max_steps: 50
  fabric: {{accelerator: cpu, precision: 32-true}}
  optimization: {{lr: 0.01, lr_warmup_steps: 2, lr_scheduler: constant, gradient_accumulation_steps: 2, grad_clip_norm: 0.3}}
checkpointing:
  runs_dir: {tmp_path}/runs
  save_every_n_steps: 25
  learning_dynamics: {{eval_data: {text_rows}/few, batch_size: 1, positions: "random:3",
    layer_suffixes: [embedding_proj, attention_norm, v_proj, w_2]}}
evaluation: {{paloma: {{max_rows: 7, batch_size: 2}}}}
monitoring: {{logging: {{log_every_n_steps: 1}}}}
""")
    return file


@pytest.fixture
def environment(text_rows: Path) -> dict[str, str]:
    """Of the processes: this folder is importable, nothing is fetched, and no launcher's variables are inherited."""
    inherited = {
        k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "TORCHELASTIC", "LOCAL_RANK", "RANK"))
    }
    paths = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    return inherited | {"PYTHONPATH": paths, "LAB_DATA": f"{text_rows}/rows", "OMP_NUM_THREADS": "1"} | {
        "GOMP_SPINCOUNT": "10000", "PYTHONWARNINGS": "ignore"
    }  # fmt: skip


@pytest.fixture
def launch(config: Path, environment: dict[str, str]) -> Launch:
    """A function from a name, a number of processes and `key=value` words to the finished command."""

    def run(
        name: str, processes: int = 1, *words: str, launcher: list[str] = PICO, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        command = [*launcher, "train", str(config), f"checkpointing.run_name={name}"]
        command += [f"training.fabric.num_devices={processes}", *words]
        return subprocess.run(command, env=environment | variables, capture_output=True, text=True, timeout=240)

    return run


@pytest.fixture
def open_run(tmp_path: Path) -> Callable[[str], Any]:
    from picolm.store import Run

    return lambda name: Run.open(tmp_path / "runs" / name)
