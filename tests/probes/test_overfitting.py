"""Overfitting against reference values, and on own runs against all rows that a step has and has not seen."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tests.analyze.conftest import runs
from tests.probes.conftest import Measure, expected, value
from tests.probes.known import Known, random_model, readings, rows_of_lists

from picolm.errors import PicoError
from picolm.observe.subject import Subject
from picolm.observe.training import SeenRows, rows_of_tokens
from picolm.probes.means import mean_of
from picolm.store import Run

__all__ = ["runs"]
B, ROWS = 8, 120  # rows of a step and of the data of the runs here


@pytest.mark.parametrize(("series", "steps"), [("llama_s0", (0, 300, 500)), ("neox_s0", (0, 500))])
def test_losses_and_gap_are_those_of_independent_code(
    measure: Measure, rows: dict[str, str], series: str, steps: tuple[int, ...]
) -> None:
    probe = {"probe_name": "overfitting", "training_rows": rows["corpus_train"], "sample": 256}
    found = measure(
        probe,
        runs=(series,),
        steps=list(steps),
        observe={"rows": rows["corpus_val"], "max_rows": 256, "batch_size": 64},
    )
    for step in steps:
        known = expected(series, step)
        for name, key in (
            ("training_loss", "loss_train_first_256_rows"),
            ("held_out_loss", "loss_val_256_rows"),
            ("generalization_gap", "gap_val_minus_train"),
        ):
            assert value(found, f"overfitting.{name}", step) == pytest.approx(known[key], abs=1e-5)
        errors = found[found["step"] == step].set_index("metric")["standard_error"]
        both = errors["overfitting.training_loss"], errors["overfitting.held_out_loss"]
        assert errors["overfitting.generalization_gap"] == pytest.approx(math.hypot(*both))


def _at(found: pd.DataFrame, step: int) -> dict[str, float]:
    chosen = found[found["step"] == step]
    return dict(zip(chosen["metric"].str.removeprefix("overfitting."), chosen["value"]))


def test_with_room_for_all_rows_the_losses_are_those_of_all_of_them(measure: Measure, runs: dict[str, Path]) -> None:
    """Off by one batch in either direction, the losses would be others."""
    found = measure({"probe_name": "overfitting", "sample": 1000}, runs=(str(runs["narrow"]),))
    run = Run.open(runs["narrow"])
    training = SeenRows(run)
    for step in (2, 4, 6):
        subject, seen = Subject(run, run[step]), training.before(step)
        assert len(set(seen)) == step * B
        unseen = np.setdiff1d(np.arange(ROWS), seen)
        means = {
            name: mean_of(name, subject.scores(rows_of_tokens(training.tokens(numbers))))
            for name, numbers in (("seen_loss", seen), ("unseen_loss", unseen))
        }
        at = _at(found, step)
        for name, mean in means.items():
            assert at[name] == pytest.approx(mean.value, abs=1e-6)
        assert at["seen_gap"] == pytest.approx(at["unseen_loss"] - at["seen_loss"])
        assert at["generalization_gap"] == pytest.approx(at["held_out_loss"] - at["seen_loss"])
        assert "training_loss" not in at


def test_step_0_has_seen_no_rows(measure: Measure, runs: dict[str, Path]) -> None:
    found = measure({"probe_name": "overfitting"}, runs=(str(runs["narrow"]),), steps=[0])
    at = found.set_index("metric")
    for name in ("seen_loss", "generalization_gap", "seen_gap"):
        assert at.loc[f"overfitting.{name}", "reason"] == "the step has seen no rows"
    assert at.loc["overfitting.unseen_loss", "value"] == pytest.approx(math.log(64), rel=0.1)


class FakeRun(SeenRows):
    """A run of 10 steps of 4 rows, of data that it reads in another order."""

    def __init__(self, rows: int = 50):
        self.rows_per_step, self.end, self._rows = 4, 10, rows

    def __len__(self) -> int:
        return self._rows

    def of_step(self, step: int) -> np.ndarray:
        return (np.arange(4 * step, 4 * step + 4) * 7 + 3) % self._rows


@pytest.mark.parametrize("sample", [3, 8, 100])
def test_what_is_drawn_was_seen_before_the_step_or_comes_after_it(sample: int) -> None:
    run = FakeRun()
    seen = drawn_rows(run, 0, 5 * 4, sample, 0)
    coming = drawn_rows(run, 5 * 4, 10 * 4, sample, 0)
    for drawn, all_of in ((seen, run.before(5)), (coming, np.concatenate([run.of_step(s) for s in range(5, 10)]))):
        assert len(drawn) == len(set(drawn)) == min(sample, 20)
        assert set(drawn) <= set(all_of)
    assert (drawn_rows(run, 0, 20, sample, 1).tolist() == seen.tolist()) is (sample == 100)
    assert drawn_rows(run, 0, 20, sample, 0).tolist() == seen.tolist()


def drawn_rows(run: SeenRows, begin: int, end: int, sample: int, seed: int) -> np.ndarray:
    from picolm.probes.overfitting import _drawn

    return _drawn(run, begin, end, sample, seed, "rows", 5)


def test_after_a_pass_over_the_data_nothing_is_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Few(FakeRun):
        def tokens(self, numbers: object) -> torch.Tensor:
            return torch.zeros(len(numbers), 4, dtype=torch.long)  # type: ignore[arg-type]

    monkeypatch.setattr("picolm.probes.overfitting.rows_that_trained", lambda run, place: Few(4))
    found = readings("overfitting", random_model(5), rows_of_lists([[0, 1, 2], [1, 2, 3]]))
    assert found["unseen_loss", ""].reason == found["seen_gap", ""].reason == "the step has seen all training rows"
    assert found["generalization_gap", ""].value is not None
    assert found["seen_loss", ""].note == "4 rows"


def test_a_bound_is_said_to_be_one(tmp_path: Path) -> None:
    np.save(tmp_path / "training.npy", np.array([[0, 1, 2, 3], [1, 1, 1, 1]]))
    model, rows = random_model(5), rows_of_lists([[0, 1, 2], [1, 2, 3, 4]])
    exact = readings("overfitting", model, rows, training_rows=str(tmp_path / "training.npy"))
    model.likelihood = "bound"
    bound = readings("overfitting", model, rows, training_rows=str(tmp_path / "training.npy"))
    for name in ("held_out_loss", "training_loss", "generalization_gap"):
        assert bound[name, ""].value == pytest.approx(exact[name, ""].value)
        assert "upper bound" in bound[name, ""].note
        assert "bound" not in exact[name, ""].note


def test_one_row_has_no_error_and_nan_no_gap(tmp_path: Path) -> None:
    np.save(tmp_path / "training.npy", np.array([[0, 1, 2, 3]]))
    place = str(tmp_path / "training.npy")
    found = readings("overfitting", random_model(5), rows_of_lists([[0, 1, 2], [1, 2, 3]]), training_rows=place)
    assert found["generalization_gap", ""].value is not None
    assert found["generalization_gap", ""].standard_error is None
    broken = Known(lambda tokens_BT: torch.full((*tokens_BT.shape, 5), math.nan), 5)
    gone = readings("overfitting", broken, rows_of_lists([[0, 1, 2]]), training_rows=place)
    assert {reading.value for reading in gone.values()} == {None}


def test_without_training_rows_it_says_what_to_state() -> None:
    with pytest.raises(PicoError, match="state a file of its training rows"):
        readings("overfitting", random_model(5), rows_of_lists([[0, 1, 2]]))
