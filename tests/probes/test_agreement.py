"""Agreement: a model agrees with itself, distances are those of a plain formula, and ids have to mean the same."""

import math

import numpy as np
import pytest
import torch
from tests.probes.conftest import Measure, value
from tests.probes.known import Known, random_model, readings, rows_of_lists

from picolm.errors import PicoError

ROWS = rows_of_lists([[0, 3, 1, 4, 2, 2], [4, 4, 0, 1], [1, 2]])


def _numbers(a: Known, b: Known) -> dict[str, float]:
    return {name: reading.value for (name, _), reading in readings("agreement", a, ROWS, b).items()}  # type: ignore[misc]


@pytest.mark.slow
@pytest.mark.parametrize("series", ["llama_s0", "neox_s0"])
def test_a_checkpoint_agrees_with_itself(measure: Measure, rows: dict[str, str], series: str) -> None:
    found = measure(
        {"probe_name": "agreement", "target": {"checkpoint": "last"}},
        {"probe_name": "agreement", "target": {"checkpoint": "first"}},
        runs=(series,),
        steps=[0, 500],
        observe={"rows": rows["val"], "max_rows": 8},
    )
    for name, same in (("kl", 0.0), ("reverse_kl", 0.0), ("js", 0.0), ("top1_agreement", 1.0)):
        for step in (0, 500):
            assert value(found, f"agreement.{name}", step, against_step=step) == pytest.approx(same, abs=1e-7)
    there = {name: value(found, f"agreement.{name}", 0, against_step=500) for name in ("kl", "reverse_kl", "js")}
    back = {name: value(found, f"agreement.{name}", 500, against_step=0) for name in ("kl", "reverse_kl", "js")}
    assert there == pytest.approx({"kl": back["reverse_kl"], "reverse_kl": back["kl"], "js": back["js"]})
    assert 0.1 < there["js"] < math.log(2)


def test_the_divergences_are_those_of_a_plain_formula() -> None:
    models = random_model(5, 1), random_model(5, 2)
    found = _numbers(*models)
    values: dict[str, list[float]] = {name: [] for name in found}
    for row in range(len(ROWS.tokens)):
        p_PV, q_PV = (model.forward(ROWS, [row]).log_probs_BPV[0].exp().numpy() for model in models)
        for p, q in zip(p_PV, q_PV):
            m = (p + q) / 2
            values["kl"].append(float((p * np.log(p / q)).sum()))
            values["reverse_kl"].append(float((q * np.log(q / p)).sum()))
            values["js"].append(float((p * np.log(p / m) + q * np.log(q / m)).sum() / 2))
            values["top1_agreement"].append(float(p.argmax() == q.argmax()))
    assert found == pytest.approx({name: float(np.mean(numbers)) for name, numbers in values.items()})


def _always(token: int, vocabulary: int = 5) -> Known:
    """A model that is certain of one token, and gives all others no probability at all."""
    logits_V = torch.full((vocabulary,), -math.inf)
    logits_V[token] = 0.0
    return Known(lambda tokens_BT: logits_V.expand(*tokens_BT.shape, vocabulary), vocabulary)


def test_the_ends_of_the_scales_are_reached_and_no_farther() -> None:
    assert _numbers(_always(1), _always(1)) == {"kl": 0, "reverse_kl": 0, "js": 0, "top1_agreement": 1}
    apart = _numbers(_always(1), _always(2))
    assert apart["js"] == pytest.approx(math.log(2))
    assert apart["kl"] == apart["reverse_kl"] == math.inf
    assert apart["top1_agreement"] == 0


def test_ids_of_other_vocabularies_and_tokenizers_are_not_compared() -> None:
    with pytest.raises(PicoError, match="over 5 and 6 tokens"):
        _numbers(random_model(5), random_model(6))
    first, second, without = (random_model(5, tokenizer=content) for content in (b"{}", b"[]", None))
    with pytest.raises(PicoError, match="different tokenizers"):
        _numbers(first, second)
    assert _numbers(first, without)["kl"] == pytest.approx(0)  # of one of them it is not known


def test_nan_is_no_agreement() -> None:
    broken = Known(lambda tokens_BT: torch.full((*tokens_BT.shape, 5), math.nan), 5)
    assert set(_numbers(broken, broken).values()) == {None}
