"""Values of independent origin, to 1e-6 relative, but for two that the data do not determine, and there it is shown why."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from picolm.analyze import metrics

FOLDER = Path(__file__).parents[1] / "reference"
VALUES = json.loads((FOLDER / "values.json").read_text())
ACTIVATIONS = dict(np.load(FOLDER / "activations.npz"))
MATRICES = dict(np.load(FOLDER / "matrices.npz"))
exactly = {"rel": 1e-6}
pairs = pytest.mark.parametrize("values", VALUES["two"], ids=lambda values: f"{values['x']}-{values['y']}")


@pairs
def test_pairs(values: dict[str, Any]) -> None:
    x, y = ACTIVATIONS[values["x"]], ACTIVATIONS[values["y"]]
    assert metrics.cka(x, y) == pytest.approx(values["cka"], **exactly)
    assert metrics.cka(x, y, debiased=True) == pytest.approx(values["cka_debiased"], **exactly)
    assert metrics.cca(x, y) == pytest.approx(values["cca_mean"], **exactly)
    assert metrics.svcca(x, y, variance=1.0) == pytest.approx(values["cca_mean"], **exactly)


@pytest.mark.slow
@pairs
def test_pwcca_where_the_variates_are_not_determined(values: dict[str, Any]) -> None:
    """With p + q > N - 1, p + q - N + 1 correlations are 1, and the weights hang on the basis that a routine happens to return.

    The values given for one pair in either order differ by 5e-5. Ours is the mean over all bases; the given ones lie around it,
    within what another basis changes.
    """
    x, y = ACTIVATIONS[values["x"]], ACTIVATIONS[values["y"]]
    ours = metrics.pwcca(x, y)
    given = values["pwcca_weighted_by_x" if x.shape[1] <= y.shape[1] else "pwcca_weighted_by_y"]
    tied = x.shape[1] + y.shape[1] - (len(x) - 1)
    assert sum(rho > 1 - 1e-8 for rho in values["canonical_correlations"]) == tied == 33
    spread = [pwcca_with_a_random_basis(x, y, seed) for seed in range(100)]
    assert max(spread) - min(spread) > 1e-4
    assert np.mean(spread) == pytest.approx(ours, abs=4 * np.std(spread) / 10 + 1e-5)
    assert abs(given - ours) < 5 * np.std(spread)


def pwcca_with_a_random_basis(x: np.ndarray, y: np.ndarray, seed: int) -> float:
    """As the paper writes it, with the tied variates turned at random."""
    x, y = (
        side.astype(float) - side.astype(float).mean(0) for side in ((x, y) if x.shape[1] <= y.shape[1] else (y, x))
    )
    x_basis, y_basis = np.linalg.qr(x)[0], np.linalg.qr(y)[0]
    variates, correlations, _ = np.linalg.svd(x_basis.T @ y_basis, full_matrices=False)
    tied = int((correlations > 1 - 1e-8).sum())
    turn = np.linalg.qr(np.random.default_rng(seed).standard_normal((tied, tied)))[0]
    h = x_basis @ variates
    h[:, :tied] = h[:, :tied] @ turn
    weights = np.abs(h.T @ x).sum(1)
    return float(weights @ correlations / weights.sum())


def test_the_given_values_of_pwcca_for_one_pair_disagree() -> None:
    _, one, other = VALUES["two"]
    assert (one["x"], one["y"]) == (other["y"], other["x"])
    assert one["cka"] == pytest.approx(other["cka"], rel=1e-12)
    assert one["pwcca_weighted_by_y"] != pytest.approx(other["pwcca_weighted_by_x"], rel=2e-5)


@pytest.mark.parametrize("name", VALUES["one"])
def test_single_matrices(name: str) -> None:
    x, wanted = MATRICES[name], VALUES["one"][name]
    assert metrics.effective_rank(x) == pytest.approx(wanted["effective_rank"], **exactly)
    assert metrics.per(x) == pytest.approx(wanted["per"], **exactly)
    assert metrics.gini(x) == pytest.approx(wanted["gini"], **exactly)
    assert metrics.hoyer(x) == pytest.approx(wanted["hoyer"], **exactly)
    given = {"frobenius": "fro", "nuclear": "nuclear", "spectral": "spectral", "inf": "max_abs_entry"}
    for norm_type, key in given.items():
        assert metrics.norm(x, norm_type=norm_type) == pytest.approx(wanted[key], **exactly)


@pytest.mark.parametrize("name", sorted(set(VALUES["one"]) - {"sparse"}))
def test_condition_numbers(name: str) -> None:
    assert metrics.condition_number(MATRICES[name]) == pytest.approx(VALUES["one"][name]["condition_number"], **exactly)


def test_a_condition_number_that_is_rounding_of_float64_is_infinite() -> None:
    """3.6e17 is 1 / rounding: the sparse matrix has rows of zeros, and is singular."""
    sparse, wanted = MATRICES["sparse"], VALUES["one"]["sparse"]
    assert np.linalg.matrix_rank(sparse.astype(float)) < min(sparse.shape)
    assert wanted["smallest_singular"] < np.finfo(float).eps * wanted["spectral"]
    assert metrics.condition_number(sparse) == math.inf


@pytest.mark.slow
def test_a_full_matrix_in_a_narrow_type_has_the_condition_number_of_its_numbers() -> None:
    """The smallest singular value of a square matrix lies below the noise floor of bfloat16: that does not make it singular."""
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    values = np.linalg.svd(x.double().numpy(), compute_uv=False)
    assert metrics.condition_number(x) == pytest.approx(values[0] / values[-1], rel=1e-8)
