"""The training configuration: published files load as they are, and what cannot work is told before anything starts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from picolm.schema import ConfigError, dump, load, plain
from picolm.train.config import TrainConfig, schema_for

# Every key of the published format with its published default, as a user's file may spell it.
PUBLISHED = """
data:
  dataset: {name: pico-lm/pretokenized-dolma}
  dataloader: {batch_size: 1024}
  tokenizer: {name: allenai/OLMo-7B-0724-hf, vocab_size: 50304}
model: {model_type: pico_decoder, d_model: 768, n_layers: 12, vocab_size: 50304, batch_size: 1024, max_seq_len: 2048,
  attention_n_heads: 12, attention_n_kv_heads: 4, activation_hidden_dim: 3072, norm_eps: 1e-6, position_emb_theta: 10000.0}
training:
  max_steps: 200000
  optimization: {optimizer: adamw, lr: 3e-4, lr_scheduler: linear_with_warmup, lr_warmup_steps: 2500,
    gradient_accumulation_steps: 128}
  fabric: {num_nodes: 1, num_devices: 1, precision: bf16-mixed, accelerator: cuda}
checkpointing:
  run_name: null
  runs_dir: runs
  checkpoints_dir: checkpoints
  logs_dir: logs
  fabric_checkpoint_dir: fabric_state
  fabric_checkpoint_filename: checkpoint.pt
  learning_dynamics_dir: learning_dynamics
  save_every_n_steps: 1000
  save_to_hf: false
  hf_checkpoint: {repo_id: "", collection_slug: null}
  training: {auto_resume: true}
  evaluation: {eval_results_dir: eval_results}
  learning_dynamics: {layer_suffixes: [attention.v_proj, attention.o_proj, swiglu.w_2], sequence_idx: -1, batch_size: 8,
    eval_data: pico-lm/pretokenized-paloma-tinsy}
evaluation:
  metrics: [paloma]
  paloma: {dataset_name: pico-lm/pretokenized-paloma-tinsy, dataset_split: val, max_length: 2048, batch_size: 16}
monitoring:
  save_to_wandb: false
  wandb: {project: "", entity: ""}
  logging: {log_level: INFO, log_every_n_steps: 100}
  save_to_picolabs: false
  pico_report: {lab_hash: "", auto_commit: true}
