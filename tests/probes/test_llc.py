"""The local learning coefficient: chains on potentials whose values are known exactly, and on trained models."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.probes.conftest import REFERENCE, Measure, value
from torch import Tensor

from picolm.errors import PicoError
from picolm.probes.llc import CURVATURES, Potential, Settings, _potential, read_of_regular, sample

CASES = json.loads((REFERENCE / "landscape" / "llc_analytic.json").read_text())["cases"]
QUADRATICS = [case for case in CASES if "h" in case]
SINGULAR = [
    case for case in CASES if "h" not in case and "eps" in case
]  # those of nbeta 1e6 are too stiff for any chain
EXPONENTS = {"x^4": (4,), "x^6": (6,), "a^2 b^2": (2, 2), "a^2 b^4": (2, 4)}
SMALL = {"chains": 2, "draws": 6, "burn_in": 2, "step_size": 1e-5, "batch": 4, "precision": "float32"}


def quadratic(h: Any) -> Potential:
    """Return the potential sum h w^2 / 2 of many chains at once, [C, D]."""
    h_D = torch.as_tensor(h, dtype=torch.float64)
    return lambda place_CD, draw: ((h_D * place_CD.square()).sum(-1) / 2, h_D * place_CD)


def monomial(exponents: tuple[int, ...]) -> Potential:
    """Return the potential that is the product of the parameters, each to its exponent."""
    exponents_D = torch.tensor(exponents)

    def at(place_CD: Tensor, draw: int) -> tuple[Tensor, Tensor]:
        powers_CD = place_CD**exponents_D
        others_CD = powers_CD.prod(-1, keepdim=True) if len(exponents) == 1 else powers_CD.flip(-1)
        own_CD = exponents_D * place_CD ** (exponents_D - 1)
        return powers_CD.prod(-1), own_CD if len(exponents) == 1 else own_CD * others_CD

    return at


def read(potential: Potential, size: int, settings: Settings, chains: int = 400, seed: int = 0) -> tuple[float, float]:
    """Return what chains that start at 0, where the potential is 0, read on average, and its standard error."""
    start_CD, generator = torch.zeros(chains, size, dtype=torch.float64), torch.Generator().manual_seed(seed)
    losses_TC = sample(potential, start_CD, settings, generator)
    of_chains = settings.nbeta * losses_TC[settings.burn_in :].mean(0)
    return float(of_chains.mean()), float(of_chains.std()) / math.sqrt(chains)


def of_case(case: Mapping[str, Any], burn_in: int, draws: int) -> Settings:
    return Settings(case["nbeta"], case["eps"], case["gamma"], burn_in, draws)


@pytest.mark.parametrize("case", QUADRATICS, ids=lambda case: f"{case['nbeta']:g}-{case['gamma']:g}-{case['eps']:g}")
def test_a_quadratic_reads_what_the_discrete_chain_must_read(case: Mapping[str, Any]) -> None:
    """A settled chain, and exactly these draws of one that began at the minimum."""
    settings = of_case(case, 1000, 1000)
    settled, expected = (sum(numbers) for numbers in zip(*(read_of_regular(h, settings) for h in case["h"])))
    assert settled == pytest.approx(case["value_of_the_discrete_chain"], rel=1e-12)
    found, error = read(quadratic(case["h"]), len(case["h"]), settings)
    assert abs(found - expected) < 4 * error
    if case["burn_in_needed_about"] < 1000:
        assert abs(found - case["value_of_the_discrete_chain"]) < 4 * error


@pytest.mark.parametrize("burn_in", [0, 1, 5])
def test_draws_of_a_chain_that_has_not_settled(burn_in: int) -> None:
    """The loss before each step: the first draw is the start itself, with the loss 0. One draw more or less is seen."""
    settings, h = Settings(10.0, 0.002, 5.0, burn_in, 10), (2.0, 10.0)
    found, error = read(quadratic(h), 2, settings, chains=40_000)
    assert abs(found - sum(read_of_regular(each, settings)[1] for each in h)) < 4 * error
    for off in (settings._replace(burn_in=burn_in + 1), settings._replace(draws=9), settings._replace(draws=11)):
        assert abs(found - sum(read_of_regular(each, off)[1] for each in h)) > 4 * error
    potential = quadratic(h)
    assert sample(potential, torch.zeros(1, 2), settings, torch.Generator())[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("case", SINGULAR, ids=lambda case: f"{case['potential']}-{case['nbeta']:g}-{case['gamma']:g}")
def test_singular_potentials_by_long_chains(case: Mapping[str, Any]) -> None:
    check_singular(case, 3000)


@pytest.mark.parametrize("case", [SINGULAR[0], SINGULAR[10]], ids=lambda case: case["potential"])
def test_singular_potentials(case: Mapping[str, Any]) -> None:
    """Where the loss has no quadratic part, the coefficient is less than half of the number of parameters (Watanabe 2009)."""
    check_singular(case, 1500)


def check_singular(case: Mapping[str, Any], draws: int) -> None:
    exponents = EXPONENTS[case["potential"]]
    found, error = read(monomial(exponents), len(exponents), of_case(case, draws, draws))
    assert found == pytest.approx(case["gibbs_value"], rel=0.2)
    assert error < 0.05 * found
    if case["gamma"] == 0:  # x^2k: 1 / 2k
        assert found == pytest.approx(1 / exponents[0], rel=0.1)


def test_the_step_of_rmsprop_sgld_is_that_of_its_formula() -> None:
    """Against a loop over single parameters, with the same noise."""
    settings, h = Settings(10.0, 0.01, 5.0, 0, 30, "rmsprop_sgld"), [2.0, 30.0]
    start_CD, generator = torch.tensor([[0.1, -0.2]], dtype=torch.float64), torch.Generator()
    losses_T = sample(quadratic(h), start_CD, settings, generator.manual_seed(3))[:, 0]
    generator, place, mean_square, expected = torch.Generator().manual_seed(3), [0.1, -0.2], [0.0, 0.0], []
    for _ in range(30):
        expected.append(sum(curvature * w * w / 2 for curvature, w in zip(h, place)))
        noise = torch.randn(1, 2, generator=generator, dtype=torch.float64)[0].tolist()
        for i, begin in enumerate((0.1, -0.2)):
            slope = h[i] * place[i]
            mean_square[i] = 0.99 * mean_square[i] + 0.01 * slope**2
            size = 0.01 / (math.sqrt(mean_square[i]) + 0.1)
            place[i] += -size / 2 * (10 * slope + 5 * (place[i] - begin)) + math.sqrt(size) * noise[i]
    assert losses_T.tolist() == pytest.approx(expected, rel=1e-12)


def test_rmsprop_sgld_of_a_quadratic_whose_steps_are_small() -> None:
    """With little noise in the factor of the step size, the law is the same: nbeta h / 2 (nbeta h + gamma) of each direction."""
    settings = Settings(50.0, 2e-4, 20.0, 1500, 1500, "rmsprop_sgld", decay=0.999, damping=1.0)
    found, error = read(quadratic([1.0, 4.0]), 2, settings)
    assert found == pytest.approx(50 / 140 + 200 / 440, rel=0.05)
    assert error < 0.02


def test_what_a_regular_direction_reads() -> None:
    """The numbers that are told to beginners: a pull of 100 reads 2.5 of 5, a step size of 0.01 reads 6.7."""
    ten = [1.0] * 10
    assert sum(read_of_regular(h, Settings(100, 1e-4, 100, 0, 1))[0] for h in ten) == pytest.approx(2.5126, abs=1e-4)
    assert sum(read_of_regular(h, Settings(100, 1e-2, 0, 0, 1))[0] for h in ten) == pytest.approx(20 / 3)
    assert read_of_regular(0.0, Settings(100, 1e-2, 0, 0, 1)) == (0.0, 0.0)
    assert read_of_regular(1.0, Settings(100, 1e-4, 1, 0, 1))[1] == pytest.approx(0)  # the start itself
    with pytest.raises(PicoError, match=r"step_size \* a is 4.01"):
        read_of_regular(4.0, Settings(100, 1e-2, 1, 0, 1))


@pytest.mark.parametrize(("step_size", "ceiling"), [(0.05, math.inf), (0.05, 1e6), (1.0, math.inf)])
def test_a_chain_that_explodes_is_no_number(step_size: float, ceiling: float) -> None:
    settings = Settings(100.0, step_size, 0.0, 0, 5000)
    with pytest.raises(PicoError, match=r"the chain explodes: its loss is .* lower step_size, now"):
        sample(quadratic([1.0]), torch.zeros(1, 1, dtype=torch.float64), settings, torch.Generator(), ceiling)


@pytest.mark.parametrize(("series", "step"), [("llama_s0", 0), ("llama_s0", 500), ("neox_s0", 500)])
def test_the_readings_of_a_model(measure: Measure, rows: dict[str, str], series: str, step: int) -> None:
    entry = {"probe_name": "llc", **SMALL, "nbeta": 15.0, "localization": 1000, "sampler": "rmsprop_sgld"}
    plain = {**entry, "sampler": "sgld"}
    found = measure(entry, plain, runs=(series,), steps=[step], observe={"rows": rows["val"], "max_rows": 8})
    assert set(found["kind"]) == {"landscape"}
    for sampler, part in found.groupby(found["options"].str.contains("rmsprop")):
        chains = part[part["metric"] == "llc.chain_llc"]["value"]
        assert len(chains) == 2
        assert chains.iloc[0] != chains.iloc[1]
        assert value(part, "llc.llc") == pytest.approx(chains.mean())
        error = part[part["metric"] == "llc.llc"]["standard_error"].iloc[0]
        assert error == pytest.approx(chains.std() / math.sqrt(2))
        trace = part[part["metric"] == "llc.trace_loss"].set_index("bin")["value"]
        assert list(trace.index) == [f"{draw}-{draw}" for draw in range(8)]
        assert value(part, "llc.llc") == pytest.approx(
            15 * (trace.iloc[2:].mean() - value(part, "llc.start_loss")), abs=1e-9
        )
        assert value(part, "llc.drift") == pytest.approx(
            15 * (trace.iloc[5:].mean() - trace.iloc[2:5].mean()), abs=1e-9
        )
        regular = part[part["metric"] == "llc.regular_read"]
        assert regular["value"].isna().all() == sampler
        settled = part[part["metric"] == "llc.regular_settled"].set_index("bin")["value"]
        assert sampler or settled["10"] == pytest.approx(150 / 1150 / (1 - 1e-5 * 1150 / 4), rel=1e-12)
    step_pull = found[(found["metric"] == "llc.step_pull") & found["value"].notna()].set_index("bin")["value"]
    assert step_pull.to_dict() == pytest.approx({f"{h:g}": 1e-5 * (15 * h + 1000) for h in CURVATURES})
    note = found[found["metric"] == "llc.llc"]["note"].iloc[1]
    assert "nbeta 15, localization 1000, step_size 1e-05: a direction of curvature 66.7 reads half" in note


def test_all_rows_of_each_draw_are_the_default_and_the_first_draw_is_the_checkpoint(
    measure: Measure, rows: dict[str, str]
) -> None:
    """The second draw of a chain almost without pull and loss is one step of noise: its loss is that of moved weights."""
    entry = {**SMALL, "probe_name": "llc", "draws": 2, "burn_in": 0, "chains": 1, "precision": "float64"}
    del entry["batch"]
    found = measure(entry, steps=[500], observe={"rows": rows["val"], "max_rows": 8})
    start, trace = value(found, "llc.start_loss"), found[found["metric"] == "llc.trace_loss"]["value"].tolist()
    assert trace[0] == pytest.approx(start, rel=1e-12)
    assert trace[1] > start
    assert value(found, "llc.llc") == pytest.approx(8 / math.log(8) * (trace[1] - start) / 2)
    assert found[found["metric"] == "llc.llc"]["standard_error"].isna().all()


def test_chains_on_all_rows_differ_by_their_noise(measure: Measure, rows: dict[str, str]) -> None:
    entry = {"probe_name": "llc", **SMALL, "batch": 8, "draws": 2, "burn_in": 0}
    found = measure(entry, steps=[500], observe={"rows": rows["val"], "max_rows": 8})
    first, second = found[found["metric"] == "llc.chain_llc"]["value"]
    assert first != second


def test_each_draw_of_each_chain_has_rows_of_its_own() -> None:
    class Recorded:
        def __init__(self) -> None:
            self.moved, self.asked = list[Tensor](), list[Any]()

        def move(self, place_D: Tensor) -> None:
            self.moved.append(place_D)

        def loss_and_gradient(self, rows: Any) -> tuple[float, Tensor]:
            self.asked.append(rows)
            return 0.0, torch.zeros(1)

    surface: Any = Recorded()
    for chain, draw in ((0, 0), (0, 1), (1, 0), (0, 0)):
        _potential(surface, 20, 6, 0, chain)(torch.ones(1), draw)
    of_loss = surface.asked
    assert {len(set(rows)) for rows in of_loss} == {6}
    assert of_loss[0] == of_loss[3]
    assert of_loss[0] != of_loss[1] != of_loss[2] != of_loss[0]
    _potential(surface, 20, 20, 0, 0)(torch.ones(1), 0)
    assert surface.asked[-1] is None


def test_the_same_seed_gives_the_same_chains(measure: Measure, rows: dict[str, str]) -> None:
    keys: dict[str, Any] = {"steps": [500], "observe": {"rows": rows["val"], "max_rows": 8}}
    entry = {"probe_name": "llc", **SMALL, "draws": 3}
    first = value(measure(entry, **keys), "llc.llc")
    again = value(measure({**entry, "seed": 0, "sampler": "sgld"}, **keys), "llc.llc")
    other = value(measure({**entry, "seed": 1}, **keys), "llc.llc")
    assert first == again != other


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"step_size": 10.0}, "the chain explodes: its loss is .* lower step_size, now 10"),
        ({"max_rows": 1}, "nbeta of one row, n / ln n, is not defined"),
    ],
)
def test_what_cannot_be_estimated_is_told_and_the_rest_goes_on(
    measure: Measure, rows: dict[str, str], options: dict[str, Any], told: str
) -> None:
    entry = {"probe_name": "llc", **SMALL, "rows": rows["val"], "max_rows": 4, **options}
    found = measure(entry, {"probe_name": "calibration"}, steps=[500], observe={"rows": rows["val"], "max_rows": 2})
    of_llc = found[found["metric"].str.startswith("llc")]
    assert len(of_llc) == 1
    assert of_llc["value"].isna().all()
    assert of_llc["reason"].str.contains(told, regex=True).all()
    assert value(found, "calibration.accuracy") >= 0


def test_weights_that_are_no_numbers(measure: Measure, rows: dict[str, str], tmp_path: Path) -> None:
    for step in ("step_0", "step_500"):
        place = tmp_path / "broken" / step
        place.mkdir(parents=True)
        source = REFERENCE / "checkpoints" / "llama_s0" / step
        (place / "config.json").write_bytes((source / "config.json").read_bytes())
        tensors = load_file(source / "model.safetensors")
        if step == "step_500":
            tensors["model.norm.weight"][5] = float("nan")
        save_file(tensors, place / "model.safetensors", {"format": "pt"})
    entry = {"probe_name": "llc", **SMALL, "rows": rows["val"], "max_rows": 4, "draws": 1, "burn_in": 0}
    found = measure(entry, runs=(str(tmp_path / "broken"),))
    assert found[(found["step"] == 500)]["value"].isna().all()
    assert "the loss of the checkpoint is nan" in found[found["step"] == 500]["reason"].iloc[0]
    assert np.isfinite(value(found, "llc.llc", 0))
    assert found[(found["step"] == 0) & (found["metric"] == "llc.drift")]["reason"].iloc[0] == "one draw has no halves"
