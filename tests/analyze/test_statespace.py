"""Heads and circuits of a state space model: by hand from its weights; and an analysis of one beside a decoder."""

import shutil
from pathlib import Path

import pytest
import torch

from picolm.address import Address
from picolm.analyze.components import Absent, operands
from picolm.errors import PicoError
from picolm.models import StateSpace, StateSpaceConfig
from picolm.models.anatomy import CAPTURED
from picolm.schema import load
from picolm.store import Run
from picolm.train import run_training
from picolm.train.config import schema_for

CONFIG = StateSpaceConfig(d_model=12, n_layers=2, vocab_size=17, state_size=5, head_dim=6, n_groups=2)


@pytest.fixture
def model() -> StateSpace:
    torch.manual_seed(0)
    found = StateSpace(CONFIG).double()
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter)
    return found


@pytest.fixture
def checkpoint(model: StateSpace, tmp_path: Path):
    run = Run.create(tmp_path / "run", {}, {})
    tensors = {Address("weights", "", n.removesuffix(".weight")): p.detach() for n, p in model.named_parameters()}
    tensors |= {
        Address("gradients", "val", f"layers.1.ssm.{part}_proj"): torch.randn(
            getattr(model.layers[1].ssm, f"{part}_proj").weight.shape, dtype=torch.float64
        )
        for part in "oxbc"
    }
    return run.commit(1, tensors, meta={"step": 1})


def found(checkpoint, model: StateSpace, name: str, **asked):
    defaults = {
        "split": "val",
        "layer_suffixes": None,
        "layers": "all",
        "heads": True,
        "anatomy": model.anatomy(),
        "model": {},
    }
    return list(operands(checkpoint, name, **defaults | asked))


def test_circuits_are_products_of_their_projections(checkpoint, model: StateSpace) -> None:
    layer = model.layers[1].ssm
    o, x, b, c = (getattr(layer, f"{part}_proj").weight.detach() for part in "oxbc")
    values = found(checkpoint, model, "value_circuit", data_type="weights", layers=[1])
    assert [operand.head for operand in values] == [0, 1, 2, 3]
    for head, operand in enumerate(values):
        rows = slice(6 * head, 6 * head + 6)
        torch.testing.assert_close(operand.load().entries, o[:, rows] @ x[rows])
        assert operand.load().rank == 6
    (whole,) = found(checkpoint, model, "value_circuit", data_type="weights", layers=[1], heads=False)
    torch.testing.assert_close(whole.load().entries, o @ x)
    (memory,) = found(checkpoint, model, "write_read_circuit", data_type="weights", layers=[1])
    torch.testing.assert_close(memory.load().entries, c.T @ b)
    assert (memory.address, memory.head) == (Address("weights", "", "layers.1.write_read_circuit"), None)
    assert memory.load().rank == 10


def test_gradients_of_circuits_are_their_first_order_change(checkpoint, model: StateSpace) -> None:
    layer = model.layers[1].ssm
    b, c = (getattr(layer, f"{part}_proj").weight.detach() for part in "bc")
    gb, gc = (checkpoint[Address("gradients", "val", f"layers.1.ssm.{part}_proj")] for part in "bc")
    (change,) = found(checkpoint, model, "write_read_circuit", data_type="gradients", layers=[1])
    torch.testing.assert_close(change.load().entries, gc.T @ b + c.T @ gb)


def test_heads_are_rows_of_values_and_columns_of_outputs(checkpoint, model: StateSpace) -> None:
    layer = model.layers[0].ssm
    heads = found(checkpoint, model, "per_head", data_type="weights", layers=[0])
    assert [operand.address.module for operand in heads] == ["layers.0.ssm.x_proj"] * 4
    torch.testing.assert_close(heads[2].load().entries, layer.x_proj.weight[12:18].detach())
    outputs = found(checkpoint, model, "per_head", data_type="weights", layers=[0], layer_suffixes="ssm.output")
    torch.testing.assert_close(outputs[1].load().entries, layer.o_proj.weight[:, 6:12].detach())


def test_the_default_means_what_the_model_has(checkpoint, model: StateSpace) -> None:
    by_default = found(checkpoint, model, "simple", data_type="weights", layer_suffixes=CAPTURED)
    assert not any(isinstance(each, Absent) for each in by_default)
    assert {each.address.suffix for each in by_default} == {"ssm.x_proj", "ssm.o_proj"}
    (absent,) = found(checkpoint, model, "simple", data_type="weights", layer_suffixes=("mlp.output",))
    assert isinstance(absent, Absent)
    assert all(isinstance(each, Absent) for each in found(checkpoint, model, "ov_circuit", data_type="weights"))


def test_paired_metrics_of_a_state_space_model_need_no_component(analyze, toy_data: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"""
data: {{dataset: {{name: {toy_data}}}, dataloader: {{batch_size: 8}}, tokenizer: {{vocab_size: 64}}}}
model: {{model_type: pico_statespace, d_model: 24, n_layers: 2, state_size: 5, head_dim: 12, vocab_size: 64, max_seq_len: 16}}
training: {{max_steps: 2, fabric: {{accelerator: cpu, precision: 32-true}},
  optimization: {{lr: 0.01, lr_warmup_steps: 2, gradient_accumulation_steps: 1}}}}
checkpointing: {{run_name: states, runs_dir: {tmp_path}, save_every_n_steps: 1}}
monitoring: {{logging: {{log_level: ERROR}}}}
""")
    run_training(load(tmp_path / "c.yaml", schema_for))
    outcome, table = analyze(
        "metrics: [{metric_name: cka, target: {checkpoint: last}}]", str(tmp_path / "states"), "narrow"
    )
    assert not outcome.absent
    modules = table.groupby("run")["module"].unique().map(sorted).to_dict()
    assert modules["states"] == ["layers.0.ssm.o_proj", "layers.1.ssm.o_proj"]
    assert modules["narrow"] == [f"layers.{n}.{part}" for n in (0, 1) for part in ("ov_circuit", "swiglu.w_2")]
    assert table["value"].between(0, 1 + 1e-6).all()
    last = table[(table["step"] == 2) & (table["run"] == "states")]
    assert last["value"].sub(1).abs().max() < 1e-6  # of a step with itself
    own, _ = analyze("metrics: [{metric_name: cka, target: {checkpoint: last}}]", str(tmp_path / "states"))
    assert not own.absent
    other = ["checkpointing.run_name=embeddings", "checkpointing.learning_dynamics.layer_suffixes=[embedding]"]
    run_training(load(tmp_path / "c.yaml", schema_for, other))
    with pytest.raises(PicoError, match=r"ssm.output.*finds nothing at any step"):
        analyze("metrics: [{metric_name: cka, target: {checkpoint: last}}]", str(tmp_path / "embeddings"))


def test_defaults_for_other_models_are_told_apart_by_the_steps_that_are_analyzed(analyze, runs, tmp_path: Path) -> None:
    shutil.copytree(runs["narrow"], tmp_path / "narrow")
    (tmp_path / "narrow" / "checkpoints" / "step_6" / "anatomy.json").write_text("{")
    text = "steps: [0, 2]\nmetrics: [{metric_name: cka, target: {checkpoint: first}}]"
    outcome, table = analyze(text, str(tmp_path / "narrow"))
    assert not outcome.absent
    assert set(table["step"]) == {0, 2}
