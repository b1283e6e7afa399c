"""N-grams against reference values, brute force, and models that are n-grams themselves."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tests.analyze.conftest import runs
from tests.probes.conftest import Measure, expected, value
from tests.probes.known import Known, random_model, readings, rows_of_lists
from torch import Tensor

from picolm.errors import PicoError
from picolm.observe.training import SeenRows
from picolm.store import Run

__all__ = ["runs"]
REFERENCES = {
    "unigram_kl": "kl_unigram_to_model",
    "unigram_js": "js_unigram_model",
    "unigram_reverse_kl": "kl_model_to_unigram_add1",
    "bigram_kl": "kl_bigram_to_model_seen_contexts",
    "bigram_js": "js_bigram_model_seen_contexts",
    "bigram_cross_entropy": "ce_bigram_model_seen_contexts",
    "bigram_unseen": "contexts_unseen",
}
NAMES = {1: "unigram", 2: "bigram", 3: "trigram"}


@pytest.mark.parametrize(("series", "steps"), [("llama_s0", (0, 300, 500)), ("neox_s0", (0, 500))])
def test_divergences_are_those_of_independent_code(
    measure: Measure, rows: dict[str, str], series: str, steps: tuple[int, ...]
) -> None:
    probe = {"probe_name": "ngram", "training_rows": rows["corpus_train"]}
    found = measure(probe, runs=(series,), steps=list(steps), observe={"rows": rows["val"]})
    for step in steps:
        known = expected(series, step)
        for name, key in REFERENCES.items():
            assert value(found, f"ngram.{name}", step) == pytest.approx(known[key], abs=1e-5), name


TRAINING = [[0, 1, 2, 1, 2, 0], [3, 1, 1, 2, 0, 0], [2, 2, 1, 3, 0, 1]]  # of five ids, of which 4 is never there


def _file(folder: Path, rows: list[list[int]] = TRAINING) -> str:
    np.save(folder / "training.npy", np.array(rows))
    return str(folder / "training.npy")


def _followers(order: int, training: list[list[int]] = TRAINING) -> dict[tuple[int, ...], Counter[int]]:
    """Count what follows each context, by slices of each row."""
    found: dict[tuple[int, ...], Counter[int]] = {}
    for row in training:
        for place in range(max(order - 1, 1), len(row)):  # the first token of a row is no target
            found.setdefault(tuple(row[place - order + 1 : place]), Counter())[row[place]] += 1
    return found


def _shares(followers: Counter[int], vocabulary: int) -> np.ndarray:
    counts = np.array([followers[token] for token in range(vocabulary)], dtype=float)
    return counts / counts.sum()


@pytest.mark.parametrize("order", [1, 2, 3])
def test_all_is_as_by_plain_loops(tmp_path: Path, order: int) -> None:
    model, rows = random_model(5), rows_of_lists([[0, 1, 2, 4, 1, 1, 3], [4, 4, 1, 2], [2, 1], [1, 2, 0, 1, 1, 2, 2]])
    found = readings("ngram", model, rows, orders=[order], training_rows=_file(tmp_path))
    followers, lists = (
        _followers(order),
        {key: list[float]() for key in ("kl", "js", "cross_entropy", "loss", "unseen")},
    )
    for number, row in enumerate(rows.tokens):
        m_PV = model.forward(rows, [number]).log_probs_BPV[0].exp().numpy()
        for place in range(max(order - 2, 0), len(row) - 1):
            context = tuple(row[place - order + 2 : place + 1].tolist()) if order > 1 else ()
            lists["unseen"].append(context not in followers)
            if context not in followers:
                continue
            p, m = _shares(followers[context], 5), m_PV[place]
            mean, there = (p + m) / 2, p > 0
            lists["kl"].append((p * np.log(np.where(there, p, 1) / m)).sum())
            lists["js"].append(((p * np.log(np.where(there, p, mean) / mean)) + m * np.log(m / mean)).sum() / 2)
            lists["cross_entropy"].append(-(p * np.log(m)).sum())
            if p[row[place + 1]] > 0:
                lists["loss"].append(-np.log(p[row[place + 1]]))
    for key, numbers in lists.items():
        assert found[f"{NAMES[order]}_{key}", ""].value == pytest.approx(float(np.mean(numbers))), key
    all_positions = len(lists["unseen"])
    assert f"over {len(lists['loss'])} of {all_positions} positions" in found[f"{NAMES[order]}_loss", ""].note


def _exact(order: int) -> Known:
    """A model whose logits are the logarithms of the counted shares, minus infinity where nothing was counted."""
    followers = _followers(order)

    def predict(tokens_BT: Tensor) -> Tensor:
        logits_BTV = torch.zeros(*tokens_BT.shape, 5, dtype=torch.float64)
        for row, tokens in enumerate(tokens_BT.tolist()):
            for place in range(len(tokens)):
                context = tuple(tokens[max(place - order + 2, 0) : place + 1]) if order > 1 else ()
                if context in followers:
                    logits_BTV[row, place] = torch.as_tensor(_shares(followers[context], 5)).log()
        return logits_BTV

    return Known(predict, 5)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_an_exact_ngram_model_has_no_divergence(tmp_path: Path, order: int) -> None:
    rows, name = rows_of_lists([row[:5] for row in TRAINING]), NAMES[order]
    found = readings("ngram", _exact(order), rows, orders=[order], training_rows=_file(tmp_path))
    assert found[f"{name}_kl", ""].value == pytest.approx(0, abs=1e-12)
    assert found[f"{name}_js", ""].value == pytest.approx(0, abs=1e-12)
    assert found[f"{name}_unseen", ""].value == 0
    if order > 1:  # and another one has: the models differ in more than the order of their ids
        other = readings("ngram", _exact(1), rows, orders=[order], training_rows=_file(tmp_path))
        assert (other[f"{name}_kl", ""].value or 0) > 0.1


def test_a_certain_model_is_infinitely_far_but_no_more_than_ln_2(tmp_path: Path) -> None:
    logits_V = torch.tensor([-math.inf] * 4 + [0.0])  # the token that is never there
    model = Known(lambda tokens_BT: logits_V.expand(*tokens_BT.shape, 5), 5)
    found = readings("ngram", model, rows_of_lists(TRAINING), training_rows=_file(tmp_path))
    for name in NAMES.values():
        assert found[f"{name}_kl", ""].value == math.inf
        assert found[f"{name}_js", ""].value == pytest.approx(math.log(2))
    assert found["unigram_reverse_kl", ""].value == pytest.approx(math.log(15 + 5))


def test_contexts_that_were_never_counted_are_said(tmp_path: Path) -> None:
    found = readings("ngram", random_model(5), rows_of_lists([[4, 4, 4, 4]]), training_rows=_file(tmp_path))
    assert found["bigram_unseen", ""].value == found["trigram_unseen", ""].value == 1
    assert found["trigram_kl", ""].reason == "no context of these rows was counted"
    assert found["unigram_unseen", ""].value == 0
    assert found["unigram_loss", ""].reason == "no next token of these rows was counted after its context"


def test_rows_too_short_for_a_context_and_nan(tmp_path: Path) -> None:
    short = readings("ngram", random_model(5), rows_of_lists([[1, 2]]), training_rows=_file(tmp_path))
    assert short["trigram_kl", ""].value is None
    assert short["bigram_kl", ""].value is not None
    broken = Known(lambda tokens_BT: torch.full((*tokens_BT.shape, 5), math.nan), 5)
    found = readings("ngram", broken, rows_of_lists(TRAINING), training_rows=_file(tmp_path))
    for name in ("unigram_kl", "unigram_js", "unigram_reverse_kl", "bigram_kl", "bigram_js", "trigram_cross_entropy"):
        assert found[name, ""].value is None, name
        assert "not a number" in found[name, ""].reason


def test_ids_that_the_model_does_not_have_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(PicoError, match="token ids up to 3; the vocabulary of the model has 3"):
        readings("ngram", random_model(3), rows_of_lists([[0, 1, 2]]), training_rows=_file(tmp_path))


def test_without_training_rows_it_says_what_to_state(measure: Measure, rows: dict[str, str]) -> None:
    entries = ({"probe_name": "ngram"}, {"probe_name": "ngram", "until": "step", "training_rows": rows["corpus_train"]})
    found = measure(*entries, {"probe_name": "calibration"}, steps=[0], observe={"rows": rows["val"], "max_rows": 2})
    first, second = found.loc[found["metric"] == "ngram", "reason"]
    assert "state a file of its training rows (training_rows: FILE.npy)" in first
    assert "leave out until: step" in second
    assert value(found, "calibration.accuracy") >= 0


def _numbers(found: pd.DataFrame, step: int) -> dict[str, float]:
    chosen = found[(found["step"] == step) & found["metric"].str.startswith("ngram.")]
    return dict(zip(chosen["metric"], chosen["value"]))


@pytest.mark.parametrize(("step", "last"), [(2, 2), (6, 6)])
def test_up_to_a_step_counts_the_rows_of_the_batches_before_it(
    measure: Measure, runs: dict[str, Path], tmp_path: Path, step: int, last: int
) -> None:
    run = Run.open(runs["narrow"])
    seen = SeenRows(run)
    same = str(tmp_path / "seen.npy")
    np.save(same, seen.tokens(seen.before(last)).numpy())
    options = {"steps": [step], "runs": (str(run.path),)}
    own = _numbers(measure({"probe_name": "ngram", "until": "step"}, **options), step)
    stated = _numbers(measure({"probe_name": "ngram", "training_rows": same}, **options), step)
    assert own == pytest.approx(stated, rel=1e-12)
    everything = _numbers(measure({"probe_name": "ngram"}, **options), step)
    assert (everything == pytest.approx(own)) is (step == 6)  # all that the run reads


def test_step_0_has_counted_nothing(measure: Measure, runs: dict[str, Path]) -> None:
    found = measure({"probe_name": "ngram", "until": "step"}, steps=[0], runs=(str(runs["narrow"]),))
    for name in NAMES.values():
        assert value(found, f"ngram.{name}_unseen", 0) == 1
        row = found[found["metric"] == f"ngram.{name}_kl"].iloc[0]
        assert np.isnan(row["value"])
        assert row["reason"] == "no context of these rows was counted"


def test_rows_that_were_read_twice_count_twice(tmp_path: Path) -> None:
    from picolm.probes.counts import ALL, Corpus, count

    class Twice(SeenRows):
        def __init__(self) -> None:
            self.identity, self.steps = "twice", 3

        def before(self, step: int) -> np.ndarray:
            return np.array([0, 1, 0, 2, 1, 0][: 2 * step])

        def tokens(self, numbers: object) -> Tensor:
            return torch.tensor(TRAINING)[torch.as_tensor(numbers)]

    counted = count(Corpus("twice", 3, Twice()), 1, 5, ALL)
    repeated = [TRAINING[row] for row in (0, 1, 0, 2, 1, 0)]
    assert dict(zip(counted.tokens_N.tolist(), counted.counts_N.tolist())) == dict(_followers(1, repeated)[()])
