"""The landscape of a loss: its derivatives are those of autograd by another route, whatever is kept between products."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.readers.conftest import make
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from picolm.errors import PicoError
from picolm.models.attention import twice_differentiable
from picolm.observe import surface as module
from picolm.observe.rows import Rows
from picolm.observe.subject import Subject
from picolm.observe.surface import Surface
from picolm.observe.training import rows_of_tokens
from picolm.store import Run

FAMILIES = ("own", "llama", "gpt_neox", "gpt2")  # with tied embeddings and transposed weights
Made = Callable[[str], Subject]


@pytest.fixture
def subject(save: Callable[..., Path], make_run: Any) -> Made:
    def of(family: str) -> Subject:
        if family == "own":
            shape = {"d_model": 8, "n_layers": 1, "attention_n_heads": 2, "attention_n_kv_heads": 1, "vocab_size": 320}
            return Subject(make_run(**shape, activation_hidden_dim=8))
        return Subject(Run.open(save(make(family), "step7")))

    return of


def tokens(count: int = 4, length: int = 7, seed: int = 0) -> Tensor:
    return torch.randint(0, 60, (count, length), generator=torch.Generator().manual_seed(seed))


def directions(surface: Surface, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, len(surface.start_D), generator=generator, dtype=torch.float64)


def plain_loss(surface: Surface, place_D: Tensor, tokens_BS: Tensor) -> Tensor:
    """The mean loss as a function of one vector, through plain logits."""
    names = [name for name, _ in surface.model.named_parameters()]
    parts = [part.view(parameter.shape) for (_, part), parameter in zip(surface.parts(place_D), surface.parameters)]
    logits = functional_call(surface.model, dict(zip(names, parts)), (tokens_BS[:, :-1],))
    return cross_entropy(logits.flatten(0, 1), tokens_BS[:, 1:].flatten())


@pytest.mark.parametrize("family", FAMILIES)
def test_derivatives_are_those_of_autograd_by_another_route(subject: Made, family: str) -> None:
    tokens_BS = tokens()
    surface = Surface(subject(family), rows_of_tokens(tokens_BS), batch_size=3)
    loss = lambda place_D: plain_loss(surface, place_D, tokens_BS)  # noqa: E731
    vector_D = directions(surface, 1)[0]
    with twice_differentiable():
        value, slope_D = torch.autograd.functional.vjp(loss, surface.start_D)
        _, product_D = torch.autograd.functional.vhp(loss, surface.start_D, vector_D)
    assert surface.loss() == pytest.approx(float(value), rel=1e-6)  # of transformers, plain norms are in float32
    torch.testing.assert_close(surface.gradient(), slope_D, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(surface.hessian_product(vector_D), product_D, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_hessian_is_symmetric_to_the_last_digits(subject: Made, family: str) -> None:
    surface = Surface(subject(family), rows_of_tokens(tokens()))
    one, other = directions(surface, 2)
    left, right = one @ surface.hessian_product(other), other @ surface.hessian_product(one)
    assert float(left) == pytest.approx(float(right), rel=1e-11)


@pytest.mark.parametrize("family", FAMILIES)
def test_products_are_differences_of_gradients(subject: Made, family: str) -> None:
    surface, size = Surface(subject(family), rows_of_tokens(tokens())), 1e-5
    vector_D = torch.nn.functional.normalize(directions(surface, 1)[0], dim=0)
    product_D = surface.hessian_product(vector_D)
    slopes = []
    for sign in (1, -1):
        surface.move(surface.start_D + sign * size * vector_D)
        slopes.append(surface.gradient())
    torch.testing.assert_close((slopes[0] - slopes[1]) / (2 * size), product_D, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("room", [0, 10_000, 2**30])
def test_what_is_kept_changes_no_product(subject: Made, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    surface = Surface(subject("own"), rows_of_tokens(tokens()), batch_size=1)
    vectors = directions(surface, 3)
    expected = [surface.hessian_product(vector_D) for vector_D in vectors]
    monkeypatch.setattr(module, "KEPT_BYTES", room)
    again = Surface(subject("own"), rows_of_tokens(tokens()), batch_size=1)
    assert all(torch.equal(again.hessian_product(v), known) for v, known in zip(vectors, expected))
    torch.testing.assert_close(again.hessian_product(vectors), torch.stack(expected), rtol=1e-10, atol=1e-12)
    again.move(again.start_D * 1.1)
    surface.move(surface.start_D * 1.1)
    moved = again.hessian_product(vectors[0])
    assert not torch.allclose(moved, expected[0])
    assert torch.equal(moved, surface.hessian_product(vectors[0]))


def test_rows_may_repeat_and_differ_in_length(subject: Made) -> None:
    surface = Surface(subject("llama"), rows_of_tokens(tokens()))
    losses = [surface.loss([row]) for row in range(4)]
    assert surface.loss([2, 0, 2]) == pytest.approx((2 * losses[2] + losses[0]) / 3)
    torch.testing.assert_close(surface.gradient([1, 1]), surface.gradient([1]))
    several = Rows([tokens()[0], tokens()[1, :3]], [[0], [0]], "observed", True, "of a test")
    mixed = Surface(subject("llama"), several)
    short = mixed.loss([1])
    assert mixed.loss() == pytest.approx((6 * losses[0] + 2 * short) / 8)  # each predicted token counts once


def test_a_move_copies_and_returns(subject: Made) -> None:
    surface = Surface(subject("own"), rows_of_tokens(tokens()))
    loss, place_D = surface.loss(), surface.start_D.clone()
    surface.move(place_D)
    place_D.zero_()
    assert surface.loss() == loss
    surface.move(place_D)
    assert surface.loss() == pytest.approx(float(torch.tensor(320.0).log()))  # all logits are 0
    surface.move(surface.start_D)
    assert surface.loss() == loss


def test_no_landscape_without_a_loss(subject: Made) -> None:
    own = subject("own")
    with pytest.raises(PicoError, match="prompts have no tokens to predict"):
        Surface(own, replace(rows_of_tokens(tokens()), has_targets=False))
    with pytest.raises(PicoError, match="token id 999"):
        Surface(own, rows_of_tokens(torch.tensor([[1, 999]])))
    surface = Surface(own, rows_of_tokens(tokens()))
    surface.move(surface.start_D * float("nan"))
    with pytest.raises(PicoError, match=r"the loss of step 7 of fox is nan"):
        surface.finite_loss()
