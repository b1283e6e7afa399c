"""The chunked loss is cross-entropy, in value and gradient, whatever is asked of it."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from picolm.models import loss as module
from picolm.models.loss import linear_cross_entropy, linear_token_nats


@pytest.fixture(params=[1, 7, 1000], ids=["one position a chunk", "a ragged last chunk", "one chunk"])
def chunked(request, monkeypatch):
    monkeypatch.setitem(module.CHUNK_LOGITS, "cpu", request.param * 50)
    monkeypatch.setattr(module, "LEAST_ROWS", 1)
    monkeypatch.setitem(module.TILE, "cpu", 100)  # two positions, six rows of the weight


def problem(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 16, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(50, 16, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, 50, (23,), generator=generator)


def exact(hidden, weight, targets):
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    nats = cross_entropy(hidden @ weight.T, targets, reduction="sum")
    return nats.detach(), *torch.autograd.grad(nats, (hidden, weight))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("scale", [1.0, 1 / 23])
@pytest.mark.usefixtures("chunked")
def test_value_and_gradients_are_those_of_plain_cross_entropy_in_float64(dtype, tolerance, scale):
    hidden, weight, targets = problem(dtype)
    nats = linear_cross_entropy(hidden, weight, targets)
    gradients = torch.autograd.grad(nats * scale, (hidden, weight))
    expected = exact(hidden, weight, targets)
    torch.testing.assert_close(nats.double(), expected[0], rtol=tolerance, atol=0)
    for ours, theirs in zip(gradients, expected[1:]):
        torch.testing.assert_close(ours.double(), theirs * scale, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("chunked")
def test_the_terms_sum_to_the_loss():
    hidden, weight, targets = problem()
    terms = linear_token_nats(hidden, weight, targets)
    assert not terms.requires_grad
    torch.testing.assert_close(terms, cross_entropy(hidden @ weight.T, targets, reduction="none").detach())
    torch.testing.assert_close(terms.sum(), linear_cross_entropy(hidden, weight, targets).detach())


@pytest.mark.usefixtures("chunked")
def test_in_bfloat16_the_loss_is_float32_the_gradients_have_the_dtypes_of_their_tensors_and_err_by_its_rounding():
    hidden, weight, targets = problem()
    rounded = hidden.detach().bfloat16().requires_grad_()
    nats = linear_cross_entropy(rounded, weight, targets)
    assert nats.dtype == linear_token_nats(rounded, weight, targets).dtype == torch.float32
    value, *expected = exact(hidden, weight, targets)
    torch.testing.assert_close(nats.double(), value, rtol=3e-3, atol=0)
    gradients = torch.autograd.grad(nats / 3, (rounded, weight))
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16, torch.float32]
    for ours, theirs in zip(gradients, expected):
        assert (ours - theirs / 3).norm() < 0.01 * theirs.norm() / 3


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_what_needs_no_gradient_gets_none(frozen):
    hidden, weight, targets = problem()
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        tensor.requires_grad_(frozen not in (name, "both"))
    nats = linear_cross_entropy(hidden, weight, targets)
    learning = [x for x in (hidden, weight) if x.requires_grad]
    assert nats.requires_grad == bool(learning)
    if learning:
        (gradient,) = torch.autograd.grad(nats, learning)
        index = 1 if frozen == "weight" else 2
        torch.testing.assert_close(gradient.double(), exact(hidden, weight, targets)[index], rtol=1e-4, atol=1e-5)


def test_without_grad_mode_no_gradient_is_computed(monkeypatch):
    hidden, weight, targets = problem()
    monkeypatch.setattr(torch.Tensor, "exp2_", None)  # the first thing the gradient needs
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, targets) > 0


def test_backward_twice_gives_the_same_gradient():
    hidden, weight, targets = problem()
    nats = linear_cross_entropy(hidden, weight, targets)
    first = torch.autograd.grad(nats, weight, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(nats, weight)[0])


def test_equal_logits_cost_ln_v():
    hidden, weight, targets = problem()
    torch.testing.assert_close(linear_token_nats(hidden, weight * 0, targets), torch.full((23,), math.log(50)))


@pytest.mark.usefixtures("chunked")
def test_shares_are_factors_of_the_terms_and_of_their_gradients():
    hidden, weight, targets = problem()
    shares = torch.linspace(0, 3, len(targets))
    nats = linear_cross_entropy(hidden, weight, targets, shares)
    terms = -(hidden.double() @ weight.double().mT).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    expected = (terms * shares.double()).sum()
    torch.testing.assert_close(nats.double(), expected, rtol=1e-5, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(nats, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight))
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets, shares), nats)


def test_no_positions_cost_nothing_and_have_no_gradient():
    hidden, weight, targets = problem()
    nats = linear_cross_entropy(hidden[:0], weight, targets[:0], torch.zeros(0))
    assert nats == 0
    assert torch.autograd.grad(nats, weight)[0].count_nonzero() == 0


def test_huge_logits_stay_finite():
    hidden, weight, targets = problem()
    nats = linear_cross_entropy(hidden * 1e4, weight, targets)
    assert nats.isfinite()
    assert torch.autograd.grad(nats, hidden)[0].isfinite().all()


@pytest.mark.usefixtures("chunked")
def test_targets_too_improbable_for_a_float32_probability_still_cost_what_they_cost():
    hidden, weight, targets = problem()
    nats = linear_cross_entropy(hidden * 30, weight, targets)
    terms = cross_entropy((hidden.double() * 30) @ weight.double().T, targets, reduction="none")
    assert terms.min() < module.MOST_NATS < 150 < terms.max()
    torch.testing.assert_close(nats.double(), terms.sum(), rtol=1e-6, atol=0)
