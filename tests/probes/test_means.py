"""Means by group, against those of each group alone."""

import math

import pytest
import torch

from picolm.probes.means import mean_of, means_by


def test_the_mean_of_a_group_is_that_of_its_numbers_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(size, generator=generator) for size in (7, 1, 12, 5)]
    groups = [torch.randint(0, 4, (len(row),), generator=generator) for row in values]
    groups[0][0] = 6  # a group of one number
    found = {reading.bin: reading for reading in means_by("x", values, groups, "g{}".format)}
    assert list(found) == [f"g{group}" for group in sorted(set(torch.cat(groups).tolist()))]
    for group in set(torch.cat(groups).tolist()):
        alone = mean_of("x", [row[of == group] for row, of in zip(values, groups)])
        assert found[f"g{group}"].value == pytest.approx(alone.value)
        assert found[f"g{group}"].standard_error == pytest.approx(alone.standard_error)
    assert found["g6"].standard_error is None


def test_small_groups_are_left_out_and_nothing_gives_nothing() -> None:
    values, groups = [torch.tensor([1.0, 2.0, 3.0])], [torch.tensor([0, 1, 1])]
    assert [reading.bin for reading in means_by("x", values, groups, at_least=2)] == ["1"]
    assert list(means_by("x", [torch.empty(0)], [torch.empty(0)])) == []
    assert math.isnan(next(means_by("x", [torch.tensor([math.nan])], [torch.tensor([0])])).value or 0)
