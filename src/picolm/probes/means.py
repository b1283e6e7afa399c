"""Means over positions, with their standard errors over rows: positions of one row are not independent."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from picolm.probes.probe import Reading


def mean_of(name: str, of_rows: Sequence[Tensor], **where: object) -> Reading:
    """Return the mean of all numbers of all rows as a reading.

    Its standard error is that of a mean of clusters of several sizes, the rows (Cochran 1977, section 9.5); None of one row.
    """
    rows = [row.double() for row in of_rows if row.numel()]
    if not rows:
        return Reading(name, None, reason="there are no positions", **where)  # type: ignore[arg-type]
    sums, counts = torch.stack([row.sum() for row in rows]), torch.tensor([row.numel() for row in rows])
    mean, error = mean_over_rows(sums, counts)
    return Reading(name, float(mean), standard_error=None if error is None else float(error), **where)  # type: ignore[arg-type]


def mean_over_rows(sums_RX: Tensor, counts_R: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return means over the positions of all rows, and their standard errors, as in `mean_of`; float64 [X].

    sums_RX: the sums of each row. counts_R: how many positions each sum is of.
    """
    number, total = len(sums_RX), counts_R.sum()
    counts_R1 = counts_R.view(-1, *[1] * (sums_RX.ndim - 1))
    mean_X = sums_RX.sum(0) / total
    spread_X = (sums_RX - mean_X * counts_R1).square().sum(0)
    return mean_X, (spread_X * number / (number - 1)).sqrt() / total if number > 1 else None


def difference_of(name: str, more: Reading, less: Reading, note: str = "") -> Reading:
    """Return the difference of two means as a reading; its standard error is that of independent samples."""
    if more.value is None or less.value is None:
        return Reading(name, None, reason=more.reason or less.reason)
    errors = [each.standard_error for each in (more, less) if each.standard_error is not None]
    return Reading(
        name, more.value - less.value, standard_error=math.hypot(*errors) if len(errors) == 2 else None, note=note
    )


def means_by(
    name: str,
    of_rows: Sequence[Tensor],
    groups_of_rows: Sequence[Tensor],
    label: Callable[[int], str] = str,
    at_least: int = 1,
) -> Iterator[Reading]:
    """Yield the mean of the numbers of each group as a reading of its own bin, in the order of the groups; see `mean_of`.

    groups_of_rows: for each number its group, a whole number of at least 0. label: the bin of a group. at_least: groups of fewer
    numbers are left out.
    """
    group_N = torch.cat(list(groups_of_rows)).long()
    if not len(group_N):
        return
    number_N, size = torch.cat(list(of_rows)).double(), int(group_N.max()) + 1
    row_N = torch.arange(len(of_rows)).repeat_interleave(torch.tensor([row.numel() for row in of_rows]))
    pair_C, cluster_N = torch.unique(row_N * size + group_N, return_inverse=True)
    group_C, sum_C, count_C = pair_C % size, torch.bincount(cluster_N, number_N), torch.bincount(cluster_N)
    rows_G = torch.bincount(group_C, minlength=size)
    count_G = torch.bincount(group_C, count_C.double(), minlength=size)
    mean_G = torch.bincount(group_C, sum_C, minlength=size) / count_G
    spread_G = torch.bincount(group_C, (sum_C - mean_G[group_C] * count_C).square(), minlength=size)
    error_G = (spread_G * rows_G / (rows_G - 1)).sqrt() / count_G
    for group in torch.nonzero(count_G >= at_least).flatten().tolist():
        error = float(error_G[group]) if rows_G[group] > 1 else None
        yield Reading(name, float(mean_G[group]), bin=label(group), standard_error=error)
