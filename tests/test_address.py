"""The identity of a tensor."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from picolm.address import Address, has_suffix

word = st.from_regex(r"[a-z_0-9.]+", fullmatch=True)


@given(word, word | st.just(""), word)
def test_text_and_back(kind: str, split: str, module: str) -> None:
    address = Address(kind, split, module)
    assert Address.parse(str(address)) == address


def test_its_parts() -> None:
    address = Address("gradients", "train", "layers.11.attention.o_proj")
    assert (address.layer, address.suffix) == (11, "attention.o_proj")
    assert (Address("weights", "", "output_norm").layer, Address("weights", "", "output_norm").suffix) == (
        None,
        "output_norm",
    )
    with pytest.raises(ValueError, match="not an address"):
        Address.parse("weights")


@pytest.mark.parametrize(
    ("module", "layer", "suffix"),
    [
        ("layers.3", 3, ""),
        ("layers.3.attention.o_proj", 3, "attention.o_proj"),
        ("layers.3.mlp.layers.0", 3, "mlp.layers.0"),
        ("gpt_neox.layers.11", 11, ""),
        ("gpt_neox.layers.11.attention.dense", 11, "attention.dense"),
        ("transformer.h.3", 3, ""),
        ("transformer.h.3.attn.c_proj", 3, "attn.c_proj"),
        ("blocks.0", 0, ""),
        ("encoder.layer.7.output.dense", 7, "output.dense"),
        ("decoder.block.2.layer.1", 2, "layer.1"),
        ("layers", None, "layers"),
        ("players.3", None, "players.3"),
        ("layers.3x", None, "layers.3x"),
        ("output_norm", None, "output_norm"),
    ],
)
def test_a_block_and_what_is_in_it_have_its_number(module: str, layer: int | None, suffix: str) -> None:
    address = Address("activations", "val", module)
    assert (address.layer, address.suffix) == (layer, suffix)


def test_stacks_of_blocks_are_told_apart() -> None:
    names = ("layers.3", "encoder.layers.0.mlp", "decoder.layers.0.mlp", "transformer.h.1.attn", "output_norm")
    stacks = [Address("weights", "", name).stack for name in names]
    assert stacks == ["layers", "encoder.layers", "decoder.layers", "transformer.h", ""]


def test_a_suffix_is_of_whole_words() -> None:
    assert has_suffix("layers.0.attention.o_proj", "o_proj")
    assert has_suffix("layers.0.attention.o_proj", "attention.o_proj")
    assert not has_suffix("layers.0.attention.o_proj", "proj")
    assert not has_suffix("layers.10.x", "0.x")
