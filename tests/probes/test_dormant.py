"""Dormant units, outliers and ranks against hooks of our own, the metrics of analyze, and states whose rank is known."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tests.probes.conftest import REFERENCE, Measure, value
from tests.readers.conftest import make, save
from torch import Tensor

from picolm.analyze.metrics import participation_ratio
from picolm.observe.passes import Pass
from picolm.probes.dormant import _chance, _excess_kurtosis, _mean_cosine, _of_states, _of_units, _ranks, _read

__all__ = ["save"]
Save = Callable[..., Path]
EVERY = {"probe_name": "dormant", "positions": 10**6}
STREAM = ("outlier", "kurtosis", "anisotropy", "anisotropy_centred", "rankme", "participation_ratio")


def of_places(found: pd.DataFrame, name: str, column: str = "value") -> list[float]:
    """The values of a quantity before the first block and after each block."""
    before = found[found["metric"] == f"dormant.embedding_{name}"]
    after = found[found["metric"] == f"dormant.{name}"].sort_values("layer")
    assert after["layer"].tolist() == list(range(len(after)))
    return [*before[column], *after[column]]


def of_layers(found: pd.DataFrame, name: str) -> list[float]:
    return found[found["metric"] == f"dormant.{name}"].sort_values("layer")["value"].tolist()


def plainly(place: Path, tokens: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What transformers computes: the residual stream before and after each block, and what the last layer of each MLP reads."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place, attn_implementation="eager").eval()
    stream: list[Tensor] = []
    read: list[Tensor] = []
    blocks = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    blocks[0].register_forward_pre_hook(lambda module, inputs: stream.append(inputs[0].double()))
    for block in blocks:
        block.register_forward_hook(
            lambda module, inputs, output: stream.append((output[0] if isinstance(output, tuple) else output).double())
        )
        last = [each for name, each in block.mlp.named_modules() if name in ("down_proj", "dense_4h_to_h", "c_proj")]
        last[0].register_forward_hook(lambda module, inputs, output: read.append(inputs[0].double()))
    with torch.no_grad():
        model(tokens)
    return stream, read


@pytest.mark.parametrize("series", ["llama_s0", "neox_s0"])
def test_of_all_positions_it_is_what_the_definitions_say(measure: Measure, rows: dict[str, str], series: str) -> None:
    """A second route: whole tensors, covariances and pairs."""
    found = measure(
        {**EVERY, "dominant": 3.0, "tau": 0.6},
        runs=(series,),
        steps=[500],
        observe={"rows": rows["val"], "max_rows": 12},
    )
    tokens = torch.as_tensor(np.load(rows["val"]))[:12, :-1]
    stream, read = plainly(REFERENCE / "checkpoints" / series / "step_500", tokens)
    for layer, hidden in enumerate(read):
        mean = hidden.abs().mean((0, 1))
        score = mean / mean.mean()
        assert of_layers(found, "dormant")[layer] == pytest.approx(float((score <= 0.6).double().mean()))
        assert of_layers(found, "dominant")[layer] == pytest.approx(float((score >= 3).double().mean()))
        assert of_layers(found, "largest_unit")[layer] == pytest.approx(float(score.max()), rel=1e-5)
        assert of_layers(found, "dead")[layer] == 0
    assert max(of_layers(found, "dormant")) > 0
    pairs = torch.arange(12).repeat_interleave(63)
    pairs = pairs[:, None] != pairs
    for place, states in enumerate(stream):
        flat = states.flatten(0, 1)
        centred = flat - flat.mean(0)
        cosines = [
            float((torch.nn.functional.normalize(each) @ torch.nn.functional.normalize(each).T)[pairs].mean())
            for each in (flat, centred)
        ]
        eigenvalues = torch.linalg.eigvalsh(torch.cov(flat.T)).clamp(min=0)
        singular = eigenvalues.sqrt() / eigenvalues.sqrt().sum()
        known = {
            "outlier": float(flat.abs().max() / flat.abs().median()),
            "kurtosis": float(((flat.T - flat.mean(1)) / flat.T.std(0, correction=0)).pow(4).mean()) - 3,
            "anisotropy": cosines[0],
            "anisotropy_centred": cosines[1],
            "rankme": float(torch.special.entr(singular).sum().exp()),
            "participation_ratio": float(eigenvalues.sum() ** 2 / eigenvalues.square().sum()),
        }
        for name, number in known.items():
            assert of_places(found, name)[place] == pytest.approx(number, rel=1e-5, abs=1e-6), (name, place)
        assert of_places(found, "participation_ratio")[place] == pytest.approx(participation_ratio(centred), rel=1e-5)


def test_the_excess_kurtosis_is_that_of_known_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(4, 200_000, dtype=torch.float64, generator=generator)
    even = torch.rand(4, 200_000, dtype=torch.float64, generator=generator)
    assert _excess_kurtosis(normal).tolist() == pytest.approx([0.0] * 4, abs=0.05)
    assert _excess_kurtosis(even + 7).tolist() == pytest.approx([-1.2] * 4, abs=0.02)
    assert _excess_kurtosis(torch.tensor([[1.0, -1.0]])).tolist() == [-2.0]


def test_the_ranks_of_states_whose_rank_is_known() -> None:
    generator = torch.Generator().manual_seed(0)
    isotropic = torch.randn(20_000, 12, dtype=torch.float64, generator=generator) + 5
    line = torch.randn(50, 1, dtype=torch.float64, generator=generator) * torch.arange(1.0, 9.0) + 100
    assert _ranks(isotropic) == pytest.approx((12, 12), rel=1e-3)
    assert _ranks(line) == pytest.approx((1, 1), abs=1e-6)
    assert _ranks(torch.full((5, 3), 0.1).double()) is None
    corners = torch.eye(6, dtype=torch.float64)  # centred: five equal singular values
    assert _ranks(corners) == pytest.approx((5, 5), abs=1e-6)
    turn = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=generator)).Q
    states = torch.randn(30, 8, dtype=torch.float64, generator=generator) * torch.arange(1.0, 9.0)
    assert _ranks(3 * states @ turn + 2) == pytest.approx(_ranks(states))


@pytest.mark.parametrize(("number", "width"), [(40, 24), (24, 40), (300, 64)])
def test_the_chance_of_a_participation_ratio_is_that_of_a_wishart_matrix(number: int, width: int) -> None:
    """E (tr S)^2 / E tr S^2 of n = N - 1 degrees of freedom is (n H + 2) / (n + H + 1)."""
    found = _chance(number, width, 0)
    assert found is not None
    assert found[1] == pytest.approx(((number - 1) * width + 2) / (number + width), rel=0.05)
    assert found[1] < found[0] < min(number, width)


def test_cosines_are_those_of_positions_in_different_rows() -> None:
    one, other = torch.tensor([1.0, 0.0]).double(), torch.tensor([1.0, 1.0]).double()
    assert _mean_cosine([one.expand(3, 2), 5 * other.expand(2, 2)]) == pytest.approx(0.5**0.5)
    assert _mean_cosine([one[None], -one[None]]) == pytest.approx(-1)
    random = [torch.randn(9, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in range(200)]
    assert _mean_cosine(random) == pytest.approx(0, abs=1e-3)


def test_units_are_counted_by_their_mean_magnitude() -> None:
    # 10 units, over 2 rows of 4 positions; their mean magnitudes are 0, 0.2, 1 (7 of them), 40
    sums = torch.tensor([[0.0, 0.8, 4, 4, 4, 4, 4, 4, 4, 160]] * 2)
    found = {each.name: each.value for each in _of_units({"units 0": list(sums)}, 8, 0.1, 8.0)}
    assert found == pytest.approx({"dead": 0.1, "dormant": 0.2, "dominant": 0.1, "largest_unit": 40 / 4.72})
    found = {each.name: each.value for each in _of_units({"units 0": list(sums * 0)}, 8, 0.1, 8.0)}
    assert found == {"dead": 1.0, "dormant": 1.0, "dominant": 0.0, "largest_unit": None}


def test_an_mlp_that_reads_nothing_is_dead(measure: Measure, rows: dict[str, str], tmp_path: Path, save: Save) -> None:
    model = make("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[:10] = 0
        model.model.layers[0].mlp.up_proj.weight.zero_()
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).integers(0, 61, (3, 7)))
    found = measure({"probe_name": "dormant"}, runs=(str(save(model, "step7")),), observe={"rows": "rows.npy"})
    assert of_layers(found, "dead") == [1.0, 10 / 40]
    assert of_layers(found, "dormant")[1] >= 0.25
    assert found[found["metric"] == "dormant.largest_unit"]["reason"].tolist() == ["all units are dead", ""]


def test_at_most_so_many_positions_are_sampled_whatever_stands_beside() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 50, (4, 11), generator=generator)
    hidden = [torch.randn(4, 10, 3, generator=generator) for _ in range(2)]
    together = _read(Pass(tokens, torch.zeros(4, 10, 50), hidden), 6, 0)["states"]
    alone = _read(Pass(tokens[2:3], torch.zeros(1, 10, 50), [each[2:3] for each in hidden]), 6, 0)["states"]
    assert together.shape == (4, 2, 6, 3)
    assert torch.equal(together[2], alone[0])
    places = [[(each == state).all(-1).nonzero().item() for state in together[2, 0]] for each in hidden[:1][0][2:3]]
    assert len(set(places[0])) == 6
    other: Any = _read(Pass(tokens, torch.zeros(4, 10, 50), hidden), 6, 1)["states"]
    assert not torch.equal(together, other)


def test_a_sample_is_near_to_the_whole(measure: Measure, rows: dict[str, str]) -> None:
    sampled = measure({"probe_name": "dormant", "positions": 1000}, steps=[500], observe={"rows": rows["val"]})
    whole = measure(EVERY, steps=[500], observe={"rows": rows["val"]})
    for name in STREAM:
        assert of_places(sampled, name) == pytest.approx(of_places(whole, name), rel=0.15, abs=0.05), name
    few = measure({"probe_name": "dormant", "positions": 20}, steps=[500], observe={"rows": rows["val"]})
    assert max(of_places(few, "rankme")) <= 19.0
    assert of_places(few, "anisotropy_centred", "chance") == pytest.approx([-1 / 19] * 3)


@pytest.mark.parametrize(
    ("ids", "alone", "same"),
    [([[5, 6, 7, 8]], True, False), ([[5, 6], [1, 2, 3, 4, 5], [9, 8, 7]], False, False), ([[3, 4]], True, True)],
    ids=["one row", "several lengths", "one position"],
)
def test_few_rows_of_any_length(
    ids: list[list[int]], alone: bool, same: bool, measure: Measure, tmp_path: Path
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"ids": ids}), tmp_path / "rows.parquet")
    found = measure(EVERY, steps=[300], observe={"rows": "rows.parquet:ids"})
    assert all(("one row only" in reason) == alone for reason in of_places(found, "anisotropy", "reason"))
    assert all(("all the same" in reason) == same for reason in of_places(found, "rankme", "reason"))
    assert all(np.isfinite(of_places(found, "outlier")))


def test_of_weights_that_are_no_numbers_nothing_is_said(measure: Measure, tmp_path: Path, save: Save) -> None:
    model = make("llama")
    torch.nn.init.constant_(model.model.layers[0].self_attn.o_proj.weight, torch.nan)
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).integers(0, 61, (3, 7)))
    found = measure({"probe_name": "dormant"}, runs=(str(save(model, "step7")),), observe={"rows": "rows.npy"})
    of_embedding = found["metric"].str.contains("embedding")
    assert found[of_embedding]["value"].notna().all()
    assert found[~of_embedding]["value"].isna().all()
    assert (found[~of_embedding]["reason"] != "").all()


def test_states_that_are_zero_have_no_outliers_and_no_rank() -> None:
    found = {each.name: each for each in _of_states([torch.zeros(2, 3).double()] * 2, 0.0, 0)}
    assert found["outlier"].reason == "the median magnitude is 0"
    assert found["rankme"].reason == "the hidden states are all the same"
    assert np.isnan(found["anisotropy"].value or 0)


def test_a_model_whose_mlps_are_not_known_has_a_residual_stream(
    measure: Measure, tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from picolm.readers.families import FAMILIES

    known = FAMILIES["llama"]
    parts = {role: part for role, part in known.parts.items() if role != "mlp.output"}
    monkeypatch.setitem(FAMILIES, "llama", replace(known, parts=parts))
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).integers(0, 61, (3, 7)))
    found = measure({"probe_name": "dormant"}, runs=(str(save(make("llama"), "step7")),), observe={"rows": "rows.npy"})
    assert value(found, "dormant.rankme", layer=1) > 1
    (reason,) = found[found["metric"] == "dormant.dead"]["reason"]
    assert "has no MLPs whose parts are known" in reason
