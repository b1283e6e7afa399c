"""How many layers and heads there are is what the run says and holds; no default of any architecture stands in for it."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from tests.picotrain import write_step
from torch import Tensor

from picolm.address import Address
from picolm.analyze import metrics
from picolm.analyze.heads import read_anatomy
from picolm.errors import PicoError
from picolm.store import Run
from picolm.trusted import parse_json

Analyze = Callable[..., tuple[Any, pd.DataFrame]]
WIDTH, HEADS, KV_HEADS, SIZE = 24, 4, 2, 8  # heads wider than WIDTH / HEADS
STATED = {"d_model": WIDTH, "n_layers": 2, "attention_n_heads": HEADS, "attention_n_kv_heads": KV_HEADS}


def attention(layers: int = 2, size: int = SIZE, seed: int = 0) -> dict[Address, Tensor]:
    """Weights, and activations of whole blocks on 40 rows, that differ from layer to layer."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "q_proj": (HEADS * size, WIDTH), "k_proj": (KV_HEADS * size, WIDTH),
        "v_proj": (KV_HEADS * size, WIDTH), "o_proj": (WIDTH, HEADS * size),
    }  # fmt: skip
    made = {
        Address("weights", "", f"layers.{layer}.attention.{name}"): torch.randn(shape, generator=generator)
        for layer in range(layers)
        for name, shape in shapes.items()
    }
    blocks = {
        Address("activations", "val", f"layers.{layer}"): torch.randn(40, WIDTH, generator=generator)
        for layer in range(layers)
    }
    return made | blocks


def make(folder: Path, model: Mapping[str, Any] | None, tensors: Mapping[Address, Tensor], steps: int = 1) -> str:
    run = Run.create(folder, {} if model is None else {"model": dict(model)}, {})
    rows = {"val": {"input_ids": np.arange(80).reshape(40, 2)}}
    for step in range(steps):
        changed = {address: tensor + step for address, tensor in tensors.items()}
        run.commit(step, changed, meta={"step": step}, tables=rows)
    return str(folder)


def test_layers_of_the_residual_stream_are_compared_with_each_other(analyze: Analyze, tmp_path: Path) -> None:
    tensors = attention(3)
    place = make(tmp_path / "blocks", STATED | {"n_layers": 3}, tensors)
    _, frame = analyze(
        "metrics: [{metric_name: cka, target: {layer: all}, components: [{component_name: residual, data_type: activations}]}]",
        place,
    )
    pairs = {(row.layer, row.against_layer): row.value for row in frame.itertuples()}
    assert set(pairs) == {(i, j) for i in range(3) for j in range(3)}
    for (i, j), value in pairs.items():
        one, other = (tensors[Address("activations", "val", f"layers.{k}")] for k in (i, j))
        assert value == pytest.approx(metrics.cka(one, other), abs=1e-12)
        assert (value > 0.999) == (i == j)


def test_blocks_compared_by_their_own_name_are_restricted_by_layers(analyze: Analyze, tmp_path: Path) -> None:
    place = make(tmp_path / "blocks", STATED | {"n_layers": 3}, attention(3))
    text = "components: [{component_name: simple, data_type: activations, layers: [1]}]"
    _, frame = analyze(f"metrics: [{{metric_name: per, data_split: val, {text}}}]", place)
    assert frame["module"].tolist() == ["layers.1"]
    assert frame["layer"].tolist() == [1]


PER_HEAD = """
metrics:
  - {metric_name: per, components: [{component_name: per_head, layer_suffixes: [q_proj, k_proj, v_proj, o_proj]}]}
"""
CIRCUIT = "metrics: [{metric_name: norm, norm_type: nuclear, components: [{component_name: %s}]}]"
EVERY_STEP = """
metrics: [{metric_name: cka, target: {checkpoint: all}, components: [{component_name: residual, data_type: activations}]}]
"""
TOLD: dict[str, dict[str, Any]] = {
    "all counts": STATED,
    "the head size": {"head_dim": SIZE},
    "query heads alone": {"attention_n_heads": HEADS},
    "key-value heads alone": {"attention_n_kv_heads": KV_HEADS},
    "all": STATED | {"head_dim": SIZE},
}


