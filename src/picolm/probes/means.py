"""Means over positions, with their standard errors over rows: positions of one row are not independent."""

from collections.abc import Sequence

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
