"""The curvature of the loss on fixed rows: extreme eigenvalues and trace of its Hessian, and of the Hessian as Adam sees it.

Legend: D parameters, M vectors of the Krylov space, K eigenvalues, S probe vectors.
"""

import math
from collections.abc import Callable, Generator, Iterator
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from picolm.address import Address
from picolm.errors import PicoError
from picolm.observe.optimizer import second_moments, stated_optimizer
from picolm.observe.rows import Rows
from picolm.observe.subject import Subject
from picolm.observe.surface import Surface
from picolm.probes.probe import Found, Quantity, Reading, probe
from picolm.seeds import derive

Product = Callable[[Tensor], Tensor]
"""From a vector [D], or several [K, D], to their products with a symmetric matrix."""
Precision = Literal["float64", "float32"]
Count = Annotated[int, Field(ge=0, le=1000)]
LARGEST_WHOLE = 5000  # parameters: the whole matrix of so many takes 200 MB
TOGETHER = 2**20  # entries of the vectors that are multiplied at once
NEGATIVE = -1e-6


class Extremes(NamedTuple):
    """Eigenvalues at both ends of a spectrum.

    values_K: the largest ones in falling order, then the smallest ones in rising order; bins_K: their numbers, 1, 2, … and -1,
    -2, …; residuals_K: |A v - λ v| of each unit vector of vectors_KD; products: how many were needed; converged_K: whether the
    residual is within the tolerance.
    """

    values_K: Tensor
    bins_K: list[int]
    residuals_K: Tensor
    vectors_KD: Tensor
    products: int
    converged_K: Tensor


class Asked(NamedTuple):
    """What is asked of a spectrum: the options of the probes, which say what they are."""

    largest: int
    smallest: int
    iterations: int
    tolerance: float
    probes: int
    full: bool
    seed: int


