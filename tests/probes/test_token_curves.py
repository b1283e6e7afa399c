"""Curves of tokens against reference values, and sigmoids whose parameters are known."""

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from tests.probes.conftest import REFERENCE, Measure, expected
from tests.probes.known import Known, random_model, readings, rows_of_lists

from picolm.probes import Reading
from picolm.probes.token_curves import acquisition, fit_sigmoids

CHANCE = 9.0


@pytest.mark.parametrize(("series", "steps"), [("llama_s0", (0, 300, 500)), ("neox_s0", (0, 500))])
def test_loss_by_frequency_is_that_of_independent_code(
    measure: Measure, rows: dict[str, str], series: str, steps: tuple[int, ...]
) -> None:
    probe = {"probe_name": "token_curves", "training_rows": rows["corpus_train"]}
    found = measure(probe, runs=(series,), steps=list(steps), observe={"rows": rows["val"]})
    for step in steps:
        at = found[found["step"] == step].set_index(["metric", "bin"])["value"]
        known = expected(series, step)["loss_by_log10_count"]
        assert set(at["token_curves.frequency_loss"].index) == set(known)
        for group, (loss, positions) in known.items():
            assert at["token_curves.frequency_loss", group] == pytest.approx(loss, abs=1e-5)
            assert at["token_curves.frequency_positions", group] == positions


def test_surprisal_of_each_token_is_that_of_independent_code(measure: Measure, rows: dict[str, str]) -> None:
    probe = {"probe_name": "token_curves", "min_count": 38}
    found = measure(probe, steps=[0, 300, 500], observe={"rows": rows["corpus_val"], "max_rows": 128})
    curves = np.load(REFERENCE / "llama_s0.token_curves.npz")
    surprisal = found[found["metric"] == "token_curves.surprisal"]
    assert set(surprisal["bin"]) == {str(token) for token in np.flatnonzero(curves["counts"] >= 38)}
    places = [curves["steps"].tolist().index(step) for step in surprisal["step"]]
    known = curves["surprisal_bits"][places, surprisal["bin"].astype(int)]
    np.testing.assert_allclose(surprisal["value"], known, atol=5e-5)
    assert set(surprisal["chance"]) == {9.0}
    ages = found[found["metric"] == "token_curves.age_of_acquisition"]
    assert set(ages["reason"]) == {"a sigmoid has four parameters, and there are 2 steps after step 0"}
    assert set(ages["step"]) == {500}
    best = found[found["metric"] == "token_curves.best"].set_index("bin")["value"]
    assert best.to_dict() == surprisal[surprisal["step"] > 0].groupby("bin")["value"].min().to_dict()


def _steps(steps: Sequence[int], curves: dict[str, Sequence[float | None]]) -> list[tuple[int, list[Reading]]]:
    """The readings of each step that a table would hold."""
    return [
        (step, [Reading("surprisal", curve[place], bin=token, chance=CHANCE) for token, curve in curves.items()])
        for place, step in enumerate(steps)
    ]


def _found(steps: Sequence[int], curves: dict[str, Sequence[float | None]]) -> dict[tuple[str, str], Reading]:
    return {(reading.name, reading.bin): reading for _, reading in acquisition(_steps(steps, curves))}


def test_ages_and_forgetting_are_those_of_independent_code() -> None:
    curves, known = (
        np.load(REFERENCE / "llama_s0.token_curves.npz"),
        json.loads((REFERENCE / "llama_s0.aoa.json").read_text()),
    )
    of_tokens = {token: curves["surprisal_bits"][:, int(token)].astype(float).tolist() for token in known["tokens"]}
    found = _found(curves["steps"].tolist(), of_tokens)
    keys = {"forgetting": "forgetting_raw_bits", "best": "best_bits", "final": "final_bits"}
    for token, numbers in known["tokens"].items():
        age = found["age_of_acquisition", token]
        assert age.value == pytest.approx(numbers["aoa_log10_step"], abs=1e-4), token
        for name, key in keys.items():
            assert found[name, token].value == pytest.approx(numbers[key], abs=1e-5)


STEPS = [0, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000]


def _sigmoid(low: float, high: float, slope: float, middle: float) -> list[float]:
    return [low + (high - low) / (1 + math.exp(-slope * (math.log10(max(step, 1)) - middle))) for step in STEPS]


