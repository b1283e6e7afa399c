"""What is attacked: a folder with one of everything that somebody else may have written, and the commands that read it."""

import gzip
import json
import os
import random
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tests import picotrain
from tests.siege.sandbox import Result, Sandbox

WORDS = ["the", "step", "of", "a", "model", "learns", "slowly", "while", "its", "gradient", "falls", "and", "rises"]
BASE = """
data: {dataset: {name: rows}, dataloader: {batch_size: 4}, tokenizer: {vocab_size: 300}}
model: {d_model: 8, n_layers: 2, attention_n_heads: 2, attention_n_kv_heads: 1, activation_hidden_dim: 16,
  vocab_size: 300, max_seq_len: 16}
training:
  max_steps: 2
  fabric: {accelerator: cpu, precision: 32-true}
  optimization: {lr: 0.01, lr_warmup_steps: 1, gradient_accumulation_steps: 1}
checkpointing: {run_name: toy, save_every_n_steps: 2, learning_dynamics: {max_rows: 4}}
evaluation: {metrics: [paloma], every_n_steps: 2, paloma: {batch_size: 4, max_rows: 8, max_length: 16}}
monitoring: {logging: {log_every_n_steps: 1}}
"""
ANALYSIS = """
analysis_name: weights
metrics:
- {metric_name: per, components: [{component_name: simple}]}
- {metric_name: cka, components: [{component_name: simple, data_type: activations}]}
monitoring: {output_dir: results}
"""
WEIGHTS = """
analysis_name: circuits
metrics:
- {metric_name: norm, components: [{component_name: simple}, {component_name: ov_circuit}]}
monitoring: {output_dir: results}
"""
FAMILY = """
anatomy:
  block: model.layers.{}
  parts:
    attention.value: {module: self_attn.v_proj, cut: kv_heads}
    attention.output: {module: self_attn.o_proj, cut: heads, by: columns}
"""
SUITE = """
suite_name: toys
base: base.yaml
matrix: {seed: [42, 43]}
analysis: analysis.yaml
"""
COMMANDS = {
    "list": "list runs/toy",
    "verify": "verify runs/toy",
    "generate": "generate runs/toy --prompt the --max-new-tokens 2",
    "batch": "batch runs/toy --step 1 --loss --out batch.csv",
    "replay": "replay runs/toy --step 1",
    "replay --verify": "replay runs/toy --step 2 --verify",
    "replay --commit": "replay runs/toy --step 1 --commit",
    "fork": "fork runs/toy --step 2 --run-name forked training.max_steps=3",
    "train": "train base.yaml training.max_steps=3",
    "train --dry-run": "train base.yaml checkpointing.run_name=other --dry-run",
    "analyze": "analyze analysis.yaml --run runs/toy --csv --report",
    "analyze --aggregate": "analyze analysis.yaml --run runs/toy --run runs/toys-seed42 --aggregate",
    "report": "report runs/toy --analysis results/weights -o page.html",
    "evaluate": "evaluate runs/toy",
    "export": "export runs/toy --out exported",
    "export gguf": "export runs/toy --out exported.gguf --format gguf",
    "export torch": "export runs/toy --out exported --format torch",
    "import": "import model --out runs/imported",
    "list series": "list series",
    "verify series": "verify series",
    "analyze series": "analyze weights.yaml --run series",
    "observe": "observe runs/toy --steps 2 --what activations,gradients,scores --out runs/seen",
    "observe series": "observe series --prompt the --what activations,patterns,logits --steps 2 --out runs/seen",
    "import torch": "import state --out runs/imported",
    "renew": "renew runs/toy",
    "push": "push runs/toy --repo-id lab/sent",
    "pull": "pull lab/toy@toy --out runs/pulled",
    "hub list": "list hub:lab/toy@toy",
    "hub generate": "generate hub:lab/toy@toy --prompt the --max-new-tokens 2",
    "hub analyze": "analyze analysis.yaml --repo_id lab/toy --branch toy",
    "hub train": "train base.yaml data.dataset.name=lab/rows checkpointing.run_name=hubbed training.max_steps=1",
    "data prepare": "data prepare texts --out prepared --tokenizer rows/tokenizer.json --seq-len 16 --val-fraction 0.2",
    "data prepare new": "data prepare texts --out prepared --vocab-size 300 --seq-len 16",
    "data merge": "data merge rows more_rows --out merged",
    "data inspect": "data inspect rows",
    "data verify": "data verify rows",
    "data push": "data push rows --repo-id lab/sent_rows",
    "suite --dry-run": "suite suite.yaml --dry-run",
    "suite": "suite suite.yaml",
    "list legacy": "list legacy",
    "verify legacy": "verify legacy",
    "analyze legacy": "analyze analysis.yaml --run legacy",
    "report legacy": "report legacy -o page.html",
}
# Every kind of file of a camp that a command opens; a test holds that there is no other.
KINDS = (Path(__file__).parent / "kinds.txt").read_text().splitlines()