@pytest.mark.slow
@pytest.mark.parametrize("told", TOLD)
def test_heads_are_as_wide_as_the_tensors_say(told: str, analyze: Analyze, tmp_path: Path) -> None:
    tensors = attention()
    _, frame = analyze(PER_HEAD, make(tmp_path / "wide_heads", TOLD[told], tensors))
    assert frame.groupby("module")["head"].nunique().to_dict() == {
        f"layers.{layer}.attention.{name}": HEADS if name in ("q_proj", "o_proj") else KV_HEADS
        for layer in (0, 1)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    }
    for row in frame.itertuples():
        weights, part = tensors[Address("weights", "", row.module)], slice(row.head * SIZE, (row.head + 1) * SIZE)
        expected = weights[:, part] if row.module.endswith("o_proj") else weights[part]
        assert row.value == pytest.approx(metrics.per(expected), rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("told", TOLD)
@pytest.mark.parametrize("name", ["ov_circuit", "qk_circuit"])
def test_circuits_are_cut_as_the_tensors_say(name: str, told: str, analyze: Analyze, tmp_path: Path) -> None:
    tensors = attention()
    _, frame = analyze(CIRCUIT % name, make(tmp_path / "wide_heads", TOLD[told], tensors))
    assert len(frame) == 2 * HEADS
    for row in frame.itertuples():
        q, k, v, o = (
            tensors[Address("weights", "", f"layers.{row.layer}.attention.{part}")].double()
            for part in ("q_proj", "k_proj", "v_proj", "o_proj")
        )
        head, group = (slice(i * SIZE, (i + 1) * SIZE) for i in (row.head, row.head // 2))
        dense = o[:, head] @ v[group] if name == "ov_circuit" else q[head].T @ k[group]
        assert row.value == pytest.approx(torch.linalg.svdvals(dense).sum().item(), rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("text", [PER_HEAD, CIRCUIT % "ov_circuit", CIRCUIT % "qk_circuit"])
@pytest.mark.parametrize("model", [None, {}, {"d_model": WIDTH, "n_layers": 2}])
def test_an_unknown_number_of_heads_is_an_error_that_names_the_key(
    model: dict[str, Any] | None, text: str, analyze: Analyze, tmp_path: Path
) -> None:
    with pytest.raises(PicoError, match=r"model\.attention_n_heads or model\.attention_n_kv_heads nor model\.head_dim"):
        analyze(text, make(tmp_path / "unsaid", model, attention()))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"attention_n_kv_heads": 4},
            r"size of a head is ambiguous: 8 by model.attention_n_heads = 4 .*; 4 by model.att",
        ),
        (
            {"attention_n_heads": 5},
            r"model.attention_n_heads is 5, but weights//layers.0.attention.q_proj has 32 features",
        ),
        ({"head_dim": 6}, r"size of a head is ambiguous: 6 by model.head_dim; 8 by model.attention_n_heads"),
        ({"attention_n_heads": "4"}, r"model.attention_n_heads: '4'; expected a number of 1 or more"),
        ({"attention_n_heads": 0}, r"model.attention_n_heads: 0; expected a number of 1 or more"),
    ],
)
def test_a_configuration_that_contradicts_the_tensors_is_refused(
    wrong: dict[str, Any], message: str, analyze: Analyze, tmp_path: Path
) -> None:
    with pytest.raises(PicoError, match=message):
        analyze(PER_HEAD, make(tmp_path / "wrong", STATED | wrong, attention()))


@pytest.mark.slow
@pytest.mark.parametrize("model", [{"attention_n_heads": HEADS}, STATED | {"n_layers": 14}])
def test_all_layers_that_are_there_are_measured(model: dict[str, Any], analyze: Analyze, tmp_path: Path) -> None:
    place = make(tmp_path / "deep", model, attention(14), steps=2)
    outcome, frame = analyze(CIRCUIT % "ov_circuit", place)
    assert set(frame["layer"]) == set(range(14))
    assert not outcome.absent
    assert set(analyze(EVERY_STEP, place)[1]["layer"]) == set(range(14))