@pytest.mark.parametrize("slope", [1.5, 3.0, 8.0])
@pytest.mark.parametrize("middle", [0.8, 2.0, 3.1])
def test_a_sigmoid_is_found_again(slope: float, middle: float) -> None:
    curve = [-y for y in _sigmoid(-CHANCE, -3.0, slope, middle)]
    age = _found(STEPS, {"7": curve})["age_of_acquisition", "7"].value
    share = ((CHANCE - min(curve)) / 2) / (CHANCE - 3)  # of the rise, where the middle of chance and best is
    assert age == pytest.approx(middle - math.log(1 / share - 1) / slope, abs=1e-6)


def test_the_fit_is_no_worse_than_any_near_it() -> None:
    x_S, generator = np.log10(STEPS[1:]), np.random.default_rng(0)
    y_CS = np.array([_sigmoid(-9, -4, 3, 2)[1:]] * 20) + generator.normal(0, 0.4, (20, len(x_S)))
    fit = fit_sigmoids(x_S, y_CS)

    def error_C(slope_C: np.ndarray, middle_C: np.ndarray) -> np.ndarray:
        shape_CS = 1 / (1 + np.exp(-slope_C[:, None] * (x_S - middle_C[:, None])))
        return np.array([np.linalg.lstsq(np.stack([s, s**0], -1), y, rcond=None)[1][0] for s, y in zip(shape_CS, y_CS)])

    best_C = error_C(fit.slope_C, fit.middle_C)
    for up in (0.99, 1.01):
        assert (error_C(fit.slope_C * up, fit.middle_C) >= best_C - 1e-9).all()
        assert (error_C(fit.slope_C, fit.middle_C * up) >= best_C - 1e-9).all()


@pytest.mark.parametrize(
    ("curve", "reason"),
    [
        ([9.0, *[9.5] * 9], "never better than chance"),
        ([9.0, *[3.0, 3.1, 2.9, 3.0, 3.05, 2.95, 3.0, 3.0, 3.0]], "never passes"),
        ([9.0, 5.0, 4.5, 4.2, 4.1, 4.05, 4.02, 4.01, 4.0, 4.0], "before the first of these steps"),
        ([9.0, 5.0, None, 4.2, 4.1, 4.05, 4.02, 4.01, 4.0, 4.0], "not a number"),
    ],
)
def test_a_curve_without_an_age_says_why(curve: list[float | None], reason: str) -> None:
    found = _found(STEPS, {"7": curve, "8": [-y for y in _sigmoid(-9, -3, 3, 2)]})
    assert found["age_of_acquisition", "7"].value is None
    assert reason in found["age_of_acquisition", "7"].reason
    assert found["age_of_acquisition", "8"].value == pytest.approx(2, abs=0.01)  # the other one is not touched


def test_forgetting_counts_increases_alone_and_step_0_is_no_point() -> None:
    found = _found([0, 10, 20, 30, 40], {"3": [1.0, 8.0, 5.0, 6.5, 6.0]})
    assert found["forgetting", "3"].value == pytest.approx(1.5)
    assert (found["best", "3"].value, found["final", "3"].value) == (5.0, 6.0)
    assert _found([0], {"3": [9.0]}) == {}
    assert list(acquisition([])) == []


def test_tokens_that_are_rare_here_are_left_out_and_never_counted_ones_are_a_bin(tmp_path: object) -> None:
    np.save(f"{tmp_path}/training.npy", np.array([[0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2]]))
    rows = rows_of_lists([[0, 1, 2, 1, 3], [3, 1, 1]])
    found = readings("token_curves", random_model(5), rows, min_count=2, training_rows=f"{tmp_path}/training.npy")
    assert {bin for name, bin in found if name == "surprisal"} == {"1"}
    positions = {bin: reading.value for (name, bin), reading in found.items() if name == "frequency_positions"}
    assert positions == {"unseen": 1, "0": 1, "1": 4}
    nats = torch.cat([random_model(5).forward(rows, [row]).nats_BP[0] for row in (0, 1)])
    targets = torch.cat([row[1:] for row in rows.tokens])
    assert found["surprisal", "1"].value == pytest.approx(float(nats[targets == 1].mean()) / math.log(2))
    assert found["surprisal", "1"].chance == pytest.approx(math.log2(5))
    assert found["frequency_loss", "unseen"].value == pytest.approx(float(nats[targets == 3].mean()))
    without = readings("token_curves", random_model(5), rows, min_count=2)
    assert "state a file of its training rows" in without["frequency_loss", ""].reason
    assert without["surprisal", "1"] == found["surprisal", "1"]


def test_nan_is_no_surprisal() -> None:
    broken = Known(lambda tokens_BT: torch.full((*tokens_BT.shape, 5), math.nan), 5)
    found = readings("token_curves", broken, rows_of_lists([[0, 1, 1]]), min_count=1)
    assert found["surprisal", "1"].value is None
