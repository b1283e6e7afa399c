"""The path of weights: against other code, the singular value decomposition, and lines and turns whose lengths are known."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.probes.conftest import REFERENCE, Measure, value

KNOWN: dict[str, Any] = json.loads((REFERENCE / "landscape" / "llama_s0.json").read_text())["updates"]
LLAMA = REFERENCE / "checkpoints" / "llama_s0"


def part(found: pd.DataFrame, metric: str, step: int, name: str) -> float:
    layer, bin = (1, name.removeprefix("model.layers.1.")) if ".layers." in name else (None, name)
    chosen = found[(found["metric"] == f"path.{metric}") & (found["step"] == step) & (found["bin"] == bin)]
    return float((chosen if layer is None else chosen[chosen["layer"] == layer])["value"].item())


@pytest.mark.parametrize("name", KNOWN)
def test_updates_are_those_of_independent_code(measure: Measure, name: str) -> None:
    found = measure({"probe_name": "path"}, steps=[0, 300, 500])
    module, known = name.removesuffix(".weight"), KNOWN[name]["300-500"]
    assert part(found, "part_relative_update", 500, module) == pytest.approx(known["relative_update"], rel=1e-7)
    assert part(found, "part_from_first", 500, module) == pytest.approx(known["from_first"], rel=1e-7)
    at = {step: load_file(LLAMA / f"step_{step}" / "model.safetensors")[name].double() for step in (0, 300, 500)}
    before, after = at[300] - at[0], at[500] - at[300]
    cosine = float((before * after).sum() / (before.norm() * after.norm()))
    assert part(found, "part_cosine_with_previous", 500, module) == pytest.approx(cosine, abs=1e-12)
    for side, transposed in (("left", False), ("right", True)):
        one, other = (torch.linalg.svd(each.T if transposed else each)[0][:, :4] for each in (before, after))
        cosines = torch.linalg.svdvals(one.T @ other)
        found_cosines = [part(found, f"{side}_cosines", 500, f"{module} {number}") for number in range(1, 5)]
        assert found_cosines == pytest.approx(cosines.tolist(), abs=1e-9)
        overlap = part(found, f"{side}_overlap", 500, module)
        assert overlap == pytest.approx(float(cosines.square().mean()), abs=1e-9)


def series(folder: Path, places: dict[int, list[float]]) -> str:
    """Write the steps of a model that moves in a plane. places: how far along its two directions, by step."""
    source, generator = load_file(LLAMA / "step_0" / "model.safetensors"), torch.Generator().manual_seed(0)
    directions = [{n: torch.randn(t.shape, generator=generator) for n, t in source.items()} for _ in range(2)]
    for step, (x, y) in places.items():
        shutil.copytree(LLAMA / "step_0", folder / "walk" / f"step_{step}")
        moved = {n: (t.double() + x * directions[0][n] + y * directions[1][n]) for n, t in source.items()}
        save_file(moved, folder / "walk" / f"step_{step}" / "model.safetensors")
    return str(folder / "walk")


def test_a_straight_line_has_straightness_one(measure: Measure, tmp_path: Path) -> None:
    place = series(tmp_path, {0: [0, 0], 10: [0.5, 1], 20: [0.6, 1.2], 30: [2, 4]})
    found = measure({"probe_name": "path", "subspace": 2}, runs=(place,))
    for step in (10, 20, 30):
        assert value(found, "path.straightness", step) == pytest.approx(1, abs=1e-12)
        assert value(found, "path.path_length", step) == pytest.approx(value(found, "path.from_first", step))
    for step in (20, 30):
        assert value(found, "path.cosine_with_previous", step) == pytest.approx(1, abs=1e-12)
        overlaps = found[(found["metric"] == "path.left_overlap") & (found["step"] == step)]
        assert overlaps["value"].to_numpy() == pytest.approx(1, abs=1e-9)
    assert found[found["step"] == 0]["metric"].str.endswith("weight_norm").all()


def test_a_way_back_has_straightness_zero(measure: Measure, tmp_path: Path) -> None:
    place = series(tmp_path, {0: [0, 0], 10: [1, 0], 20: [0, 0], 30: [0, 0]})
    found = measure({"probe_name": "path", "parts": False, "subspace": 0}, runs=(place,))
    length = value(found, "path.update_norm", 10)
    assert value(found, "path.path_length", 30) == pytest.approx(2 * length)
    assert value(found, "path.straightness", 20) == 0
    assert value(found, "path.cosine_with_previous", 20) == pytest.approx(-1)
    still = found[(found["metric"] == "path.cosine_with_previous") & (found["step"] == 30)]
    assert np.isnan(still["value"].item())
    assert still["reason"].item() == "one of the two updates is 0"


def test_only_the_analyzed_steps_count(measure: Measure) -> None:
    fewer = measure({"probe_name": "path", "parts": False}, steps=[0, 500])
    assert value(fewer, "path.straightness", 500) == pytest.approx(1)
    every = measure({"probe_name": "path", "parts": False}, steps=[0, 300, 500])
    assert value(every, "path.straightness", 500) < 0.95
    assert value(every, "path.from_first", 500) == value(fewer, "path.from_first", 500)


def test_a_matrix_of_three_counts_once(measure: Measure) -> None:
    found = measure({"probe_name": "path"}, runs=("neox_s0",))
    at = [load_file(REFERENCE / "checkpoints" / "neox_s0" / f"step_{s}" / "model.safetensors") for s in (0, 500)]
    squares = sum(float((at[1][name].double() - at[0][name].double()).square().sum()) for name in at[0])
    assert value(found, "path.update_norm", 500) == pytest.approx(squares**0.5)


def test_weights_that_are_no_numbers_end_the_path(measure: Measure, tmp_path: Path) -> None:
    place = series(tmp_path, {0: [0, 0], 10: [float("nan"), 0], 20: [1, 0]})
    found = measure({"probe_name": "path"}, runs=(place,))
    for step in (10, 20):
        assert np.isnan(value(found, "path.path_length", step))
    assert "step 10" in found[(found["metric"] == "path.straightness") & (found["step"] == 20)]["reason"].item()