@pytest.mark.parametrize(
    ("name", "of"), [("ov_circuit", "weights of"), ("residual", "activations/val of")]
)  # fmt: skip
def test_layers_that_the_configuration_promises_and_no_tensor_has_are_missing(
    name: str, of: str, analyze: Analyze, tmp_path: Path
) -> None:
    place = make(tmp_path / "cut", STATED | {"n_layers": 4}, attention(2))
    kind = "activations" if name == "residual" else "weights"
    text = (
        f"metrics: [{{metric_name: per, data_split: val, components: [{{component_name: {name}, data_type: {kind}}}]}}]"
    )
    outcome, _ = analyze(text, place)
    assert outcome.absent == [f"step 0 of cut: no {of} layers.2 to layers.3 (model.n_layers is 4)"]
    with pytest.raises(PicoError, match="1 things that were asked for are missing"):
        analyze(text, place, strict=True)


def test_a_huge_number_of_layers_costs_nothing(analyze: Analyze, tmp_path: Path) -> None:
    place = make(tmp_path / "huge", STATED | {"n_layers": 10**12}, attention(2), steps=2)
    outcome, frame = analyze(EVERY_STEP, place)
    assert len(frame) == 8
    assert "layers.2 to layers.999999999999 (model.n_layers is 1000000000000)" in outcome.absent[0]


def test_a_run_of_pico_train_tells_its_heads_in_the_configuration_of_its_steps(
    analyze: Analyze, tmp_path: Path
) -> None:
    """Its training configuration may leave out what pico-train had documented defaults for."""
    place = tmp_path / "published"
    tensors = {address: tensor for address, tensor in attention().items() if address.kind == "weights"}
    step = write_step(place / "checkpoints" / "step_0", tensors)
    (place / "training_config.yaml").write_text(yaml.safe_dump({"model": {"model_type": "pico_decoder"}}))
    with pytest.raises(PicoError, match=r"neither model\.attention_n_heads"):
        analyze(CIRCUIT % "ov_circuit", str(place))
    (step / "config.json").write_text('{"attention_n_heads": 4, "attention_n_kv_heads": 2, "n_layers": 2}')
    _, frame = analyze(CIRCUIT % "ov_circuit", str(place))
    assert frame["head"].nunique() == HEADS


def test_layers_of_an_encoder_and_a_decoder_are_not_taken_for_each_other(analyze: Analyze, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        Address("weights", "", f"{stack}.layers.{layer}.mlp"): torch.randn(6, 5, generator=generator)
        for stack in ("encoder", "decoder")
        for layer in (0, 1)
    }
    text = "metrics: [{metric_name: cosine, target: {layer: all}, components: [{component_name: simple, layer_suffixes: mlp}]}]"
    _, frame = analyze(text, make(tmp_path / "both", {}, tensors))
    assert len(frame) == 2 * 2 * 2
    for row in frame.itertuples():
        other = row.module.replace(f".{row.layer}.", f".{row.against_layer}.")
        one, two = (tensors[Address("weights", "", name)].flatten().double() for name in (row.module, other))
        assert row.value == pytest.approx(torch.cosine_similarity(one, two, dim=0).item(), abs=1e-12)


def test_what_a_model_says_of_its_parts_is_stored_with_each_step(train: Callable[..., Run]) -> None:
    from picolm.models import Anatomy

    run = train("checkpointing.save_weights=last", "training.max_steps=4")
    captured = {address.suffix for address in run[0].select(kind="activations")}
    assert captured == {"attention.v_proj", "attention.o_proj", "swiglu.w_2"}
    for step in (0, 4):
        anatomy = read_anatomy(run[step], {}, "here")
        assert (anatomy.layers, anatomy.width, anatomy.heads, anatomy.kv_heads, anatomy.head_size) == (2, 24, 4, 2, 6)
        assert (anatomy.block, anatomy.module("mlp.output")) == ("layers.{}", "swiglu.w_2")
        assert parse_json(run[step].read("anatomy.json"), "here", Anatomy) == anatomy


@pytest.mark.parametrize(
    "change",
    [
        {"heads": 0},
        {"heads": "4"},
        {"block": "{0.__class__}"},
        {"parts": {"embedding": ["x", "__class__"]}},
    ],
)
def test_a_description_that_is_none_is_refused_by_name(change: dict[str, Any]) -> None:
    from picolm.models import Anatomy

    content = json.loads(Anatomy(layers=2).to_json()) | change
    with pytest.raises(PicoError, match=r"anatomy\.json of step 3"):
        parse_json(json.dumps(content).encode(), "anatomy.json of step 3", Anatomy)
