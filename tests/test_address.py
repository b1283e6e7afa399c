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


def test_a_suffix_is_of_whole_words() -> None:
    assert has_suffix("layers.0.attention.o_proj", "o_proj")
    assert has_suffix("layers.0.attention.o_proj", "attention.o_proj")
    assert not has_suffix("layers.0.attention.o_proj", "proj")
    assert not has_suffix("layers.10.x", "0.x")
