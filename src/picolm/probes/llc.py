"""The local learning coefficient: how the loss grows around a checkpoint, measured by a chain that walks near it.

Legend: D parameters, C chains that are walked at once.
"""

import math
from collections.abc import Callable, Iterator
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from picolm.errors import PicoError
from picolm.observe.rows import Rows
from picolm.observe.subject import Subject
from picolm.observe.surface import Surface
from picolm.probes.probe import Found, Quantity, Reading, probe
from picolm.seeds import derive

Sampler = Literal["sgld", "rmsprop_sgld"]
Positive = Annotated[float, Field(gt=0)]
Potential = Callable[[Tensor, int], tuple[Tensor | float, Tensor]]
"""The loss at a place and its gradient there. Its second argument is the number of the draw, which may choose the rows."""
CURVATURES = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
TRACE = 40  # points of a trace, at most


class Settings(NamedTuple):
    """How a chain walks.

    nbeta: weight of the loss; localization: strength of the pull towards the start (gamma). decay, damping: for rmsprop_sgld, of
    the running mean of squared gradients, and what is added to its root.
    """

    nbeta: float
    step_size: float
    localization: float
    burn_in: int
    draws: int
    sampler: Sampler = "sgld"
    decay: float = 0.99
    damping: float = 0.1


def sample(
    potential: Potential,
    start_D: Tensor,
    settings: Settings,
    generator: torch.Generator,
    ceiling: float = math.inf,
) -> Tensor:
    """Return the loss before each step of a chain, burn-in included, [burn_in + draws]; [burn_in + draws, C] for a start [C, D].

    SGLD (Welling and Teh 2011) of exp(-nbeta L(w) - localization |w - start|^2 / 2), as in Lau et al. 2023: a step adds
    -step_size/2 (nbeta grad L + localization (w - start)) and normal noise of variance step_size. rmsprop_sgld multiplies the
    step size of each parameter by 1 / (root of the running mean of its squared gradients + damping) (Li et al. 2016, without
    their term for how that factor changes). Raises PicoError where the loss is not a number or is above `ceiling`.
    """
    place_D, squares_D, losses = start_D.clone(), torch.zeros_like(start_D), list[Tensor]()
    size: Tensor | float = settings.step_size
    for draw in range(settings.burn_in + settings.draws):
        loss, gradient_D = potential(place_D, draw)
        losses.append(torch.as_tensor(loss, dtype=torch.float64))
        if not (losses[-1] <= ceiling).all() or losses[-1].isinf().any():
            raise PicoError(
                f"the chain explodes: its loss is {losses[-1].max():.4g} at draw {draw}; lower step_size, now "
                f"{settings.step_size:g}, or raise localization, now {settings.localization:g}"
            )
        if settings.sampler == "rmsprop_sgld":
            squares_D.mul_(settings.decay).addcmul_(gradient_D, gradient_D, value=1 - settings.decay)
            size = settings.step_size / (squares_D.sqrt() + settings.damping)
        pull_D = settings.nbeta * gradient_D + settings.localization * (place_D - start_D)
        noise_D = torch.randn(start_D.shape, generator=generator, dtype=start_D.dtype)
        place_D = place_D - size / 2 * pull_D + size**0.5 * noise_D
    return torch.stack(losses)


def read_of_regular(curvature: float, settings: Settings) -> tuple[float, float]:
    """Return what SGLD reads of a direction w with the loss `curvature` w^2 / 2, whose coefficient is 1/2: when the chain has
    settled, and as the mean of these draws of a chain that starts at w = 0. Raises PicoError where steps of this size diverge.

    Both are exact: a step is w' = r w + noise with r = 1 - step_size a / 2, a = nbeta curvature + localization, so the variance
    of draw t is (1 - r^2t) / (a (1 - step_size a / 4)).
    """
    a = settings.nbeta * curvature + settings.localization
    if settings.step_size * a >= 4:
        raise PicoError(f"steps diverge at this curvature: step_size * a is {settings.step_size * a:.4g}, 4 or more")
    if a == 0:
        return 0.0, 0.0
    shrink = (1 - settings.step_size * a / 2) ** 2
    settled = settings.nbeta * curvature / (2 * a * (1 - settings.step_size * a / 4))
    missing = shrink**settings.burn_in * (1 - shrink**settings.draws) / (settings.draws * (1 - shrink))
    return settled, settled * (1 - missing)


