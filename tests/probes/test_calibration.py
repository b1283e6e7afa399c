"""Calibration against reference values, and against a model whose confidence is its accuracy."""

import pytest
from tests.probes.conftest import Measure, expected, value


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
