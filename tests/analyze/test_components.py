"""Circuits and heads: by hand from the stored tensors."""

from pathlib import Path

import pytest
import torch

from picolm.address import Address
from picolm.analyze.components import Absent, Operand, operands
from picolm.errors import PicoError
from picolm.models.decoder import anatomy_of
from picolm.store import Run

MODEL = {"d_model": 24, "n_layers": 2, "attention_n_heads": 4, "attention_n_kv_heads": 2}
SIZE = 6


@pytest.fixture
def checkpoint(runs: dict[str, Path]):
    return Run.open(runs["narrow"])[4]


def found(checkpoint, name: str, **asked) -> list[Operand]:
    asked = {
        "split": "val",
        "layer_suffixes": None,
        "layers": "all",
        "heads": True,
        "anatomy": anatomy_of(MODEL),
        "model": MODEL,
    } | asked
    return list(operands(checkpoint, name, **asked))


def tensor(checkpoint, kind: str, name: str) -> torch.Tensor:
    return checkpoint[Address(kind, "" if kind == "weights" else "val", f"layers.1.attention.{name}")].double()


def head_slice(head: int) -> slice:
    return slice(head * SIZE, (head + 1) * SIZE)


@pytest.mark.parametrize("head", range(4))
def test_circuits_of_weights(checkpoint, head: int) -> None:
    q, k, v, o = (tensor(checkpoint, "weights", name) for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
    group = head_slice(head // 2)
    ov = found(checkpoint, "ov_circuit", data_type="weights", layers=[1])[head]
    assert (ov.address, ov.head) == (Address("weights", "", "layers.1.ov_circuit"), head)
    torch.testing.assert_close(ov.load().entries, o[:, head_slice(head)] @ v[group])
    assert ov.load().rank == SIZE
    qk = found(checkpoint, "qk_circuit", data_type="weights", layers=[1])[head]
    torch.testing.assert_close(qk.load().entries, q[head_slice(head)].T @ k[group])


def test_a_layer_is_the_sum_of_its_heads(checkpoint) -> None:
    for name, kind in (
        ("ov_circuit", "weights"),
        ("qk_circuit", "weights"),
        ("ov_circuit", "activations"),
        ("ov_circuit", "gradients"),
    ):
        heads = [operand.load().entries for operand in found(checkpoint, name, data_type=kind, layers=[1])]
        (layer,) = found(checkpoint, name, data_type=kind, layers=[1], heads=False)
        assert layer.head is None
        torch.testing.assert_close(layer.load().entries, sum(heads))
        dense = torch.linalg.svdvals(sum(heads))
        values = layer.load().singular_values
        torch.testing.assert_close(values, dense[: len(values)], atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("name", ["ov_circuit", "qk_circuit"])
def test_the_gradient_of_a_circuit_is_its_first_order_change(checkpoint, name: str) -> None:
    outer, inner = ("o_proj", "v_proj") if name == "ov_circuit" else ("q_proj", "k_proj")
    weights = [tensor(checkpoint, "weights", part) for part in (outer, inner)]
    gradients = [tensor(checkpoint, "gradients", part) for part in (outer, inner)]
    head, group = head_slice(3), head_slice(1)

    def circuit(moved: float) -> torch.Tensor:
        left, right = (w + moved * g for w, g in zip(weights, gradients))
        return left[:, head] @ right[group] if name == "ov_circuit" else left[head].T @ right[group]

    numerical = (circuit(1e-4) - circuit(-1e-4)) / 2e-4
    operand = found(checkpoint, name, data_type="gradients", layers=[1])[3]
    torch.testing.assert_close(operand.load().entries, numerical, atol=1e-9, rtol=1e-6)


def test_activations_of_an_ov_circuit(checkpoint) -> None:
    v, o = tensor(checkpoint, "activations", "v_proj").flatten(0, 1), tensor(checkpoint, "weights", "o_proj")
    operand = found(checkpoint, "ov_circuit", data_type="activations", layers=[1])[2]
    torch.testing.assert_close(operand.load().entries, v[:, head_slice(1)] @ o[:, head_slice(2)].T)


def test_the_heads_of_a_layer_add_up_to_the_output_of_attention_at_the_first_position(runs: dict[str, Path]) -> None:
    """At position 0 a head sees only itself: its OV circuit is all that attention writes."""
    from picolm.train.sample import load_model

    run = Run.open(runs["narrow"])
    model, tokens = load_model(run, 4), torch.tensor(run[4].rows("val")["input_ids"].to_pylist())[:, :1]
    seen = {}
    for name in ("v_proj", "o_proj"):
        module = model.get_submodule(f"layers.1.attention.{name}")
        module.register_forward_hook(lambda m, i, out, name=name: seen.update({name: out[:, 0].double()}))
    with torch.no_grad():
        model(tokens)
    o = tensor(run[4], "weights", "o_proj")
    heads = [seen["v_proj"][:, head_slice(head // 2)] @ o[:, head_slice(head)].T for head in range(4)]
    torch.testing.assert_close(sum(heads), seen["o_proj"], atol=1e-6, rtol=1e-5)


def test_attention_is_what_it_adds_to_the_residual_stream(checkpoint) -> None:
    for kind in ("activations", "weights", "gradients"):
        (operand,) = found(checkpoint, "attention", data_type=kind, layers=[1])
        stored = tensor(checkpoint, kind, "o_proj")
        torch.testing.assert_close(operand.load().entries, stored.flatten(0, -2))


def test_parts_of_heads(checkpoint) -> None:
    o, v = tensor(checkpoint, "weights", "o_proj"), tensor(checkpoint, "weights", "v_proj")
    parts = found(checkpoint, "per_head", data_type="weights", layer_suffixes=("o_proj", "v_proj"), layers=[1])
    assert [part.head for part in parts] == [0, 1, 2, 3, 0, 1]
    torch.testing.assert_close(parts[1].load().entries, o[:, head_slice(1)])
    torch.testing.assert_close(parts[5].load().entries, v[head_slice(1)])
    with pytest.raises(PicoError, match="sum over heads and cannot be split"):
        found(checkpoint, "per_head", data_type="activations", layer_suffixes="o_proj")
    with pytest.raises(PicoError, match="w_2 has no heads"):
        found(checkpoint, "per_head", data_type="weights", layer_suffixes="w_2")


def test_moments_and_embeddings(checkpoint) -> None:
    moments = found(checkpoint, "simple", data_type="exp_avg", layer_suffixes="w_2")
    assert [operand.address for operand in moments] == [
        Address("exp_avg", "", f"layers.{i}.swiglu.w_2") for i in (0, 1)
    ]
    (embedding,) = found(checkpoint, "embedding", data_type="weights")
    assert embedding.load().shape == (64, 24)


def test_what_is_not_captured_is_absent(checkpoint) -> None:
    (first, second) = found(checkpoint, "residual", data_type="activations")
    assert isinstance(first, Absent)
    assert "layer_suffixes: [layers.0]" in first.what
    assert found(checkpoint, "ov_circuit", data_type="gradients", split="test", layers=[0])[0] == Absent(
        "gradients/test/layers.0.attention.o_proj and gradients/test/layers.0.attention.v_proj"
    )
    del second


def test_equal_digests_are_equal_matrices(runs: dict[str, Path]) -> None:
    run = Run.open(runs["narrow"])
    first, second = (found(run[step], "ov_circuit", data_type="weights", layers=[0]) for step in (2, 4))
    assert len({operand.digest for operand in first + second}) == 8
    assert [o.digest for o in first] == [o.digest for o in found(run[2], "ov_circuit", data_type="weights", layers=[0])]
