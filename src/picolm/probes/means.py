"""Means over positions, with their standard errors over rows: positions of one row are not independent."""

import math
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
    mean, number = float(sums.sum() / counts.sum()), len(rows)
    spread = float((sums - mean * counts).square().sum())
    error = math.sqrt(spread * number / (number - 1)) / int(counts.sum()) if number > 1 else None
    return Reading(name, mean, standard_error=error, **where)  # type: ignore[arg-type]
