"""How much gradients of single rows differ, and from how many rows on a larger batch stops to help."""

import math
from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from pydantic import Field

from picolm.address import Address
from picolm.errors import PicoError
from picolm.observe.rows import Rows
from picolm.observe.subject import Subject
from picolm.observe.surface import Surface
from picolm.probes.probe import Found, Quantity, Reading, probe

SQUARE, NOISE = "nats² / weight²", "nats² / weight² × rows"


def _noise(
    of_small: float, of_big: float, small: int, big: int, prefix: str = "", **where: object
) -> Iterator[Reading]:
    """Yield what the mean squared norms of gradients of `small` and of `big` rows say (McCandlish et al. 2018, appendix A.1)."""

    def reading(name: str, value: float | None, reason: str = "", note: str = "") -> Reading:
        return Reading(f"{prefix}{name}", value, reason=reason, note=note, **where)  # type: ignore[arg-type]

    squared = (big * of_big - small * of_small) / (big - small)
    trace = (of_small - of_big) / (1 / small - 1 / big)
    negative = f"the estimate of the squared gradient is {squared:.3g}, not above 0: take more rows"
    yield reading("squared_gradient", squared, note="" if squared > 0 else negative)
    yield reading("trace_sigma", trace)
    yield reading("b_simple", *((trace / squared,) if squared > 0 else (None, negative)))
    noise = max(trace, 0.0) / small
    snr = math.sqrt(of_big / noise) if noise > 0 else None
    yield reading("signal_to_noise", snr, "" if snr is not None else "all gradients are the same")


def _quantities(prefix: str, what: str) -> dict[str, Quantity]:
    return {
        f"{prefix}squared_gradient": Quantity(
            SQUARE, f"G²: squared norm of the true gradient{what}, without what the noise of the rows adds to it"
        ),
        f"{prefix}trace_sigma": Quantity(NOISE, f"trace of the covariance of the gradients{what} of single rows"),
        f"{prefix}b_simple": Quantity("rows", f"simple noise scale{what}: trace_sigma / squared_gradient"),
        f"{prefix}signal_to_noise": Quantity(
            "", f"norm of the mean gradient{what} over the root of the summed variances of those of the small batches"
        ),
    }


@probe(
    "gradient_noise",
    needs=["logits"],
    family="landscape",
    gives={
        "loss": Quantity("nats", "mean loss of the rows"),
        "gradient_norm": Quantity("nats / weight", "norm of the gradient of the mean loss of all rows"),
        "batches": Quantity("batches", "number of small batches whose gradients were computed"),
        **_quantities("", ""),
        **_quantities("part_", " of one parameter"),
    },
)
def gradient_noise(
    subject: Subject,
    rows: Rows,
    *,
    small: Annotated[int, Field(ge=1)] = 1,
    parts: bool = True,
    precision: Literal["float32", "float64"] = "float32",
) -> Found:
    """Compare gradients of small batches of the rows with that of all of them: the gradient noise scale.

    small: rows of a small batch; rows that fill none are left out. Squared norms are averaged over the small batches before
    anything is divided. parts: also by parameter.
    """
    count = len(rows.tokens) // small
    if count < 2:
        raise PicoError(
            f"{len(rows.tokens)} rows are {count} batch(es) of {small}: fewer than two define no noise; take "
            "more rows, or a smaller batch"
        )
    surface = Surface(subject, rows, getattr(torch, precision), small)
    surface.finite_loss()
    mean_D, squares_P = torch.zeros(len(surface.start_D), dtype=torch.float64), [0.0] * len(surface.names)
    for number in range(count):
        gradient_D = surface.gradient(range(number * small, (number + 1) * small)).double()
        mean_D += gradient_D / count
        for place, (_, part) in enumerate(surface.parts(gradient_D)):
            squares_P[place] += float(part.square().sum()) / count
    note = f"of the first {count * small} rows" if count * small < len(rows.tokens) else ""
    yield Reading("loss", surface.loss(range(count * small)), note=note)
    yield Reading("gradient_norm", float(mean_D.norm()), note=note)
    yield Reading("batches", count)
    yield from _noise(sum(squares_P), float(mean_D.square().sum()), small, count * small)
    for (name, part), of_small in zip(surface.parts(mean_D), squares_P if parts else ()):
        address = Address("weights", "", name)
        where = {"layer": address.layer, "bin": address.suffix}
        yield from _noise(of_small, float(part.square().sum()), small, count * small, "part_", **where)
