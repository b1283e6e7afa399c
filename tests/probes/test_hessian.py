"""Curvature against the whole Hessian of a model of 1,112 parameters, computed by other code, and against matrices known."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tests.probes.conftest import REFERENCE, Measure, value
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from picolm.models.attention import twice_differentiable
from picolm.observe.rows import held_out
from picolm.observe.subject import Subject
from picolm.observe.surface import Surface
from picolm.observe.training import rows_of_tokens
from picolm.probes.hessian import Asked, lanczos
from picolm.store import Run

KNOWN: dict[str, Any] = json.loads((REFERENCE / "tiny" / "reference.json").read_text())
STEP = 300
LANDSCAPE: dict[str, Any] = json.loads((REFERENCE / "landscape" / "llama_s0.json").read_text())


def bins(found: pd.DataFrame, metric: str) -> dict[str, float]:
    chosen = found[found["metric"] == metric]
    return dict(zip(chosen["bin"], chosen["value"]))


@pytest.mark.slow
def test_the_whole_hessian_is_that_of_independent_code(measure: Measure, tiny: tuple[str, str]) -> None:
    place, rows = tiny
    found = measure(
        {"probe_name": "hessian", "full": True, "largest": 20, "smallest": 5},
        {"probe_name": "adam_hessian", "full": True, "largest": 5, "beta2": 0.95, "eps": 1e-8},
        runs=(place,),
        observe={"rows": rows},
    )
    near: Callable[[Any], Any] = lambda number: pytest.approx(number, rel=1e-9)  # noqa: E731
    assert value(found, "hessian.loss") == near(KNOWN["loss"])
    assert value(found, "hessian.gradient_norm") == near(KNOWN["grad_norm"])
    values = bins(found, "hessian.eigenvalue")
    assert [values[str(number)] for number in range(1, 11)] == near(KNOWN["eigenvalues_top10"])
    assert [values[str(number)] for number in range(-1, -6, -1)] == near(KNOWN["eigenvalues_bottom5"])
    assert value(found, "hessian.trace") == near(KNOWN["trace"])
    assert value(found, "hessian.frobenius") == near(KNOWN["frobenius"])
    assert value(found, "hessian.trace_variance") == near(KNOWN["hutchinson_rademacher_variance_per_probe"])
    assert value(found, "hessian.negative_eigenvalues") == KNOWN["n_negative_eigenvalues_below_-1e-6"]
    energy = bins(found, "hessian.gradient_energy")
    for number, share in KNOWN["gradient_energy_in_top_k_eigenspace"].items():
        assert energy[number] == pytest.approx(share, rel=1e-6)
    parts = found[found["metric"] == "hessian.part_trace"]
    for name, share in KNOWN["per_parameter_block_trace"].items():
        layer, suffix = (0, name.removeprefix("model.layers.0.")) if ".layers." in name else (None, name)
        assert parts[(parts["bin"] == suffix)]["value"].item() == near(share)
        assert layer is None or parts[(parts["bin"] == suffix)]["layer"].item() == layer
    adam = bins(found, "adam_hessian.eigenvalue")
    assert [adam[str(number)] for number in range(1, 6)] == near(KNOWN["adam_preconditioned_top5"])
    assert value(found, "adam_hessian.smallest_eigenvalue") == near(KNOWN["adam_preconditioned_bottom"])
    assert value(found, "adam_hessian.trace") == near(KNOWN["adam_preconditioned_trace"])


def test_lanczos_finds_the_ends_of_the_spectrum(measure: Measure, tiny: tuple[str, str]) -> None:
    place, rows = tiny
    options = {"largest": 3, "smallest": 2, "tolerance": 1e-7, "iterations": 300}
    found = measure(
        {"probe_name": "hessian", **options, "probes": 200, "learning_rate": 0.01},
        {"probe_name": "adam_hessian", **options, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "learning_rate": 0.01},
        runs=(place,),
        observe={"rows": rows},
    )
    for metric, top, bottom in (
        ("hessian", KNOWN["eigenvalues_top10"][:3], KNOWN["eigenvalues_bottom5"][:2]),
        ("adam_hessian", KNOWN["adam_preconditioned_top5"][:3], [KNOWN["adam_preconditioned_bottom"]]),
    ):
        values, residuals = bins(found, f"{metric}.eigenvalue"), bins(found, f"{metric}.residual")
        for number, wanted in [*enumerate(top, 1), *((-place, low) for place, low in enumerate(bottom, 1))]:
            assert abs(values[str(number)] - wanted) <= residuals[str(number)] + 1e-9
            assert residuals[str(number)] <= 1e-7 * max(map(abs, values.values()))
        assert value(found, f"{metric}.products") < 300
    exact = math.sqrt(KNOWN["hutchinson_rademacher_variance_per_probe"] / 200)
    trace = found[found["metric"] == "hessian.trace"].iloc[0]
    assert abs(trace["value"] - KNOWN["trace"]) < 4 * exact
    assert trace["standard_error"] == pytest.approx(exact, rel=0.2)
    assert value(found, "hessian.frobenius") == pytest.approx(KNOWN["frobenius"], rel=0.05)
    assert value(found, "hessian.stability_line") == pytest.approx(200)
    assert value(found, "adam_hessian.adaptive_stability_line") == pytest.approx(3800)  # 38 / learning rate


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 300, 500])
def test_sharpness_is_that_of_independent_code(measure: Measure, rows: dict[str, str], step: int) -> None:
    entry = {"probe_name": "hessian", "max_rows": 4, "tolerance": 1e-7, "smallest": 0}
    found = measure(entry, steps=[step], observe={"rows": rows["corpus_val"]})
    known = LANDSCAPE["hessian"][str(step)]
    assert value(found, "hessian.loss") == pytest.approx(known["loss"], abs=1e-5)
    assert value(found, "hessian.gradient_norm") == pytest.approx(known["grad_norm"], rel=1e-5)
    assert value(found, "hessian.largest_eigenvalue") == pytest.approx(known["lambda_max"], rel=1e-6)
    assert bins(found, "hessian.residual")["1"] < 1e-4


def matrix_of(eigenvalues: list[float]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    size = len(eigenvalues)
    turned = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    return turned @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ turned.T


@pytest.mark.parametrize(
    ("eigenvalues", "largest", "smallest", "expected"),
    [
        ([5.0, 3.0, 1.0, -8.0], 2, 1, [5.0, 3.0, -8.0]),  # the largest is not the largest in magnitude
        ([2.0, 2.0, 1.0, 0.0], 1, 1, [2.0, 0.0]),  # one that occurs twice is found
        ([0.0] * 5, 1, 0, [0.0]),
        ([-1.0, -2.0, -3.0], 5, 0, [-1.0, -2.0, -3.0]),  # more than there are
        ([4.0], 1, 1, [4.0, 4.0]),
    ],
)
def test_lanczos_of_matrices_known(
    eigenvalues: list[float], largest: int, smallest: int, expected: list[float]
) -> None:
    matrix = matrix_of(eigenvalues)
    start = torch.ones(len(eigenvalues), dtype=torch.float64)
    found = lanczos(lambda vector: matrix @ vector, start, Asked(largest, smallest, 50, 1e-10, 0, False, 0))
    assert found.values_K.tolist() == pytest.approx(expected, abs=1e-9)
    residuals = (found.vectors_KD @ matrix - found.values_K[:, None] * found.vectors_KD).norm(dim=1)
    assert residuals.tolist() == pytest.approx(found.residuals_K.tolist(), abs=1e-9)
    assert found.converged_K.all()


def test_residuals_are_told_where_the_iterations_end_too_early() -> None:
    matrix = matrix_of(torch.linspace(1, 2, 60).tolist())
    start = torch.randn(60, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = lanczos(lambda vector: matrix @ vector, start, Asked(1, 1, 6, 1e-10, 0, False, 0))
    assert found.products == 6
    assert not found.converged_K.any()
    residuals = (found.vectors_KD @ matrix - found.values_K[:, None] * found.vectors_KD).norm(dim=1)
    assert residuals.tolist() == pytest.approx(found.residuals_K.tolist(), rel=1e-6)


SMALL = (
    "model.d_model=8",
    "model.n_layers=1",
    "model.attention_n_heads=2",
    "model.attention_n_kv_heads=1",
    "model.activation_hidden_dim=8",
    "training.optimization.betas=[0.8, 0.95]",
    "training.optimization.lr_scheduler=constant",
)


@pytest.mark.slow
def test_a_run_of_pico_states_its_optimizer(measure: Measure, train: Callable[..., Run]) -> None:
    run = train(*SMALL)
    ask = {"tolerance": 1e-8, "iterations": 300}
    found = measure(
        {"probe_name": "hessian", **ask}, {"probe_name": "adam_hessian", **ask}, runs=(str(run.path),), steps=[0, 6]
    )
    assert value(found, "hessian.stability_line", 0) == pytest.approx(400)  # half of the warm-up
    assert value(found, "hessian.stability_line", 6) == pytest.approx(200)
    assert value(found, "adam_hessian.adaptive_stability_line", 6) == pytest.approx(3.6 / 0.2 / 0.01)
    first = found[(found["metric"] == "adam_hessian") & (found["step"] == 0)]
    assert "without the second moments" in first["reason"].item()
    surface = Surface(Subject(run).at(run[6]), rows_of_tokens(torch.stack(held_out(run))))
    names = [name for name, _ in surface.model.named_parameters()]

    def loss(place_D: Tensor) -> Tensor:
        parts = [part.view(p.shape) for (_, part), p in zip(surface.parts(place_D), surface.parameters)]
        tokens_BS = torch.stack(held_out(run))
        logits = functional_call(surface.model, dict(zip(names, parts)), (tokens_BS[:, :-1],))
        return cross_entropy(logits.flatten(0, 1), tokens_BS[:, 1:].flatten())

    with twice_differentiable():
        hessian_DD = torch.autograd.functional.hessian(loss, surface.start_D, vectorize=True)
    moments = {address.module: run[6][address].double() for address in run[6].select(kind="exp_avg_sq")}
    second_D = torch.cat([moments[name.removesuffix(".weight")].flatten() for name in names])
    root_D = ((second_D / (1 - 0.95**6)).sqrt() + 1e-8).sqrt()
    for metric, matrix_DD in (("hessian", hessian_DD), ("adam_hessian", hessian_DD / root_D / root_D[:, None])):
        values = torch.linalg.eigvalsh(matrix_DD)
        for name, known in (("largest", values[-1]), ("smallest", values[0])):
            assert value(found, f"{metric}.{name}_eigenvalue", 6) == pytest.approx(float(known), rel=1e-7)


@pytest.mark.parametrize(
    ("optimizer", "message"), [("sgd", "without the second moments"), ("muon", "another optimizer than Adam")]
)
def test_other_optimizers_are_not_adam(
    measure: Measure, train: Callable[..., Run], optimizer: str, message: str
) -> None:
    run = train(*SMALL, f"training.optimization.optimizer={optimizer}", "training.max_steps=2")
    found = measure({"probe_name": "adam_hessian"}, {"probe_name": "hessian"}, runs=(str(run.path),), steps=[2])
    assert message in found[found["metric"] == "adam_hessian"]["reason"].item()
    assert value(found, "hessian.largest_eigenvalue") > 0


def test_no_line_at_a_learning_rate_of_zero(measure: Measure, train: Callable[..., Run]) -> None:
    run = train(*SMALL[:-1], "training.max_steps=2", "training.optimization.lr_warmup_steps=1")
    found = measure({"probe_name": "hessian"}, runs=(str(run.path),), steps=[2])
    line = found[found["metric"] == "hessian.stability_line"]
    assert np.isnan(line["value"].item())
    assert line["reason"].item() == "the learning rate is 0"


def test_what_cannot_be_computed_is_said(measure: Measure, tiny: tuple[str, str], tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.array([[0, 5, 7]]))
    found = measure(
        {"probe_name": "hessian", "full": True, "max_rows": 1},
        {"probe_name": "adam_hessian"},
        {"probe_name": "hessian", "iterations": 3, "probes": 1},
        steps=[0],
        observe={"rows": str(tmp_path / "one.npy")},
    )
    reasons = " ".join(found[found["metric"].isin(["hessian", "adam_hessian"])]["reason"])
    assert "the whole matrix of 151872 parameters is too large" in reasons
    assert "was saved without the second moments of Adam" in reasons
    largest = found[found["metric"] == "hessian.largest_eigenvalue"]
    assert "not converged after 3 products" in largest["note"].item()
    trace = found[found["metric"] == "hessian.trace"]
    assert np.isfinite(trace["value"].item())
    assert np.isnan(trace["standard_error"].item())  # one vector
    place, rows = tiny
    found = measure({"probe_name": "adam_hessian", "eps": 0.0}, runs=(place,), observe={"rows": rows})
    assert "state beta2 and eps" in found["reason"].item()
