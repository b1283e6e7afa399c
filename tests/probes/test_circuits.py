"""Circuits against reference values, whole matrices of vocabulary by vocabulary, and heads whose circuits are known."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.probes.conftest import Measure, by_head, expected
from tests.readers.conftest import make, save
from torch import Tensor

from picolm.errors import PicoError
from picolm.models.layers import RMSNorm
from picolm.observe.subject import Subject
from picolm.probes import Reading, find_probe
from picolm.probes.circuits import _factor, _gain, _shares
from picolm.readers.series import open_series

__all__ = ["save"]
Save = Callable[..., Path]
Values = dict[tuple[str, int | None, int | None, str], float | None]


def readings(place: Path, **options: Any) -> Iterator[Reading]:
    """Yield what the probe says of the newest step."""
    found = find_probe("circuits").start({"subject": Subject(open_series(str(place)))}, options)
    yield from (reading for reading in found if isinstance(reading, Reading))


def values(place: Path, **options: Any) -> Values:
    return {(each.name, each.layer, each.head, each.bin): each.value for each in readings(place, **options)}


@pytest.mark.parametrize(
    ("series", "step"), [("llama_s0", 0), ("llama_s0", 300), ("llama_s0", 500), ("neox_s0", 0), ("neox_s0", 500)]
)
def test_the_circuits_are_those_of_independent_code(measure: Measure, series: str, step: int) -> None:
    found, known = measure({"probe_name": "circuits"}, runs=(series,), steps=[step]), expected(series, step)
    for name, key in (("ov_copying", "ov_copying"), ("ov_copying_folded", "ov_copying_norms_folded")):
        assert by_head(found, f"circuits.{name}", step) == pytest.approx(np.array(known[key]), rel=1e-5)
    for letter in "qkv":
        chosen = found[found["metric"] == f"circuits.{letter}_composition"].sort_values(["head", "bin"])
        assert set(chosen["layer"]) == {1}
        assert list(chosen["bin"][:4]) == ["0.0", "0.1", "0.2", "0.3"]
        later_by_earlier = chosen["value"].to_numpy(float).reshape(4, 4)
        assert later_by_earlier == pytest.approx(np.array(known[f"{letter}_composition_layer0_to_layer1"]), rel=1e-5)
        assert chosen["chance"].tolist() == [64**-0.5] * 16


def share_of(matrix: Tensor) -> float:
    eigenvalues = torch.linalg.eigvals(matrix)
    return float(eigenvalues.real.sum() / eigenvalues.abs().sum())


def gain_of(norm: Any, family: str) -> Tensor:
    return norm.weight.detach().double() + (1.0 if family == "gemma" else 0.0)


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "gpt_neox"])
def test_heads_are_cut_as_the_model_cuts_them(family: str, save: Save) -> None:
    """The whole matrices, from the parameters by their names in transformers."""
    model = make(family, vocab_size=65)
    parameters = {name: p.detach().double() for name, p in model.named_parameters()}
    embedding = model.get_input_embeddings().weight.detach().double()
    unembedding = model.get_output_embeddings().weight.detach().double()
    found = values(save(model, "step7"))
    for layer in range(2):
        if family == "gpt2":
            block, last = model.transformer.h[layer], model.transformer.ln_f
            q, k, v = parameters[f"transformer.h.{layer}.attn.c_attn.weight"].T.unflatten(0, (3, 4, 6))
            o, norm = parameters[f"transformer.h.{layer}.attn.c_proj.weight"].T, block.ln_1
        elif family == "gpt_neox":
            block, last = model.gpt_neox.layers[layer], model.gpt_neox.final_layer_norm
            fused = parameters[f"gpt_neox.layers.{layer}.attention.query_key_value.weight"]
            q, k, v = fused.unflatten(0, (4, 3, 6)).unbind(1)
            o, norm = parameters[f"gpt_neox.layers.{layer}.attention.dense.weight"], block.input_layernorm
        else:
            block, last = model.model.layers[layer], model.model.norm
            where, size = f"model.layers.{layer}.self_attn", block.self_attn.head_dim
            q, k, v = (parameters[f"{where}.{name}_proj.weight"].unflatten(0, (-1, size)) for name in "qkv")
            k, v = k[[0, 0, 1, 1]], v[[0, 0, 1, 1]]  # two query heads of each key-value head
            o, norm = parameters[f"{where}.o_proj.weight"], block.input_layernorm
        first, final = gain_of(norm, family), gain_of(last, family)
        for head in range(4):
            out = o[:, head * len(q[head]) : (head + 1) * len(q[head])]
            ov, qk = out @ v[head], q[head].T @ k[head]
            whole = {
                "ov_copying": unembedding @ ov @ embedding.T,
                "ov_copying_folded": unembedding * final @ ov * first @ embedding.T,
                "qk_matching": embedding @ qk @ embedding.T,
                "qk_matching_folded": embedding * first @ qk * first @ embedding.T,
            }
            for name, matrix in whole.items():
                assert found[name, layer, head, ""] == pytest.approx(share_of(matrix), abs=2e-6), (name, layer, head)


def llama_with(copies: float) -> Any:
    """A Llama with unembedding = embedding^T in which each OV circuit is `copies` times a projection."""
    model = make("llama", num_key_value_heads=4)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
        for layer in model.model.layers:
            torch.nn.init.orthogonal_(layer.self_attn.v_proj.weight)
            layer.self_attn.o_proj.weight.copy_(copies * layer.self_attn.v_proj.weight.T)
            layer.self_attn.k_proj.weight.copy_(-copies * layer.self_attn.q_proj.weight)
    return model


@pytest.mark.parametrize("copies", [1.0, -1.0])
def test_a_head_that_passes_on_what_it_reads_copies_all_of_it(copies: float, save: Save) -> None:
    found = values(save(llama_with(copies), "step7"))
    for layer in range(2):
        for head in range(4):
            assert found["ov_copying", layer, head, ""] == pytest.approx(copies, abs=1e-12)
            assert found["qk_matching", layer, head, ""] == pytest.approx(-copies, abs=1e-12)
            assert found["qk_matching_folded", layer, head, ""] == pytest.approx(-copies, abs=1e-6)


def test_one_head_of_the_next_layer_that_reads_only_what_one_head_writes_composes_with_it_alone(save: Save) -> None:
    """The values of layer 1 read the space that head 2 of layer 0 writes; all other spaces are orthogonal to it."""
    model = llama_with(1.0)
    with torch.no_grad():
        first, second = (layer.self_attn for layer in model.model.layers)
        second.v_proj.weight.copy_(first.o_proj.weight.T.roll(-12, 0))  # head 0 reads what head 2 writes
        second.q_proj.weight.copy_(first.o_proj.weight.T)
        second.k_proj.weight.copy_(first.o_proj.weight.T.roll(6, 0))  # head 1 reads what head 0 writes
    found = values(save(model, "step7"))
    for head in range(4):
        for other in range(4):
            place = (1, head, f"0.{other}")
            # of circuits with six equal singular values the share is 1 / sqrt(6) where they match
            for name, partner in (("v", (head + 2) % 4), ("k", (head - 1) % 4), ("q", head)):
                share = 6**-0.5 if other == partner else 0.0
                assert found[f"{name}_composition", *place] == pytest.approx(share, abs=1e-6), (name, place)


def test_nothing_depends_on_the_basis_of_a_head(save: Save) -> None:
    model = make("llama")
    before = values(save(model, "step7"))
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            for group in range(2):
                for inside, outside in (("v_proj", None), ("k_proj", "q_proj")):
                    turn = torch.linalg.qr(torch.randn(6, 6)).Q
                    weight = getattr(attention, inside).weight
                    weight[group * 6 : group * 6 + 6] = turn @ weight[group * 6 : group * 6 + 6]
                    for head in (2 * group, 2 * group + 1):
                        part = slice(head * 6, head * 6 + 6)
                        if outside is None:
                            attention.o_proj.weight[:, part] = attention.o_proj.weight[:, part] @ turn.T
                        else:
                            attention.q_proj.weight[part] = turn @ attention.q_proj.weight[part]
    after = values(save(model, "step8"))
    assert after == pytest.approx(before, abs=1e-5)


def test_the_chance_of_a_composition_is_its_mean_over_rotations() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, o = torch.randn(4, 1, 6, 24, dtype=torch.float64, generator=generator)
    turns = torch.linalg.qr(torch.randn(2000, 24, 24, dtype=torch.float64, generator=generator)).Q
    shares = _shares(_factor(q, k), _factor(v.expand(2000, 6, 24), o @ turns))
    assert float(shares.square().mean()) == pytest.approx(1 / 24, rel=0.02)


@pytest.mark.parametrize("width", [6, 7])
@pytest.mark.parametrize("kind", ["own", "layer", "one more"])
def test_the_gain_of_a_norm_is_found_by_asking_it(kind: str, width: int) -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    norm: Any = {"own": RMSNorm(width, 1e-5), "layer": torch.nn.LayerNorm(width), "one more": GemmaRMSNorm(width)}[kind]
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    subject: Any = SimpleNamespace(
        model=torch.nn.ModuleDict({"norm": norm}),
        anatomy=SimpleNamespace(width=width),
        architecture=SimpleNamespace(body=lambda model: model),
    )
    found, known = _gain(subject, "norm"), norm.weight.detach().double() + (kind == "one more")
    assert found / found.norm() == pytest.approx(known / known.norm(), abs=1e-6)


def test_how_far_apart_layers_may_be(save: Save) -> None:
    place = save(make("llama", num_hidden_layers=4), "step7")
    pairs = {
        most: {(each.layer, int(each.bin[0])) for each in readings(place, most_layers_apart=most) if each.bin}
        for most in (None, 0, 1, 2)
    }
    every = {(later, earlier) for later in range(4) for earlier in range(later)}
    assert pairs == {None: every, 0: set(), 1: {(1, 0), (2, 1), (3, 2)}, 2: every - {(3, 0)}}


def test_what_is_not_known_is_told(save: Save) -> None:
    """OLMo 2 has no norm before the attention, and norms queries and keys."""
    found = list(readings(save(make("olmo2"), "step7")))
    assert all(each.value is None and "norm" in each.reason for each in found if each.name.endswith("_folded"))
    assert all(each.value is not None for each in found if not each.name.endswith("_folded"))
    assert all("queries and keys are normed" in each.note for each in found)


def test_a_model_without_known_attention_is_told_and_others_go_on(save: Save) -> None:
    subject = Subject(open_series(str(save(make("llama"), "step7"))))
    subject.architecture.anatomy = replace(subject.anatomy, parts={}, heads=None)
    with pytest.raises(PicoError, match=r"no embedding, unembedding, attention.query, .*, heads; leave this probe out"):
        list(find_probe("circuits").start({"subject": subject}, {}))


@pytest.mark.parametrize(("weight", "reason"), [(torch.nan, "not a number"), (0.0, "zero")])
def test_one_layer_that_is_zero_or_no_number(weight: float, reason: str, save: Save) -> None:
    model = make("llama")
    torch.nn.init.constant_(model.model.layers[0].self_attn.o_proj.weight, weight)
    for each in readings(save(model, "step7")):
        broken = each.bin or (each.layer == 0 and each.name.startswith("ov"))
        checked = find_probe("circuits").checked(each)
        assert (checked.value is None) == bool(broken), each
        assert (reason in each.reason) == bool(broken), each
