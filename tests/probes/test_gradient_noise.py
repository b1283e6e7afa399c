"""The gradient noise scale against other code, another formula, and rows whose gradients are the same."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.probes.conftest import REFERENCE, Measure, value

from picolm.observe.subject import Subject
from picolm.observe.surface import Surface
from picolm.observe.training import rows_of_tokens
from picolm.store import Run

KNOWN: dict[str, Any] = json.loads((REFERENCE / "landscape" / "llama_s0.json").read_text())["gns"]
TINY: list[dict[str, Any]] = json.loads((REFERENCE / "tiny" / "reference.json").read_text())["gns"]
LLAMA, NEOX = (REFERENCE / "checkpoints" / name for name in ("llama_s0", "neox_s0"))


def corpus(rows: dict[str, str], count: int) -> torch.Tensor:
    return torch.as_tensor(np.load(rows["corpus_val"])[:count])


@pytest.mark.slow
@pytest.mark.parametrize(("step", "small"), [(0, 1), (300, 8), (500, 8)])
def test_noise_is_that_of_independent_code(measure: Measure, rows: dict[str, str], step: int, small: int) -> None:
    entry = {"probe_name": "gradient_noise", "small": small, "max_rows": 32}
    found = measure(entry, steps=[step], observe={"rows": rows["corpus_val"]})
    known = KNOWN[str(step)][f"small{small}_big32"]
    for name, key in (("squared_gradient", "G2"), ("trace_sigma", "trace_sigma"), ("b_simple", "B_simple_rows")):
        assert value(found, f"gradient_noise.{name}") == pytest.approx(known[key], rel=1e-4)
    assert value(found, "gradient_noise.loss") == pytest.approx(KNOWN[str(step)]["per_row_loss_mean"], abs=1e-5)


@pytest.mark.parametrize("known", TINY, ids=lambda known: f"small{known['B_small']}")
def test_noise_of_the_tiny_model(measure: Measure, tiny: tuple[str, str], known: dict[str, Any]) -> None:
    place, rows = tiny
    entry = {"probe_name": "gradient_noise", "small": known["B_small"], "precision": "float64"}
    found = measure(entry, runs=(place,), observe={"rows": rows})
    for name, key in (("squared_gradient", "G2"), ("trace_sigma", "trace_sigma"), ("b_simple", "B_simple_rows")):
        assert value(found, f"gradient_noise.{name}") == pytest.approx(known[key], rel=1e-9)


def test_parts_are_the_covariance_of_single_rows(measure: Measure, rows: dict[str, str]) -> None:
    entry = {"probe_name": "gradient_noise", "max_rows": 6, "precision": "float64"}
    found = measure(entry, runs=("neox_s0",), steps=[500], observe={"rows": rows["corpus_val"]})
    surface = Surface(Subject(Run.open(NEOX)), rows_of_tokens(corpus(rows, 6)))
    gradients_RD = torch.stack([surface.gradient([row]) for row in range(6)])
    for name, part_RD in zip(surface.names, gradients_RD.split(surface.sizes, 1)):
        trace = float(torch.cov(part_RD.T[:500]).trace() if part_RD.shape[1] <= 500 else part_RD.var(0).sum())
        squared = float(part_RD.mean(0).square().sum()) - trace / 6  # unbiased: the noise of the mean is taken off
        layer, bin = (int(name.split(".")[2]), name.split(".", 3)[3]) if ".layers." in name else (None, name)
        part = found[(found["bin"] == bin) & (found["layer"].isna() if layer is None else found["layer"] == layer)]
        values = dict(zip(part["metric"].str.removeprefix("gradient_noise.part_"), part["value"]))
        assert values["trace_sigma"] == pytest.approx(trace, rel=1e-6)
        assert values["squared_gradient"] == pytest.approx(squared, rel=1e-6, abs=1e-12)
        if squared > 0:
            assert values["b_simple"] == pytest.approx(trace / squared, rel=1e-6)
        else:
            assert np.isnan(values["b_simple"])
            assert "take more rows" in part[part["metric"] == "gradient_noise.part_b_simple"]["reason"].item()
    whole = found[found["bin"] == ""]
    parts = found[found["metric"] == "gradient_noise.part_trace_sigma"]["value"].sum()
    assert whole[whole["metric"] == "gradient_noise.trace_sigma"]["value"].item() == pytest.approx(parts)


@pytest.mark.parametrize(
    ("tokens", "small", "message"),
    [
        ([[0, 1, 2, 3]], 1, "1 rows are 1 batch(es) of 1"),
        ([[0, 1, 2, 3]] * 3, 2, "1 batch(es) of 2"),
        ([[0, 1, 2, 3]] * 3, 8, "0 batch(es) of 8"),
    ],
)
def test_one_batch_defines_no_noise(
    measure: Measure, tmp_path: Path, tokens: list[list[int]], small: int, message: str
) -> None:
    np.save(tmp_path / "rows.npy", np.array(tokens))
    entry = {"probe_name": "gradient_noise", "small": small}
    found = measure(entry, {"probe_name": "calibration"}, steps=[0], observe={"rows": str(tmp_path / "rows.npy")})
    assert message in found[found["metric"] == "gradient_noise"]["reason"].item()
    assert value(found, "calibration.accuracy") >= 0


def test_equal_rows_have_no_noise(measure: Measure, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.array([[0, 5, 7, 9]] * 4))
    entry = {"probe_name": "gradient_noise", "precision": "float64", "parts": False}
    found = measure(entry, steps=[0], observe={"rows": str(tmp_path / "rows.npy")})
    assert value(found, "gradient_noise.trace_sigma") == pytest.approx(0, abs=1e-10)
    norm = value(found, "gradient_noise.gradient_norm")
    assert value(found, "gradient_noise.squared_gradient") == pytest.approx(norm**2)


def test_rows_that_fill_no_batch_are_left_out(measure: Measure, rows: dict[str, str]) -> None:
    def run(count: int) -> Any:
        entry = {"probe_name": "gradient_noise", "small": 2, "max_rows": count, "parts": False}
        return measure(entry, steps=[0], observe={"rows": rows["corpus_val"]}, analysis_name="measured")

    whole, cut = run(4), run(5)
    assert value(cut, "gradient_noise.b_simple") == value(whole, "gradient_noise.b_simple")
    assert "first 4 rows" in cut[cut["metric"] == "gradient_noise.loss"]["note"].item()
