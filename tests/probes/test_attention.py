"""Attention of heads against reference values, closed forms of simple patterns, and a second route."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.probes.conftest import REFERENCE, Measure, by_head, expected
from torch import Tensor

from picolm.observe.passes import Pass
from picolm.observe.rows import Rows, digest_of
from picolm.observe.subject import Subject
from picolm.probes.attention import GIVES, _read
from picolm.probes.probe import Reading, Running, find_probe, run
from picolm.store import Run

KEYS = {
    "entropy": "attention_entropy_nats",
    "relative_entropy": "attention_entropy_over_log_i_plus_1",
    "first_token_mass": "attention_bos_mass",
    "previous_token_mass": "attention_previous",
}
CHECKPOINTS = [("llama_s0", 0), ("llama_s0", 300), ("llama_s0", 500), ("neox_s0", 0), ("neox_s0", 500)]


def scores(pattern_TT: Tensor) -> dict[str, float]:
    """Return the scores of one pattern."""
    size = len(pattern_TT)
    found = _read(Pass(torch.zeros(1, size), torch.zeros(1, size, 2), (), [pattern_TT[None, None]]))["0"]
    assert found.shape == (1, 1, len(GIVES))
    return dict(zip(GIVES, found[0, 0].tolist()))


def random_pattern(size: int, seed: int = 0) -> Tensor:
    weights_TT = torch.rand(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).tril()
    return weights_TT / weights_TT.sum(-1, keepdim=True)


@pytest.mark.parametrize(("series", "step"), CHECKPOINTS)
def test_attention_is_that_of_independent_code(measure: Measure, rows: dict[str, str], series: str, step: int) -> None:
    found = measure({"probe_name": "attention"}, runs=(series,), steps=[step], observe={"rows": rows["val"]})
    for name, key in KEYS.items():
        measured = by_head(found, f"attention.{name}", step)
        np.testing.assert_allclose(measured, expected(series, step)[key], rtol=0, atol=2e-6)
    assert (found["standard_error"] > 0).all()
    assert set(found["reason"]) == {""}


def test_the_second_route_is_plain_transformers(measure: Measure, rows: dict[str, str]) -> None:
    """The distance, of which there is no reference, as a double sum; chance levels as means of the queries."""
    from transformers import AutoModelForCausalLM

    found = measure({"probe_name": "attention"}, runs=("neox_s0",), steps=[500], observe={"rows": rows["val"]})
    model = AutoModelForCausalLM.from_pretrained(
        REFERENCE / "checkpoints/neox_s0/step_500", attn_implementation="eager"
    )
    with torch.no_grad():
        patterns = model(torch.as_tensor(np.load(rows["val"])), output_attentions=True).attentions
    query_T = torch.arange(64.0, dtype=torch.float64)
    back_TT = query_T[:, None] - query_T
    of_rows = [(of_layer.double() * back_TT)[:, :, 1:].sum(-1).mean(-1) for of_layer in patterns]
    np.testing.assert_allclose(
        by_head(found, "attention.distance", 500), torch.stack(of_rows).mean(1).numpy(), rtol=0, atol=2e-5
    )
    errors = found[found["metric"] == "attention.distance"].sort_values(["layer", "head"])["standard_error"]
    np.testing.assert_allclose(errors, torch.stack(of_rows).std(1).flatten() / 8, rtol=1e-5)
    chances = found.drop_duplicates("metric").set_index("metric")["chance"]
    assert chances["attention.distance"] == pytest.approx(float(query_T[1:].mean()) / 2)
    assert chances["attention.entropy"] == pytest.approx(float((query_T[1:] + 1).log().mean()))
    assert chances["attention.relative_entropy"] == pytest.approx(1)
    assert chances["attention.first_token_mass"] == pytest.approx(float((1 / (query_T[1:] + 1)).mean()))


@pytest.mark.parametrize("size", [2, 3, 65])
def test_simple_patterns_have_closed_forms(size: int) -> None:
    mean_of_queries = (size - 1 + 1) / 2
    itself = scores(torch.eye(size))
    assert itself == dict.fromkeys(GIVES, 0.0)
    first = scores(torch.eye(size)[:1].repeat(size, 1))
    assert first["first_token_mass"] == 1
    assert first["distance"] == pytest.approx(mean_of_queries)
    assert first["entropy"] == 0
    previous = scores(torch.eye(size).roll(-1, 1).tril(-1) + torch.eye(size)[:1].T @ torch.eye(size)[:1])
    assert previous["previous_token_mass"] == previous["distance"] == 1
    assert previous["first_token_mass"] == pytest.approx(1 / (size - 1))
    uniform = scores(torch.ones(size, size).tril() / torch.arange(1, size + 1)[:, None])
    assert uniform["entropy"] == pytest.approx(math.lgamma(size + 1) / (size - 1), rel=1e-6)  # ln T! = sum of ln(i + 1)
    assert uniform["relative_entropy"] == pytest.approx(1)
    assert uniform["distance"] == pytest.approx(mean_of_queries / 2)


def test_a_mixture_of_patterns_mixes_what_is_linear_and_gains_entropy() -> None:
    patterns = [random_pattern(20, seed) for seed in (1, 2)]
    apart, mixed = [scores(each) for each in patterns], scores(0.25 * patterns[0] + 0.75 * patterns[1])
    for name in ("first_token_mass", "previous_token_mass", "distance"):
        assert mixed[name] == pytest.approx(0.25 * apart[0][name] + 0.75 * apart[1][name])
    assert mixed["entropy"] > 0.25 * apart[0]["entropy"] + 0.75 * apart[1]["entropy"]
    assert all(0 < each["relative_entropy"] < 1 for each in apart)


def readings(subject: Subject, tokens: Sequence[Tensor]) -> dict[tuple[str, int | None, int | None], Reading]:
    """Ask a subject on prompts."""
    rows = Rows(list(tokens), [[0]] * len(tokens), "made", False, digest_of(*(each.tolist() for each in tokens)))
    running = Running(find_probe("attention"), {"subject": subject, "rows": rows}, {})
    run([running], subject)
    assert running.failure is None
    return {(each.name, each.layer, each.head): each for each in running.readings}


@pytest.fixture
def subject() -> Subject:
    return Subject(Run.open(REFERENCE / "checkpoints/llama_s0"))


def test_rows_of_several_lengths_count_by_their_queries(subject: Subject) -> None:
    """The mean over all queries of rows of 1, 3 and 40 tokens; the row of one token has none."""
    tokens = torch.randint(1, 512, (40,), generator=torch.Generator().manual_seed(0))
    one, many = readings(subject, [tokens[:3]]), readings(subject, [tokens])
    together = readings(subject, [tokens[:1], tokens[:3], tokens])
    assert len(together) == len(GIVES) * 8
    for place, reading in together.items():
        for of in ("value", "chance"):
            parts = [getattr(each[place], of) for each in (one, many)]
            assert getattr(reading, of) == pytest.approx((2 * parts[0] + 39 * parts[1]) / 41, rel=1e-5)
        assert reading.standard_error is not None
        assert one[place].standard_error is None
    assert {each.reason for each in readings(subject, [tokens[:1]]).values()} == {"no row has a second position"}


def test_weights_that_are_nan_give_no_values(subject: Subject) -> None:
    with torch.no_grad():
        next(subject.model.parameters()).fill_(math.nan)
    found = readings(subject, [torch.arange(9)])
    assert {(each.value, each.reason) for each in found.values()} == {(None, "it is not a number here")}


def test_rows_are_read_whole_where_the_context_allows_it(
    measure: Measure, rows: dict[str, str], tmp_path: Path
) -> None:
    whole = np.concatenate([np.load(rows["val"])] * 3, 1)
    for width, read in ((127, 127), (128, 128), (129, 128)):
        np.save(tmp_path / "rows.npy", whole[:2, :width])
        found = measure({"probe_name": "attention"}, steps=[0], observe={"rows": str(tmp_path / "rows.npy")})
        chance = found[found["metric"] == "attention.distance"]["chance"].iloc[0]
        assert chance == pytest.approx(read / 4)  # the mean of i / 2


def test_it_shares_its_passes_with_probes_that_only_predict_the_last_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked together, each finds what it finds alone, and the model runs once on each batch."""
    draw = np.random.default_rng(0)
    tokens = [torch.as_tensor(draw.integers(0, 60, 33)) for _ in range(5)]
    asked = Rows(tokens, [[31]] * 5, "made", True, digest_of([each.tolist() for each in tokens]))
    subject = Subject(Run.open(REFERENCE / "checkpoints" / "llama_s0"))
    ran: list[tuple[int, int]] = []
    forward = Subject.forward

    def counted(self: Subject, rows: Rows, batch: Sequence[int], needs: frozenset[str] = frozenset()) -> Pass:
        ran.append((len(batch), rows.inputs(batch[0])))
        return forward(self, rows, batch, needs)

    monkeypatch.setattr(Subject, "forward", counted)
    names = ("calibration", "attention", "dormant", "logit_lens", "in_context")
    options = {"in_context": {"early": 2, "late": 20}}

    def running(name: str) -> Running:
        return Running(find_probe(name), {"subject": subject, "rows": asked, "stated": None}, options.get(name, {}))

    together = [running(name) for name in names]
    run(together, subject, batch_size=3)
    assert ran == [(3, 33), (2, 33)]
    for name, each in zip(names, together):
        alone = running(name)
        run([alone], subject, batch_size=3)
        assert each.failure is None
        assert any(reading.value is not None for reading in each.readings)
        for one, other in zip(each.readings, alone.readings, strict=True):
            assert (one.name, one.layer, one.head, one.bin) == (other.name, other.layer, other.head, other.bin)
            assert one.reason == other.reason
            assert other.value is None or one.value == pytest.approx(other.value, rel=1e-4, abs=1e-5), (name, one)