@probe(
    "llc",
    needs=["logits"],
    family="landscape",
    gives={
        "llc": Quantity("", "nbeta (mean loss of the draws after burn-in - loss of the checkpoint), mean over chains"),
        "chain_llc": Quantity("", "the same of one chain"),
        "drift": Quantity(
            "", "nbeta (mean loss of the second half of the draws - that of the first half), mean over chains"
        ),
        "start_loss": Quantity("nats per token", "loss of the checkpoint itself on all rows"),
        "trace_loss": Quantity("nats per token", "mean loss of these draws over chains; burn-in comes first"),
        "regular_settled": Quantity(
            "share of the truth", "what a settled chain of this step size reads of a direction with this curvature"
        ),
        "regular_read": Quantity(
            "share of the truth", "what these draws read of a direction with this curvature, on average"
        ),
        "step_pull": Quantity("", "step_size (nbeta curvature + localization); 4 or more diverges"),
    },
)
def llc(
    subject: Subject,
    rows: Rows,
    *,
    sampler: Sampler = "sgld",
    chains: Annotated[int, Field(ge=1, le=1000)] = 4,
    draws: Annotated[int, Field(ge=1)] = 200,
    burn_in: Annotated[int, Field(ge=0)] = 50,
    step_size: Positive = 1e-4,
    localization: Annotated[float, Field(ge=0)] = 1000.0,
    nbeta: Positive | None = None,
    batch: Annotated[int, Field(ge=1)] | None = None,
    precision: Literal["float64", "float32"] = "float64",
    seed: int = 0,
) -> Found:
    """Estimate the local learning coefficient by chains that walk around the checkpoint.

    As in Lau et al. 2023. batch: rows of each draw, drawn anew (default: all). nbeta: n / ln n of n rows if it is not given; the
    loss is the mean over tokens. What the settings do to a regular direction is known and is given beside the estimate.
    """
    count = len(rows.tokens)
    if nbeta is None and count == 1:
        raise PicoError("nbeta of one row, n / ln n, is not defined; give nbeta, or more rows")
    settings = Settings(nbeta or count / math.log(count), step_size, localization, burn_in, draws, sampler)
    surface = Surface(subject, rows, getattr(torch, precision))
    start = surface.loss()
    if not math.isfinite(start):
        raise PicoError(f"the loss of the checkpoint is {start}, so nothing can be compared with it")
    ceiling = start + math.log(surface.model.config.vocab_size)  # worse than this, nothing of what it knew is left
    traces = []
    for chain in range(chains):
        generator = torch.Generator().manual_seed(derive(seed, "llc noise", chain))
        potential = _potential(surface, count, batch, seed, chain)
        traces.append(sample(potential, surface.start_D, settings, generator, ceiling))
    loss_CT = torch.stack(traces)
    excess_CT = settings.nbeta * (loss_CT[:, burn_in:] - start)
    yield _over_chains("llc", excess_CT.mean(1))._replace(note=_settings_in_words(settings, chains, batch, count))
    for chain, number in enumerate(excess_CT.mean(1).tolist()):
        yield Reading("chain_llc", number, bin=str(chain))
    half = draws // 2
    if half:
        yield _over_chains("drift", excess_CT[:, half:].mean(1) - excess_CT[:, :half].mean(1))
    else:
        yield Reading("drift", None, reason="one draw has no halves")
    yield Reading("start_loss", start)
    width = math.ceil((burn_in + draws) / TRACE)
    for number, part_CT in enumerate(loss_CT.split(width, 1)):
        first = number * width
        yield _over_chains("trace_loss", part_CT.mean(1))._replace(bin=f"{first}-{first + part_CT.shape[1] - 1}")
    yield from _bias(settings)


def _potential(surface: Surface, count: int, batch: int | None, seed: int, chain: int) -> Potential:
    """Return the loss of all rows, or of `batch` of them, which each draw of each chain chooses for itself."""

    def at(place_D: Tensor, draw: int) -> tuple[float, Tensor]:
        rows = None
        if batch is not None and batch < count:
            generator = torch.Generator().manual_seed(derive(seed, "llc rows", chain, draw))
            rows = torch.randperm(count, generator=generator)[:batch].tolist()
        surface.move(place_D)
        return surface.loss_and_gradient(rows)

    return at


def _over_chains(name: str, of_chains_C: Tensor) -> Reading:
    """Return the mean over chains with its standard error, which one chain does not give."""
    count = len(of_chains_C)
    error = float(of_chains_C.std()) / math.sqrt(count) if count > 1 else None
    return Reading(name, float(of_chains_C.mean()), standard_error=error)


def _bias(settings: Settings) -> Iterator[Reading]:
    """Yield what the settings do to directions of several curvatures."""
    for curvature in CURVATURES:
        label, names = f"{curvature:g}", ("regular_settled", "regular_read")
        a = settings.nbeta * curvature + settings.localization
        if settings.sampler != "sgld":
            why = "with rmsprop_sgld the step size of each parameter depends on its gradients; there is no closed form"
            yield from (Reading(name, None, bin=label, reason=why) for name in (*names, "step_pull"))
            continue
        yield Reading("step_pull", settings.step_size * a, bin=label)
        try:
            for name, number in zip(names, read_of_regular(curvature, settings)):
                yield Reading(name, 2 * number, bin=label)
        except PicoError as error:
            yield from (Reading(name, None, bin=label, reason=str(error)) for name in names)


def _settings_in_words(settings: Settings, chains: int, batch: int | None, count: int) -> str:
    half, most = (
        settings.localization / settings.nbeta,
        (4 / settings.step_size - settings.localization) / settings.nbeta,
    )
    words = (
        f"{chains} chain(s) of {settings.draws} draws after {settings.burn_in} of burn-in, of {min(batch or count, count)} of "
        f"{count} rows each; nbeta {settings.nbeta:.4g}, localization {settings.localization:g}, step_size {settings.step_size:g}"
    )
    if settings.sampler != "sgld":
        return f"{words}, damping {settings.damping:g}, decay {settings.decay:g}"
    return f"{words}: a direction of curvature {half:.3g} reads half of its truth; steps diverge above curvature {most:.3g}"
