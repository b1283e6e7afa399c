"""Calibration against reference values, and against a model whose confidence is its accuracy."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from tests.probes.conftest import Measure, expected, value
from tests.probes.known import Known, readings, rows_of_lists

from picolm.errors import PicoError
from picolm.observe.passes import Pass
from picolm.probes.calibration import _predictions


@pytest.mark.parametrize(("series", "step"), [("llama_s0", 0), ("llama_s0", 300), ("neox_s0", 500)])
def test_calibration_is_that_of_independent_code(
    measure: Measure, rows: dict[str, str], series: str, step: int
) -> None:
    found = measure({"probe_name": "calibration"}, runs=(series,), steps=[step], observe={"rows": rows["val"]})
    known = expected(series, step)
    assert value(found, "calibration.ece", step) == pytest.approx(known["ece_15"], abs=1e-4)
    for name, key in (("brier", "brier"), ("confidence", "mean_confidence"), ("entropy", "predictive_entropy")):
        assert value(found, f"calibration.{name}", step) == pytest.approx(known[key], abs=1e-5)
    assert value(found, "calibration.accuracy", step) == pytest.approx(known["accuracy"], abs=1 / 4032)
    bins = found[found["metric"] == "calibration.bin_positions"]
    assert bins["value"].sum() == 64 * 63
    assert (abs(bins["value"].to_numpy() - known["ece_bins_n"]) <= 1).all()


def test_a_certain_model_has_no_entropy_and_errs_by_the_share_of_its_mistakes() -> None:
    certain = Known(
        lambda tokens_BT: torch.nn.functional.one_hot(tokens_BT, 4).double() * 1e4, 4
    )  # predicts a repetition
    found = readings("calibration", certain, rows_of_lists([[0, 0, 0, 1], [2, 2, 3, 3]]))
    assert found["entropy", ""].value == 0
    assert found["accuracy", ""].value == pytest.approx(4 / 6)
    assert found["ece", ""].value == pytest.approx(2 / 6)
    assert found["brier", ""].value == pytest.approx(2 * 2 / 6)


def test_as_by_plain_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(7, 7, generator=generator, dtype=torch.float64)
    ids = torch.randint(7, (5, 9), generator=generator).tolist()
    found = readings("calibration", Known(lambda tokens_BT: table[tokens_BT], 7), rows_of_lists(ids), bins=4)
    bins: dict[int, list[tuple[float, bool]]] = {}
    entropies, briers = [], []
    for row in ids:
        for token, target in pairwise(row):
            probs = np.exp(table[token].numpy()) / np.exp(table[token].numpy()).sum()
            bins.setdefault(min(int(4 * probs.max()), 3), []).append((probs.max(), bool(probs.argmax() == target)))
            entropies.append(-sum(p * math.log(p) for p in probs))
            briers.append(sum((p - (place == target)) ** 2 for place, p in enumerate(probs)))
    number = len(entropies)
    ece = sum(abs(sum(confidence - right for confidence, right in each)) for each in bins.values()) / number
    assert found["ece", ""].value == pytest.approx(ece)
    assert found["entropy", ""].value == pytest.approx(np.mean(entropies))
    assert found["brier", ""].value == pytest.approx(np.mean(briers))


def test_nan_is_no_confidence() -> None:
    broken = Known(lambda tokens_BT: torch.full((*tokens_BT.shape, 5), math.nan), 5)
    with pytest.raises(PicoError, match="the model computes NaN at 3 of 3 positions; its weights may have diverged"):
        readings("calibration", broken, rows_of_lists([[0, 1, 2, 3]]))


def test_a_token_that_cannot_be_has_no_part_in_the_entropy() -> None:
    logits_BTV = torch.tensor([[[0.0, 0.0, -math.inf], [0.0, -math.inf, -math.inf]]])
    found = _predictions(Pass(torch.zeros(1, 3, dtype=torch.long), logits_BTV))
    assert found["entropy"].tolist() == [[pytest.approx(math.log(2)), 0.0]]
    assert found["brier"].tolist() == [[pytest.approx(0.5), 0.0]]
