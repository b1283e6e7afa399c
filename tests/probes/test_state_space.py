"""What is read of the states of a state space model, against closed forms; and what a model without states is told."""

import math
from types import SimpleNamespace

import pytest
import torch

from picolm.errors import PicoError
from picolm.models.statespace import Mixing
from picolm.observe.rows import Rows
from picolm.observe.subject import Subject
from picolm.probes.attention import attention
from picolm.probes.probe import Reading
from picolm.probes.state_space import GIVES, _finished, _read, state_space
from picolm.store import Run


def scores(matrix_TT: torch.Tensor, decay_T: torch.Tensor, state_PN: torch.Tensor) -> dict[str, float]:
    mixing = Mixing(matrix_TT[None, None], decay_T[None, :, None], state_PN[None, None])
    found = _read(SimpleNamespace(mixing=[mixing]))["0"]  # type: ignore[arg-type]
    assert found.shape == (1, 1, len(GIVES))
    return dict(zip(GIVES, found[0, 0].tolist()))


def test_a_head_that_reads_the_position_before_and_takes_it_away() -> None:
    matrix = -torch.diag(torch.ones(5), -1)
    found = scores(matrix, torch.full((6,), math.log(2) / 3), torch.eye(4))
    assert found["distance"] == pytest.approx(1)
    assert (found["own_share"], found["previous_share"], found["negative_share"]) == (0, 1, 1)
    assert found["first_share"] == pytest.approx(1 / 5)
    assert _finished(Reading("half_life", found["half_life"], 0, 0)).value == pytest.approx(3)
    assert found["state_norm"] == pytest.approx(2)
    assert found["state_rank"] == pytest.approx(4)


def test_shares_do_not_change_with_the_size_of_the_entries() -> None:
    torch.manual_seed(0)
    matrix, state = torch.randn(9, 9).tril(), torch.randn(3, 5)
    decay = torch.rand(9)
    a, b = scores(matrix, decay, state), scores(-7 * matrix, decay, 7 * state)
    for name in ("distance", "own_share", "previous_share", "first_share", "state_rank"):
        assert a[name] == pytest.approx(b[name])
    assert a["negative_share"] + b["negative_share"] == pytest.approx(1)
    assert b["state_norm"] == pytest.approx(7 * a["state_norm"])
    assert 1 <= a["state_rank"] <= 3


def test_what_is_not_finite_has_a_reason() -> None:
    assert "not finite" in _finished(Reading("distance", math.nan, 0, 0)).reason
    assert _finished(Reading("half_life", 0.0, 0, 0)).reason == "the state does not decay"
    found = _finished(Reading("half_life", 0.1, 1, 2, standard_error=0.01))
    assert found.standard_error == pytest.approx(math.log(2) / 0.1**2 * 0.01)


def test_a_model_is_asked_and_one_without_states_is_refused(fox: Run, state_space_run: Run) -> None:
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(0, 61, (12,), generator=generator) for _ in range(3)]
    rows = Rows(tokens, [[0]] * 3, "val", True, "three rows")
    subject = Subject(state_space_run)
    found = state_space(subject, rows)
    heads = {(layer, head) for layer in range(2) for head in range(6)}
    assert {(reading.layer, reading.head) for reading in found} == heads
    assert all(reading.value is not None and reading.standard_error is not None for reading in found)
    _, mixed = subject.model.with_mixing(torch.stack(tokens)[:, :-1])
    expected = math.log(2) / mixed[1].decay_BTH[:, :, 3].double().mean().item()
    half_life = next(r.value for r in found if (r.name, r.layer, r.head) == ("half_life", 1, 3))
    assert half_life == pytest.approx(expected, rel=1e-6)
    with pytest.raises(PicoError, match="does not give the weights of an attention"):
        attention(subject, rows)
    with pytest.raises(PicoError, match="has no states that decay: it is no state space model"):
        state_space(Subject(fox), rows)