"""


def read(tmp_path: Path, text: str, *overrides: str) -> Any:
    (tmp_path / "c.yaml").write_text(text)
    return load(tmp_path / "c.yaml", schema_for, overrides)


def complaint(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text, *overrides)
    return str(caught.value)


def test_a_published_configuration_loads_with_its_meaning(tmp_path: Path) -> None:
    config = read(tmp_path, PUBLISHED)
    assert config.training.optimization.lr == 3e-4
    assert config.training.fabric.accelerator == "cuda"
    assert config.checkpointing.learning_dynamics.eval_data == "pico-lm/pretokenized-paloma-tinsy"
    changed = {key for key in ("precision", "accelerator") if getattr(TrainConfig().training.fabric, key) == "auto"}
    assert changed == {"precision", "accelerator"}


def test_null_means_no_held_out_rows_and_no_evaluation(tmp_path: Path) -> None:
    config = read(tmp_path, "checkpointing: {learning_dynamics: {eval_data: null}}\nevaluation: {metrics: null}\n")
    assert config.checkpointing.learning_dynamics.eval_data is None
    assert config.evaluation.metrics is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "checkpointing:\n  save_to_hf: true\n",
            "c.yaml:1: checkpointing.hf_checkpoint.repo_id: '': save_to_hf sends steps to OWNER/NAME on the Hub; say which",
        ),
        ("model: {d_model: 100}", "model.d_model"),
        ("model: {n_layer: 3}", "model.n_layer: unknown key; did you mean 'n_layers'?"),
        ("training: {max_steps: many}", "training.max_steps: \"many\": should be a valid integer. Updates in all."),
        ("data: {dataloader: {batch_size: 100}}", "100 sequences cannot be divided evenly over 1 device(s) x 128"),
        ("model: {vocab_size: 100}", "100 is less than data.tokenizer.vocab_size (50304)"),
        ("training: {optimization: {optimizer: adam}}", "unknown optimizer 'adam'; did you mean 'adamw'?"),
        ("training: {optimization: {lr_scheduler: step}}", "unknown schedule 'step'"),
        ("training: {optimization: {betas: [0.9, 1.0]}}", "betas.1: 1.0: should be less than 1"),
        ("evaluation: {metrics: [blimpp]}", "unknown evaluation 'blimpp' (there are: paloma, minimal_pairs, lm_eval, "),
        ("model: {model_type: pico_decodr}", "model.model_type: \"pico_decodr\": should be 'pico_decoder'"),
        ("checkpointing: {run_name: a/b}", "'a/b' cannot be the name of a folder"),
        (f"checkpointing: {{run_name: {'é' * 128}}}", "256 bytes are too long for the name of a folder; it may have 255"),
        ("training: {max_steps: 1e5}", "100000.0: should be a valid integer; write 100000"),
        ("training: {max_steps: 12.0}", "; write 12"),
        ("checkpointing: {save_optimizer: 1e3}", "; write 1000"),
        ("checkpointing: {learning_dynamics: {layers: [0, 12]}}", "there is no layer 12: the model has 12, counted from 0"),
        ("checkpointing: {learning_dynamics: {sequence_idx: 2048}}", "there is no position 2048 in sequences of 2048 tokens"),
        ("checkpointing: {learning_dynamics: {positions: sometimes}}", "positions: \"sometimes\""),
        ("training: {fabric: {precision: 16-mixed}}", "training.fabric.precision"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_told(tmp_path: Path, text: str, message: str) -> None:
    assert message in complaint(tmp_path, text)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_such:x", "cannot be imported: No module named 'no_such'"),
        ("os:no", "cannot be imported: module 'os' has no attribute 'no'"),
        ("os:sep", "is a str; a class or a function was expected"),
        ("os:path", "is a module; a class or a function was expected"),
        ("broken_lab:x", "cannot be imported: ZeroDivisionError: division by zero"),
        ("os.path:join", ""),
        *((name, "") for name in (":x", "x:", "..a:b", "a b:c", "a:b:c", "1:2")),
    ],
)
@pytest.mark.parametrize(
    "key", ["model.model_type", "training.optimization.optimizer", "training.optimization.lr_scheduler", "evaluation.metrics"]
)  # fmt: skip
def test_a_name_that_leads_nowhere_is_told_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, name: str, reason: str
) -> None:
    (tmp_path / "broken_lab.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    value = f'["{name}"]' if key == "evaluation.metrics" else f'"{name}"'
    if key != "model.model_type" and name == "os.path:join":
        read(tmp_path, "", f"{key}={value}")  # a function: what it is good for shows when it is called
    else:
        message = complaint(tmp_path, "", f"{key}={value}")
        assert message.startswith(f"command line: {key}: ")
        assert reason in message


def test_each_field_has_a_docstring() -> None:
    def undocumented(model: type[BaseModel], prefix: str = "") -> list[str]:
        missing = []
        for name, field in model.model_fields.items():
            kind = field.annotation
            nested = isinstance(kind, type) and issubclass(kind, BaseModel)
            missing += (
                undocumented(kind, f"{prefix}{name}.") if nested else [] if field.description else [prefix + name]
            )
        return missing

    assert undocumented(TrainConfig) == ["model"]  # a section: its fields are dataclass fields with docstrings
    properties = TrainConfig.model_json_schema()["$defs"]["DecoderConfig"]["properties"]
    assert all("description" in entry for entry in properties.values())


def test_a_model_of_the_users_own_brings_its_own_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_lab_model.py").write_text(
        "from dataclasses import dataclass\n"
        "@dataclass(frozen=True)\nclass Config:\n"
        "    __pydantic_config__ = {'extra': 'forbid'}\n"
        "    model_type: str = 'my_lab_model:Model'\n    vocab_size: int = 50304\n    max_seq_len: int = 8\n    width: int = 4\n"
        "    def problems(self):\n        yield from ()\n"
        "class Model:\n    Config = Config\n"
    )
    monkeypatch.chdir(tmp_path)
    config = read(tmp_path, "model: {model_type: 'my_lab_model:Model', width: 7}\n")
    assert config.model.width == 7
    message = complaint(tmp_path, "model: {model_type: 'my_lab_model:Model', d_model: 7}\n")
    assert "model.d_model: unknown key" in message


def test_the_resolved_configuration_is_read_back(make_config: Callable[..., Any], tmp_path: Path) -> None:
    config = make_config(
        "training.optimization.betas=[0.8, 0.99]", "checkpointing.learning_dynamics.positions=random:3"
    )
    assert plain(read(tmp_path, dump(config))) == plain(config)
