"""Barriers against other code, and of copies whose units and heads change places, which are the same model."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.fox import make_run
from tests.probes.conftest import REFERENCE, Measure, value
from tests.readers.conftest import make
from torch import Tensor

from picolm.errors import PicoError
from picolm.models import Anatomy
from picolm.observe.subject import Subject
from picolm.observe.surface import Surface
from picolm.observe.training import rows_of_tokens
from picolm.probes.barrier import aligned, assignment, units_of
from picolm.readers.families import FAMILIES
from picolm.store import Run

__all__ = ["make_run"]
KNOWN: dict[str, Any] = json.loads((REFERENCE / "landscape" / "llama_s0.json").read_text())["barrier"]
LAST = {"target": {"checkpoint": "previous"}, "max_rows": 64}


def losses(found: Any, metric: str = "barrier.interpolated_loss") -> list[float]:
    return list(found[found["metric"] == metric]["value"])


@pytest.mark.slow
def test_a_line_of_one_run_is_that_of_independent_code(measure: Measure, rows: dict[str, str]) -> None:
    found = measure({"probe_name": "barrier", **LAST}, steps=[300, 500], observe={"rows": rows["corpus_val"]})
    known = KNOWN["300-500"]
    assert losses(found) == pytest.approx(known["losses"][::-1], abs=1e-5)
    assert value(found, "barrier.barrier") == 0 == known["barrier"]


def heads_of(tensor: Tensor, heads: int, order: list[int], dim: int) -> Tensor:
    """Return a tensor with the heads along a dimension in another order."""
    return torch.cat([tensor.chunk(heads, dim)[head] for head in order], dim)


def llama(name: str, tensor: Tensor) -> Tensor:
    """Reverse the units of MLPs, and exchange the two groups with their query heads: as the reference did."""
    if "gate_proj" in name or "up_proj" in name:
        return tensor.flip(0)
    if "down_proj" in name:
        return tensor.flip(1)
    if "k_proj" in name or "v_proj" in name:
        return heads_of(tensor, 2, [1, 0], 0)
    if "q_proj" in name or "o_proj" in name:
        return heads_of(tensor, 4, [2, 3, 0, 1], int("o_proj" in name))
    return tensor


def inside_of_groups(name: str, tensor: Tensor) -> Tensor:
    """Exchange query heads inside of a group too."""
    if "q_proj" in name or "o_proj" in name:
        return heads_of(llama(name, tensor), 4, [1, 0, 2, 3], int("o_proj" in name))
    return llama(name, tensor)


def neox(name: str, tensor: Tensor) -> Tensor:
    """Turn units and heads of a model with biases, whose queries, keys and values are one matrix."""
    if "dense_h_to_4h" in name:
        return tensor.roll(3, 0)
    if "dense_4h_to_h.weight" in name:
        return tensor.roll(3, 1)
    if "query_key_value" in name:
        return heads_of(tensor, 4, [2, 0, 3, 1], 0)
    if "attention.dense.weight" in name:
        return heads_of(tensor, 4, [2, 0, 3, 1], 1)
    return tensor


def copy_of(source: Path, folder: Path, change: Callable[[str, Tensor], Tensor]) -> str:
    """Write a copy of a step as the step of another run, with other weights."""
    shutil.copytree(source, folder / "copy" / source.name)
    weights = {
        name: change(name, tensor).contiguous() for name, tensor in load_file(source / "model.safetensors").items()
    }
    save_file(weights, folder / "copy" / source.name / "model.safetensors", {"format": "pt"})
    return str(folder / "copy")


@pytest.mark.parametrize(("name", "change"), [("llama_s0", llama), ("llama_s0", inside_of_groups), ("neox_s0", neox)])
def test_a_permuted_copy_has_no_barrier_once_it_is_aligned(
    measure: Measure, tmp_path: Path, rows: dict[str, str], name: str, change: Callable[[str, Tensor], Tensor]
) -> None:
    source = REFERENCE / "checkpoints" / name / "step_500"
    shutil.copytree(source, tmp_path / "original" / "step_500")
    place = copy_of(source, tmp_path, change)
    entry = {"probe_name": "barrier", "target": {"run": "copy", "checkpoint": "same"}, "align": True, "points": 5}
    many = {"observe": {"rows": rows["corpus_val"], "max_rows": 8}}
    found = measure(entry, runs=(str(tmp_path / "original"), place), **many)
    found = found[found["run"] == "original"]
    assert value(found, "barrier.barrier") > 0.1
    assert value(found, "barrier.aligned_barrier") == pytest.approx(0, abs=1e-6)
    assert value(found, "barrier.aligned_distance") == 0
    assert value(found, "barrier.moved_units") > 0.9
    assert value(found, "barrier.moved_heads") == 1


@pytest.mark.slow
def test_the_barrier_to_a_permuted_copy_is_that_of_independent_code(
    measure: Measure, tmp_path: Path, rows: dict[str, str]
) -> None:
    place = copy_of(REFERENCE / "checkpoints" / "llama_s0" / "step_500", tmp_path, llama)
    entry = {"probe_name": "barrier", "target": {"run": "copy", "checkpoint": "same"}, "max_rows": 64}
    found = measure(entry, runs=("llama_s0", place), steps=[500], observe={"rows": rows["corpus_val"]})
    found, known = found[found["run"] == "llama_s0"], KNOWN["last-permuted_last"]
    assert losses(found) == pytest.approx(known["losses"], abs=1e-5)
    assert value(found, "barrier.barrier") == pytest.approx(known["barrier"], rel=1e-4)
    assert value(found, "barrier.at") == known["at"]


def test_no_barrier_between_a_model_and_itself(measure: Measure, rows: dict[str, str]) -> None:
    entry = {"probe_name": "barrier", "target": {"checkpoint": 500}, "align": True, "max_rows": 3, "points": 3}
    found = measure(entry, steps=[500], runs=("neox_s0",), observe={"rows": rows["corpus_val"]})
    for name in ("barrier", "aligned_barrier", "distance", "moved_units", "moved_heads"):
        assert value(found, f"barrier.{name}") == 0
    assert len(set(losses(found))) == 1


def test_models_of_two_shapes_have_no_line(measure: Measure, rows: dict[str, str]) -> None:
    entry = {"probe_name": "barrier", "target": {"run": "neox_s0", "checkpoint": "same"}, "max_rows": 2}
    found = measure(entry, runs=("llama_s0", "neox_s0"), steps=[500], observe={"rows": rows["corpus_val"]})
    assert "have other parameters" in found[found["run"] == "llama_s0"]["reason"].item()


def test_weights_that_are_no_numbers_are_said(measure: Measure, tmp_path: Path, rows: dict[str, str]) -> None:
    source = REFERENCE / "checkpoints" / "llama_s0" / "step_500"
    place = copy_of(source, tmp_path, lambda name, tensor: tensor * float("nan"))
    entry = {"probe_name": "barrier", "target": {"run": "copy", "checkpoint": "same"}, "max_rows": 2}
    found = measure(entry, runs=("llama_s0", place), steps=[500], observe={"rows": rows["corpus_val"]})
    assert "no landscape" in found[found["run"] == "llama_s0"]["reason"].item()


def test_heads_that_differ_by_their_place_are_not_aligned(
    measure: Measure, tmp_path: Path, rows: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from picolm.probes import barrier

    def wrong(units: Any, one_D: Tensor, other_D: Tensor) -> tuple[Tensor, dict[str, tuple[int, int]]]:
        return other_D.flip(0), {}

    monkeypatch.setattr(barrier, "aligned", wrong)
    entry = {"probe_name": "barrier", "target": {"checkpoint": 0}, "align": True, "max_rows": 2, "points": 3}
    found = measure(entry, steps=[500], observe={"rows": rows["corpus_val"]})
    assert np.isnan(value(found, "barrier.aligned_barrier"))
    assert "changes the loss" in found[found["metric"] == "barrier.aligned_barrier"]["reason"].item()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("seed", range(4))
def test_an_assignment_is_the_best_of_all(size: int, seed: int) -> None:
    gain = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if seed == 3:
        gain = gain.round()  # with ties
    sums = [sum(gain[i, j] for i, j in enumerate(order)) for order in itertools.permutations(range(size))]
    found = assignment(gain)
    assert sorted(found) == list(range(size))
    assert sum(gain[i, j] for i, j in enumerate(found)) == pytest.approx(float(max(sums)))


def subject_of(family: str, folder: Path, make_run: Any) -> Subject:
    if family == "own":
        return Subject(make_run())
    make(family).save_pretrained(folder / "series" / "step7")
    return Subject(Run.open(folder / "series"))


@pytest.mark.parametrize("family", ["own", *FAMILIES])
def test_units_and_heads_of_every_family_may_change_places(family: str, tmp_path: Path, make_run: Any) -> None:
    subject = subject_of(family, tmp_path, make_run)
    generator = torch.Generator().manual_seed(0)
    surface = Surface(subject, rows_of_tokens(torch.randint(0, 60, (3, 9), generator=generator)))
    units, loss = units_of(subject, surface), surface.loss()
    moved_D = surface.start_D.clone()
    for mlp_UE, groups_GE, heads_GUE in units:
        assert mlp_UE is not None
        assert groups_GE is not None
        assert heads_GUE is not None
        shuffled = mlp_UE[torch.randperm(len(mlp_UE), generator=generator)]
        moved_D[mlp_UE] = surface.start_D[shuffled]
        order = [*range(1, len(groups_GE)), 0]
        moved_D[groups_GE], moved_D[heads_GUE] = (
            surface.start_D[groups_GE[order]],
            surface.start_D[heads_GUE[order].flip(1)],
        )
    assert not torch.equal(moved_D, surface.start_D)
    surface.move(moved_D)
    same = surface.loss() == pytest.approx(loss, abs=1e-9)
    assert same == (family != "olmo2")  # whose norm of queries has a gain for each entry of all heads
    back_D, counts = aligned(units, surface.start_D, moved_D)
    assert torch.equal(back_D, surface.start_D)
    assert counts["units"][1] == sum(len(each.mlp_UE) for each in units if each.mlp_UE is not None)


def test_a_model_whose_parts_are_not_known_is_not_aligned(tmp_path: Path, make_run: Any) -> None:
    subject = subject_of("own", tmp_path, make_run)
    subject.architecture.anatomy = Anatomy()
    surface = Surface(subject, rows_of_tokens(torch.tensor([[1, 2, 3]])))
    with pytest.raises(PicoError, match="where the units and heads"):
        units_of(subject, surface)