def lanczos(product: Product, start_D: Tensor, asked: Asked) -> Extremes:
    """Return the largest and smallest eigenvalues of a symmetric matrix, by Lanczos with full reorthogonalization.

    A residual takes no further product: it is the last off-diagonal entry of the tridiagonal matrix times the last entry of its
    eigenvector (Parlett 1998, section 13.2). Ends when all are within the tolerance. Of an eigenvalue that occurs several times
    one is found. Takes memory for M vectors.
    """
    most = min(asked.iterations, len(start_D))
    basis_MD = start_D.new_empty(most, len(start_D))
    basis_MD[0] = start_D / start_D.norm()
    diagonal, beside = list[float](), list[float]()
    for m in range(1, most + 1):
        next_D = product(basis_MD[m - 1])
        diagonal.append(float(basis_MD[m - 1] @ next_D))
        for _ in range(2):  # the second time removes what rounding left
            next_D = next_D - (basis_MD[:m] @ next_D) @ basis_MD[:m]
        beside.append(float(next_D.norm()))
        last = m == most or beside[-1] <= 1e-12 * max(map(abs, diagonal))  # the product leads out of the space no more
        if last or (m >= asked.largest + asked.smallest and m % max(1, m // 10) == 0):
            found = _of_krylov(diagonal, beside, basis_MD[:m], asked)
            if last or bool(found.converged_K.all()):
                return found
        basis_MD[m] = next_D / beside[-1]
    raise ValueError("iterations: at least 1")


def _of_krylov(diagonal: list[float], beside: list[float], basis_MD: Tensor, asked: Asked) -> Extremes:
    """Return the eigenvalues of the tridiagonal matrix that a Krylov space leads to."""
    between = torch.tensor(beside[:-1], dtype=torch.float64)
    tridiagonal_MM = torch.tensor(diagonal, dtype=torch.float64).diag() + between.diag(1) + between.diag(-1)
    values_M, vectors_MM = torch.linalg.eigh(tridiagonal_MM)
    chosen, bins_K = _ends(len(values_M), asked)
    residuals_K = (beside[-1] * vectors_MM[-1, chosen]).abs()
    converged_K = residuals_K <= asked.tolerance * values_M.abs().max()
    vectors_KD = vectors_MM[:, chosen].T.to(basis_MD.dtype) @ basis_MD
    return Extremes(values_M[chosen], bins_K, residuals_K, vectors_KD, len(basis_MD), converged_K)


def _ends(size: int, asked: Asked) -> tuple[list[int], list[int]]:
    """Return the places of the wanted ones of `size` rising numbers, the largest ones first, and their bins."""
    largest, smallest = min(asked.largest, size), min(asked.smallest, size)
    return (
        [*range(size - 1, size - 1 - largest, -1), *range(smallest)],
        [*range(1, largest + 1), *range(-1, -smallest - 1, -1)],
    )


def spectrum(surface: Surface, product: Product, asked: Asked) -> Generator[Reading, Any, Extremes]:
    """Yield the readings of a matrix of second derivatives, and return its extreme eigenvalues. Raises PicoError for a model too
    large for its whole matrix.
    """
    size, dtype = len(surface.start_D), surface.start_D.dtype
    if asked.full:
        matrix_DD = _whole(product, size, dtype)
        values_D, vectors_DD = torch.linalg.eigh(matrix_DD)
        chosen, bins_K = _ends(size, asked)
        vectors_KD = vectors_DD[:, chosen].T
        residuals_K = (vectors_KD @ matrix_DD - values_D[chosen, None] * vectors_KD).norm(dim=1)
        found = Extremes(values_D[chosen], bins_K, residuals_K, vectors_KD, size, torch.ones(len(chosen)).bool())
        yield Reading("negative_eigenvalues", int((values_D < NEGATIVE).sum()))
        yield from _exact_trace(surface, matrix_DD)
    else:
        generator = torch.Generator().manual_seed(derive(asked.seed, "first vector of lanczos"))
        found = lanczos(product, torch.randn(size, generator=generator, dtype=torch.float64).to(dtype), asked)
        yield from _estimated_trace(surface, product, asked)
    yield Reading("products", found.products)
    for value, number, residual, converged in zip(
        found.values_K.tolist(), found.bins_K, found.residuals_K.tolist(), found.converged_K.tolist()
    ):
        note = "" if converged else f"not converged after {found.products} products: its residual is {residual:.2g}"
        if number in (1, -1):
            yield Reading("largest_eigenvalue" if number == 1 else "smallest_eigenvalue", value, note=note)
        yield Reading("eigenvalue", value, bin=str(number), note=note)
        yield Reading("residual", residual, bin=str(number))
    return found


def _whole(product: Product, size: int, dtype: torch.dtype) -> Tensor:
    if size > LARGEST_WHOLE:
        raise PicoError(
            f"full: the whole matrix of {size} parameters is too large (at most {LARGEST_WHOLE}); leave it out, and set probes "
            "for the trace"
        )
    units = torch.eye(size, dtype=dtype).split(max(1, min(64, TOGETHER // size)))
    matrix_DD = torch.cat([product(some_KD) for some_KD in units])
    return (matrix_DD + matrix_DD.T) / 2


def _exact_trace(surface: Surface, matrix_DD: Tensor) -> Iterator[Reading]:
    diagonal_D = matrix_DD.diag()
    yield Reading("trace", float(diagonal_D.sum()))
    yield Reading("frobenius", float(matrix_DD.norm()))
    yield Reading("trace_variance", 2 * float(matrix_DD.square().sum() - diagonal_D.square().sum()))
    for name, part in surface.parts(diagonal_D):
        yield _of_part("part_trace", name, float(part.sum()))


def _estimated_trace(surface: Surface, product: Product, asked: Asked) -> Iterator[Reading]:
    """Yield the trace by vectors of ±1, whole and by part (Hutchinson 1990), and the norm that the same products give."""
    if not asked.probes:
        return
    size, parts, squares = len(surface.start_D), list[list[float]](), list[float]()
    for numbers in torch.arange(asked.probes).split(max(1, min(64, TOGETHER // size))):
        seeds = [derive(asked.seed, "vector of the trace", int(number)) for number in numbers]
        signs_KD = torch.stack([_signs(size, seed) for seed in seeds]).to(surface.start_D.dtype)
        products_KD = product(signs_KD if len(signs_KD) > 1 else signs_KD[0]).view_as(signs_KD)
        squares += products_KD.double().square().sum(1).tolist()
        for terms_D in (signs_KD * products_KD).double():
            parts.append([float(part.sum()) for _, part in surface.parts(terms_D)])
    parts_SP, squares_S = torch.tensor(parts, dtype=torch.float64), torch.tensor(squares, dtype=torch.float64)
    yield _mean("trace", parts_SP.sum(1))
    square = _mean("", squares_S)
    root = math.sqrt(square.value or 0.0)
    error = square.standard_error / (2 * root) if square.standard_error is not None and root else None
    yield Reading("frobenius", root, standard_error=error)
    if asked.probes > 1:
        yield Reading("trace_variance", float(parts_SP.sum(1).var()))
    for name, of_part_S in zip(surface.names, parts_SP.T):
        mean = _mean("", of_part_S)
        yield _of_part("part_trace", name, mean.value, mean.standard_error)


def _signs(size: int, seed: int) -> Tensor:
    return torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def _mean(name: str, values_S: Tensor) -> Reading:
    error = float(values_S.std()) / math.sqrt(len(values_S)) if len(values_S) > 1 else None
    return Reading(name, float(values_S.mean()), standard_error=error)


def _of_part(name: str, parameter: str, value: float | None, error: float | None = None) -> Reading:
    address = Address("weights", "", parameter)
    return Reading(name, value, layer=address.layer, bin=address.suffix, standard_error=error)


def _quantities(units: str, matrix: str) -> dict[str, Quantity]:
    """Return what the readings of `spectrum` are."""
    return {
        "largest_eigenvalue": Quantity(units, f"largest eigenvalue of {matrix} (with its sign, not the largest in magnitude)"),
        "smallest_eigenvalue": Quantity(units, f"smallest eigenvalue of {matrix}, below 0 off a minimum"),
        "eigenvalue": Quantity(units, f"eigenvalues of {matrix}: bin 1 is the largest, bin -1 the smallest one"),
        "residual": Quantity(units, "|A v - λ v| of the eigenvalue of this bin: so near to it there is one for certain"),
        "products": Quantity("products", "number of products with the matrix that the eigenvalues took"),
        "trace": Quantity(units, f"trace of {matrix}: mean of v·Av over vectors v of ±1, or of the whole matrix"),
        "part_trace": Quantity(units, "the share of one parameter in the trace"),
        "trace_variance": Quantity(f"({units})²", "variance of v·Av over vectors v of ±1"),
        "frobenius": Quantity(units, f"root of the sum of squares of {matrix}, from the mean of |Av|² over vectors v of ±1"),
        "negative_eigenvalues": Quantity("eigenvalues", f"how many are below {NEGATIVE:g} (of the whole matrix)"),
        "learning_rate": Quantity("", "learning rate of the update from this step to the next one"),
    }  # fmt: skip


@probe(
    "hessian",
    needs=["logits"],
    family="landscape",
    gives={
        "loss": Quantity("nats", "mean loss of the rows"),
        "gradient_norm": Quantity("nats / weight", "norm of the gradient of this loss"),
        **_quantities("nats / weight²", "the Hessian of the mean loss of the rows"),
        "gradient_energy": Quantity(
            "share", "share of the squared gradient in the space of the so many first eigenvectors"
        ),
        "stability_line": Quantity(
            "nats / weight²", "2 / learning rate: above it plain gradient descent at this rate does not converge"
        ),
    },
)
def hessian(
    subject: Subject,
    rows: Rows,
    *,
    largest: Count = 1,
    smallest: Count = 1,
    iterations: Annotated[int, Field(ge=1, le=5000)] = 100,
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 1e-5,
    probes: Annotated[int, Field(ge=0, le=100_000)] = 0,
    full: bool = False,
    precision: Precision = "float64",
    learning_rate: Annotated[float, Field(gt=0)] | None = None,
    seed: int = 0,
) -> Found:
    """Measure the curvature of the mean loss of the rows: extreme eigenvalues of its Hessian, and its trace.

    The `largest` and `smallest` eigenvalues by Lanczos on products with the Hessian, until all residuals are within `tolerance`
    times the largest magnitude, in at most `iterations` products, each of which keeps a vector of the size of the model. The
    trace by `probes` vectors of ±1 (0: none). full: everything from the whole matrix, for models of at most 5,000 parameters.
    """
    surface = Surface(subject, rows, getattr(torch, precision))
    yield Reading("loss", surface.finite_loss())
    gradient_D = surface.gradient()
    yield Reading("gradient_norm", float(gradient_D.norm()))
    asked = Asked(largest, smallest, iterations, tolerance, probes, full, seed)
    found = yield from spectrum(surface, surface.hessian_product, asked)
    along_K = (found.vectors_KD[: found.bins_K.count(1) and max(found.bins_K)] @ gradient_D).square()
    for number, energy in enumerate((along_K.cumsum(0) / gradient_D.square().sum()).tolist(), 1):
        yield Reading(
            "gradient_energy", energy, bin=str(number), reason="" if energy == energy else "the gradient is 0"
        )
    if (rate := _rate(subject, learning_rate)) is not None:
        yield Reading("learning_rate", rate)
        yield _line("stability_line", 2.0, rate)


@probe(
    "adam_hessian",
    needs=["logits", "optimizer"],
    family="landscape",
    gives={
        **_quantities("1 / learning rate", "P^-1/2 H P^-1/2, with H the Hessian of the mean loss of the rows"),
        "adaptive_stability_line": Quantity(
            "1 / learning rate",
            "(2 + 2 beta1) / ((1 - beta1) learning rate): above it Adam at this rate is unstable (Cohen et al. 2022)",
        ),
    },
)
def adam_hessian(
    subject: Subject,
    rows: Rows,
    *,
    largest: Count = 1,
    smallest: Count = 1,
    iterations: Annotated[int, Field(ge=1, le=5000)] = 100,
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 1e-5,
    probes: Annotated[int, Field(ge=0, le=100_000)] = 0,
    full: bool = False,
    precision: Precision = "float64",
    learning_rate: Annotated[float, Field(gt=0)] | None = None,
    beta1: Annotated[float, Field(ge=0, lt=1)] | None = None,
    beta2: Annotated[float, Field(ge=0, lt=1)] | None = None,
    eps: Annotated[float, Field(ge=0)] | None = None,
    seed: int = 0,
) -> Found:
    """Measure the curvature as Adam sees it: of P^-1/2 H P^-1/2, P = sqrt(second moment / (1 - beta2^t)) + eps.

    As in Cohen et al. 2022 (arXiv 2207.14484). Needs the state of the optimizer. learning_rate, beta1, beta2 and eps are those of
    the run's configuration, and have to be stated for a run of other trainers. The other options are those of `hessian`.
    """
    stated = stated_optimizer(subject.run, subject.checkpoint.step)
    if stated is not None:
        betas = stated[0].betas
        beta1 = betas[0] if beta1 is None else beta1
        beta2 = betas[1] if beta2 is None else beta2
        eps = stated[0].eps if eps is None else eps
    if beta2 is None or eps is None:
        raise PicoError(f"what Adam of {subject.run.name} was set to is not known; state beta2 and eps")
    surface = Surface(subject, rows, getattr(torch, precision))
    surface.finite_loss()
    scale_D = _preconditioner(subject, surface, beta2, eps).rsqrt()
    asked = Asked(largest, smallest, iterations, tolerance, probes, full, seed)
    yield from spectrum(surface, lambda vector_D: scale_D * surface.hessian_product(scale_D * vector_D), asked)
    if (rate := _rate(subject, learning_rate)) is not None and beta1 is not None:
        yield Reading("learning_rate", rate)
        yield _line("adaptive_stability_line", (2 + 2 * beta1) / (1 - beta1), rate)


def _rate(subject: Subject, stated: float | None) -> float | None:
    """Return the learning rate of the next update, None where it is not known."""
    known = stated_optimizer(subject.run, subject.checkpoint.step)
    return stated if stated is not None or known is None else known[1]


def _line(name: str, factor: float, rate: float) -> Reading:
    return Reading(name, factor / rate) if rate else Reading(name, None, reason="the learning rate is 0")


def _preconditioner(subject: Subject, surface: Surface, beta2: float, eps: float) -> Tensor:
    """Return P, the denominator of Adam for each parameter, [D]. Raises PicoError for parameters that Adam does not update."""
    moments, parts = second_moments(subject.checkpoint), list[Tensor]()
    modules = {name: name.removesuffix(".weight") for name in surface.names}
    if lacking := [name for name, module in modules.items() if module not in moments]:
        raise PicoError(
            f"{len(lacking)} parameters have no second moment at step {subject.checkpoint.step} ({lacking[0]}, …): another "
            "optimizer than Adam updates them"
        )
    for (name, module), parameter in zip(modules.items(), surface.parameters):
        tensor, updates = moments[module]
        if tensor.shape != parameter.shape:
            raise PicoError(f"{name}: its second moment is {list(tensor.shape)}, the parameter {list(parameter.shape)}")
        parts.append((tensor.double() / (1 - beta2**updates)).sqrt().flatten() + eps)
    return torch.cat(parts).to(surface.start_D.dtype)
