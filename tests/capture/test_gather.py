"""Rows come back in the order of the data; several processes are the matter of tests/distributed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from picolm.address import Address
from picolm.capture.taps import full_tensor, gather_rows, is_first, laid_out_like, on_every_process, whole_tensors


@given(st.permutations(range(7)))
def test_rows_are_sorted_by_their_places(places: list[int]) -> None:
    rows = torch.arange(7.0)[:, None] * torch.ones(3)
    found = gather_rows(rows[places], places)
    assert found is not None
    assert torch.equal(found, rows)


def test_one_process_is_the_first_and_has_everything_whole() -> None:
    weight = torch.randn(3, 4, requires_grad=True)
    assert is_first()
    copy = full_tensor(weight)
    assert copy is not None
    assert torch.equal(copy, weight)
    assert copy.data_ptr() != weight.data_ptr()
    assert not copy.requires_grad
    tensors = {Address("weights", "", "a"): weight}
    assert whole_tensors(tensors)[Address("weights", "", "a")] is weight  # copied by whoever keeps it, once
    assert on_every_process(weight) is weight
    assert laid_out_like(copy, weight) is copy


@pytest.mark.parametrize("count", [0, 1])
def test_no_rows_are_rows_too(count: int) -> None:
    found = gather_rows(torch.ones(count, 2, 3), list(range(count)))
    assert found is not None
    assert found.shape == (count, 2, 3)
