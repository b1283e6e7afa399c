"""Curvature against the whole Hessian of a model of 1,112 parameters, computed by other code, and against matrices known."""

import json
import math
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
from tests.probes.conftest import REFERENCE, Measure, value

from picolm.probes.hessian import Asked, lanczos

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