# Files that the user wrote and typed the name of: what stands in them is asked for, and they may be links.
TYPED = {"base.yaml", "analysis.yaml", "weights.yaml", "suite.yaml"}


def build(folder: Path, sandbox: Sandbox) -> None:
    """Make everything in `folder`. The Hub of the sandbox's environment gets the run and the rows."""
    _write_texts(folder / "texts")
    (folder / "base.yaml").write_text(BASE)
    (folder / "analysis.yaml").write_text(ANALYSIS)
    (folder / "weights.yaml").write_text(WEIGHTS)
    (folder / "suite.yaml").write_text(SUITE)
    picotrain.write_run(folder / "legacy", steps=(0, 1000))
    for words in [
        "data prepare texts --out rows --vocab-size 300 --seq-len 16 --val-fraction 0.2",
        "data prepare texts --out more_rows --tokenizer rows/tokenizer.json --seq-len 16 --val-fraction 0.2 --seed 1",
        "train base.yaml",
        "train base.yaml checkpointing.run_name=toys-seed42",
        "train base.yaml checkpointing.run_name=toys-seed43 training.seeds.init=43",
        "suite suite.yaml",
        "analyze analysis.yaml --run runs/toy --csv --report",
        "export runs/toy --out model",
        "export runs/toy --out state --format torch",
        "export runs/toy --step 0 --out series/step0",
        "export runs/toy --step 2 --out series/step2",
        "push runs/toy --repo-id lab/toy",
        "data push rows --repo-id lab/rows",
        "analyze analysis.yaml --repo_id lab/toy --branch toy",
        "train base.yaml data.dataset.name=lab/rows checkpointing.run_name=hubbed training.max_steps=1",
    ]:
        result = sandbox.run(shlex.split(words), folder, seconds=300)
        assert result.code == 0, (words, result.output)
    (folder / "series/series.yaml").write_text("steps: {step0: 0, step2: 2}\n" + FAMILY)
    (folder / "series/step2/trainer_state.json").write_text(
        '{"global_step": 2, "log_history": [{"step": 1, "loss": 2.5}]}'
    )
    shutil.rmtree(folder / "runs/hubbed")
    shutil.rmtree(folder / ".hub_cache")  # that of huggingface_hub: links by design, named by digests


def _write_texts(folder: Path) -> None:
    generator = random.Random(0)
    folder.mkdir()
    texts = [" ".join(generator.choices(WORDS, k=40)) + f" n{number}." for number in range(60)]
    records = [{"text": text, "source": "ab"[number % 2]} for number, text in enumerate(texts)]
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records[:20]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in records[20:40]).encode()))
    pq.write_table(pa.table({"text": texts[40:50], "source": ["c"] * 10}), folder / "c.parquet")
    (folder / "d.txt").write_text("\n\n".join(texts[50:]))


def run(sandbox: Sandbox, name: str, folder: Path, **options: object) -> Result:
    """Run a command of COMMANDS in `folder`."""
    return sandbox.run(shlex.split(COMMANDS[name]), folder, **options)  # type: ignore[arg-type]


def files(folder: Path) -> Iterator[str]:
    """All regular files of a camp by name, links left out."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            yield path.relative_to(folder).as_posix()


def kind(name: str) -> str:
    """What a file is, whichever step, shard or seed it belongs to: mutations of one of a kind are enough."""
    name = re.sub(r"^runs/[^/]+/", "runs/toy/", name)
    name = re.sub(r"(train|val)_(activations|gradients)\.", "capture.", name)
    name = re.sub(r"(/step_\d+)/\w+\.py", r"\1/code.py", name)
    return re.sub(r"\d+", "N", name)


def readers(sandbox: Sandbox, copy: Callable[[], Path]) -> dict[str, dict[str, Result]]:
    """By kind of file the commands that open it, each with what it did in a healthy camp."""
    found: dict[str, dict[str, Result]] = {}
    for name in COMMANDS:
        folder = copy()
        there = set(files(folder))
        result = run(sandbox, name, folder, watch=True)
        opened = {os.path.relpath(path, folder) for path in result.paths} & there
        for each in {kind(file) for file in opened}:
            found.setdefault(each, {})[name] = result
    return found
