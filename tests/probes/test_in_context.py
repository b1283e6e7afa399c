"""The loss by position and the in-context score, against reference values and rows of known losses."""

import math

import numpy as np
import pytest
import torch
from tests.probes.conftest import REFERENCE, Measure, expected, value
from tests.probes.known import Known, readings, rows_of_lists

from picolm.errors import PicoError

CHECKPOINTS = [("llama_s0", (0, 300, 500)), ("neox_s0", (0, 500))]


@pytest.mark.parametrize(("series", "steps"), CHECKPOINTS)
def test_score_and_losses_are_those_of_independent_code(
    measure: Measure, rows: dict[str, str], series: str, steps: tuple[int, ...]
) -> None:
    probe = {"probe_name": "in_context", "early": 10, "late": 50}
    found = measure(probe, runs=(series,), steps=list(steps), observe={"rows": rows["val"]})
    for step in steps:
        known = expected(series, step)
        score = value(found, "in_context.in_context_score", step)
        assert score == pytest.approx(known["icl_score_k50_minus_k10"], abs=1e-5)
        for position, loss in zip(("10", "50"), known["val_loss_by_position_k10_k50"]):
            assert value(found, "in_context.position_loss", step, bin=position) == pytest.approx(loss, abs=1e-5)


def test_every_position_and_its_error_is_that_of_the_stored_losses(measure: Measure, rows: dict[str, str]) -> None:
    found = measure({"probe_name": "in_context"}, steps=[300], observe={"rows": rows["val"]})
    losses_RP = np.load(REFERENCE / "llama_s0-step_300.token_loss.npz")["val"].astype(float)
    by_position = found[found["metric"] == "in_context.position_loss"]
    assert by_position["bin"].tolist() == [str(position) for position in range(63)]
    np.testing.assert_allclose(by_position["value"], losses_RP.mean(0), atol=5e-5)
    np.testing.assert_allclose(by_position["standard_error"], losses_RP.std(0, ddof=1) / 8, atol=1e-5)
    score = found[found["metric"] == "in_context.in_context_score"].iloc[0]
    difference_R = losses_RP[:, 62] - losses_RP[:, 6]
    assert score["value"] == pytest.approx(difference_R.mean(), abs=1e-4)
    assert score["standard_error"] == pytest.approx(difference_R.std(ddof=1) / 8, abs=1e-5)
    assert score["note"] == "position 62 minus position 6, 64 rows; scaled, since the rows are too short for 500"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"late": 63}, "there is no position 63: the longest row has 63 positions"),
        ({"early": 500}, "there is no position 500"),
        ({"early": 20, "late": 20}, "early (20) has to be before late (20)"),
    ],
)
def test_positions_that_are_not_there_are_said_and_the_rest_goes_on(
    measure: Measure, rows: dict[str, str], options: dict[str, int], words: str
) -> None:
    entries = ({"probe_name": "in_context", **options}, {"probe_name": "calibration"})
    found = measure(*entries, steps=[0], observe={"rows": rows["val"]})
    reasons = found["reason"].tolist()
    assert any(words in reason for reason in reasons)
    assert value(found, "calibration.accuracy") >= 0


def _counting(losses: list[float]) -> Known:
    """A model of two tokens, of which the loss of token 0 at each position is given."""
    p = torch.tensor(losses).neg().exp().double()
    logits_TV = torch.stack([p, 1 - p], -1).log()
    return Known(lambda tokens_BT: logits_TV[: tokens_BT.shape[1]].expand(len(tokens_BT), -1, -1), 2)


def test_with_long_rows_the_positions_are_those_of_the_paper() -> None:
    losses = [2.0 - position / 1000 for position in range(600)]
    found = readings("in_context", _counting(losses), rows_of_lists([[0] * 601] * 3))
    score = found["in_context_score", ""]
    assert score.value == pytest.approx(-0.45)
    assert score.standard_error == pytest.approx(0, abs=1e-6)
    assert score.note == "position 500 minus position 50, 3 rows"
    only_early = readings("in_context", _counting(losses), rows_of_lists([[0] * 601]), early=0)["in_context_score", ""]
    assert only_early.value == pytest.approx(-0.5)
    assert only_early.standard_error is None  # of one row


def test_rows_of_several_lengths_are_read_where_they_are_long_enough() -> None:
    rows = rows_of_lists([[0] * 3, [0] * 61, [0] * 61, [0] * 82])
    found = readings("in_context", _counting([1 + position / 100 for position in range(90)]), rows)
    assert found["in_context_score", ""].value == pytest.approx(0.54)
    assert found["in_context_score", ""].note.startswith("position 59 minus position 5, 3 rows")
    assert len([bin for name, bin in found if name == "position_loss"]) == 81
    assert found["position_loss", "80"].standard_error is None


def test_rows_of_one_position_have_no_score_and_nan_is_no_value() -> None:
    found = readings("in_context", _counting([1.0]), rows_of_lists([[0, 0]] * 2))
    assert found["in_context_score", ""].value is None
    assert found["position_loss", "0"].value == pytest.approx(1)
    broken = readings("in_context", _counting([math.nan] * 9), rows_of_lists([[0] * 8] * 2))
    assert all(reading.value is None and "not a number" in reading.reason for reading in broken.values())
    with pytest.raises(PicoError, match="there is no position 4"):
        readings("in_context", _counting([1.0] * 9), rows_of_lists([[0] * 5]), late=4)
