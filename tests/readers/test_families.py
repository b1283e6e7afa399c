"""What is read of each architecture is what its own code computes with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from picolm.address import Address
from picolm.analyze.components import Absent, operands
from picolm.readers.families import FAMILIES
from picolm.store import Checkpoint, Run

from .conftest import CONFIGS, make

pytestmark = pytest.mark.slow


def of(checkpoint: Checkpoint, layer: int, role: str) -> Tensor:
    anatomy: Any = checkpoint.anatomy  # type: ignore[attr-defined]
    return checkpoint[Address("weights", "", f"{anatomy.block.format(layer)}.{anatomy.parts[role].module}")].double()


def bias(model: Any, module: str) -> Tensor | float:
    found = model.get_submodule(module).bias if module in dict(model.named_modules()) else None
    return 0.0 if found is None else found.detach().double()


def value_bias(model: Any, family: str, block: str, heads: int) -> Tensor | float:
    """The bias of the values, cut by hand: by head in GPT-NeoX, the last third in GPT-2."""
    if family == "gpt_neox":
        return bias(model, f"{block}.attention.query_key_value").view(heads, 3, -1)[:, 2].flatten()  # type: ignore[union-attr]
    if family == "gpt2":
        return bias(model, f"{block}.attn.c_attn").chunk(3)[2]  # type: ignore[union-attr]
    return bias(model, f"{block}.self_attn.v_proj")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_heads_that_are_cut_add_up_to_what_attention_computes(family: str, save: Callable[..., Path]) -> None:
    """sum_h A_h (x W_V[g]^T + b_V) W_O[:, h]^T + b_O, with the model's own attention weights A_h and inputs x."""
    model = make(family).double()
    checkpoint = Run.open(save(model, "step7"))[7]
    anatomy = checkpoint.anatomy  # type: ignore[attr-defined]
    heads, groups = anatomy.heads, anatomy.kv_heads
    seen: dict[str, Any] = {}
    for layer in range(anatomy.layers):
        block = anatomy.block.format(layer)
        output = model.get_submodule(f"{block}.{anatomy.parts['attention.output'].module}")
        attention = model.get_submodule(f"{block}.{anatomy.parts['attention.output'].module.rpartition('.')[0]}")
        attention.register_forward_pre_hook(
            lambda module, args, kwargs, layer=layer: seen.__setitem__(f"x{layer}", args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )  # fmt: skip
        output.register_forward_hook(lambda module, args, result, layer=layer: seen.__setitem__(f"out{layer}", result))
    tokens = torch.randint(1, 61, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        patterns = model(tokens, output_attentions=True).attentions
    for layer in range(anatomy.layers):
        block = anatomy.block.format(layer)
        value, output = of(checkpoint, layer, "attention.value"), of(checkpoint, layer, "attention.output")
        values_BTE = seen[f"x{layer}"] @ value.T + value_bias(model, family, block, heads)
        size = value.shape[0] // groups
        total = sum(
            patterns[layer][:, head]
            @ values_BTE[..., (head * groups // heads) * size :][..., :size]
            @ output[:, head * size : (head + 1) * size].T
            for head in range(heads)
        ) + bias(model, f"{block}.{anatomy.parts['attention.output'].module}")
        torch.testing.assert_close(total, seen[f"out{layer}"], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_queries_and_keys_give_the_scores(family: str, save: Callable[..., Path]) -> None:
    """At position 0 nothing is turned: the score of the first token with itself is q k, where nothing norms them."""
    model = make(family).double()
    checkpoint = Run.open(save(model, "step7"))[7]
    anatomy = checkpoint.anatomy  # type: ignore[attr-defined]
    total = of(checkpoint, 0, "attention.query").shape[0] // anatomy.heads
    assert of(checkpoint, 0, "attention.key").shape == of(checkpoint, 0, "attention.value").shape
    assert of(checkpoint, 0, "attention.key").shape[0] == anatomy.kv_heads * total
    block, fused = anatomy.block.format(0), FAMILIES[family].fused
    if fused is None:
        for role in ("query", "key"):
            module = anatomy.parts[f"attention.{role}"].module
            assert torch.equal(of(checkpoint, 0, f"attention.{role}"), model.get_submodule(f"{block}.{module}").weight)
        return
    weight = model.get_submodule(f"{block}.{fused}").weight.detach()
    weight = weight.T if family == "gpt2" else weight
    x = torch.randn(weight.shape[1], dtype=torch.float64)
    whole = weight @ x
    query, key, value = (of(checkpoint, 0, f"attention.{role}") @ x for role in ("query", "key", "value"))
    by_head = [torch.cat([part.view(-1, total)[head] for part in (query, key, value)]) for head in range(anatomy.heads)
               ] if family == "gpt_neox" else [query, key, value]  # fmt: skip
    torch.testing.assert_close(torch.cat(by_head), whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_an_address_of_the_same_numbers(family: str, save: Callable[..., Path]) -> None:
    model = make(family)
    checkpoint = Run.open(save(model, "step7"))[7]
    for name, parameter in model.named_parameters():
        stored = checkpoint[Address("weights", "", name.removesuffix(".weight"))]
        turned = name.removesuffix(".weight").endswith(FAMILIES[family].transposed or ("no such module",))
        assert torch.equal(stored.T if turned else stored, parameter), name
    for address in checkpoint:
        assert checkpoint.shape(address) == tuple(checkpoint[address].shape)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("component", ["ov_circuit", "qk_circuit", "per_head", "mlp", "attention", "embedding"])
def test_components_find_their_parts(family: str, component: str, save: Callable[..., Path]) -> None:
    checkpoint = Run.open(save(make(family), "step7"))[7]
    asked: dict[str, Any] = {
        "data_type": "weights",
        "split": "",
        "layer_suffixes": None,
        "layers": "all",
        "heads": True,
    }
    found = list(operands(checkpoint, component, anatomy=checkpoint.anatomy, model={}, **asked))  # type: ignore[attr-defined]
    count = {"ov_circuit": 8, "qk_circuit": 8, "mlp": 2, "attention": 2, "embedding": 1}
    kv_heads = 2 * checkpoint.anatomy.kv_heads  # type: ignore[attr-defined]
    assert len(found) == count.get(component, kv_heads)
    for operand in found:
        assert not isinstance(operand, Absent)
        assert operand.load().shape[0] > 0
