"""Theorems on attention: one definition, several routes."""

import math
from functools import partial

import pytest
import torch

from picolm.models import attention as routes


def problem(T: int, K: int, *, G: int = 3, D: int = 8, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(T + K)
    shapes = (2, 2, T, G, D), (2, 2, K, D), (2, 2, K, D)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def from_the_definition(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    T, K = q.shape[2], k.shape[2]
    scores = torch.einsum("bmtgd,bmkd->bmtgk", q, k)
    future = torch.arange(K)[None, :] > torch.arange(K - T, K)[:, None]
    weights = (scores * math.log(2)).masked_fill(future[:, None], -math.inf).softmax(-1)
    return torch.einsum("bmtgk,bmkd->bmtgd", weights, v)


def full_from_the_definition(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = torch.einsum("bmtgd,bmkd->bmtgk", q, k) * math.log(2)
    return torch.einsum("bmtgk,bmkd->bmtgd", scores.softmax(-1), v)


def with_gradients(function, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    out = function(*inputs)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out, *torch.autograd.grad((out * weights).sum(), inputs)]


@pytest.mark.parametrize("route", [routes.block_causal, routes.fused])
@pytest.mark.parametrize(("T", "K"), [(1, 1), (5, 5), (64, 64), (65, 65), (200, 200), (1, 90), (70, 150)])
def test_every_route_is_the_definition_forward_and_backward(route, T, K):
    inputs = problem(T, K, dtype=torch.float64)
    for ours, expected in zip(with_gradients(route, inputs), with_gradients(from_the_definition, inputs)):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("route", [routes.block_full, partial(routes.fused, causal=False), routes.attention])
@pytest.mark.parametrize(("T", "K"), [(1, 1), (5, 5), (64, 64), (200, 200), (70, 150)])
def test_every_route_to_both_sides_is_the_definition_forward_and_backward(route, T, K):
    inputs = problem(T, K, dtype=torch.float64)
    route = partial(route, causal=False) if route is routes.attention else route
    for ours, expected in zip(with_gradients(route, inputs), with_gradients(full_from_the_definition, inputs)):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


def test_weights_to_both_sides_sum_to_1_and_give_the_output():
    q, k, v = problem(20, 20, dtype=torch.float64)
    weights = routes.attention_weights(q, k, causal=False)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert (weights > 0).all()
    with routes.twice_differentiable():
        plain = routes.attention(q, k, v, causal=False)
    torch.testing.assert_close(plain, routes.block_full(q, k, v))


def errors(route, inputs: list[torch.Tensor]) -> torch.Tensor:
    """Relative errors of the output and the three gradients, against float64."""
    truth = with_gradients(from_the_definition, [x.detach().double().requires_grad_() for x in inputs])
    pairs = zip(with_gradients(route, inputs), truth)
    return torch.stack([((ours - exact).norm() / exact.norm()).detach() for ours, exact in pairs])


def scores_of_size(size: float, dtype: torch.dtype) -> list[torch.Tensor]:
    scaled = zip(problem(300, 300), (size, size, 1))
    return [(x.detach() * scale).to(dtype).requires_grad_() for x, scale in scaled]


@pytest.mark.parametrize("size", [0.3, 3.0, 30.0], ids=["small scores", "near the bound", "beyond any exponent"])
def test_in_float32_it_is_as_exact_as_the_fused_kernel_for_scores_of_every_size(size):
    inputs = scores_of_size(size, torch.float32)
    assert (errors(routes.block_causal, inputs) < 3 * errors(routes.fused, inputs) + 1e-7).all()


@pytest.mark.parametrize("size", [0.5, 1.0, 2.0, 4.0])
def test_in_bfloat16_it_errs_as_an_unfused_implementation_does(size):
    def unfused(q, k, v):
        future = torch.ones(300, 300, dtype=torch.bool).triu(1)[:, None]
        scores = torch.einsum("bmtgd,bmkd->bmtgk", q, k).float() * math.log(2)
        weights = scores.masked_fill(future, -math.inf).softmax(-1).to(q.dtype)
        return torch.einsum("bmtgk,bmkd->bmtgd", weights, v)

    inputs = scores_of_size(size, torch.bfloat16)
    found = errors(routes.block_causal, inputs)
    assert (found < 1.7 * errors(unfused, inputs)).all()
    assert size > 1 or (found < 0.01).all()


def test_probabilities_computed_again_give_the_same_bits(monkeypatch):
    inputs = problem(150, 150)
    kept = with_gradients(routes.block_causal, inputs)
    for room in (200_000, 0):  # the first of three blocks, none
        monkeypatch.setattr(routes, "KEEP_BYTES", room)
        assert all(torch.equal(a, b) for a, b in zip(kept, with_gradients(routes.block_causal, inputs)))


def test_padded_keys_are_seen_by_nobody_else():
    q, k, v = problem(6, 6)
    visible = torch.ones(6, 6, dtype=torch.bool).tril()
    visible[2:, :2] = False
    out = routes.attention(q, k, v, visible)
    alone = routes.attention(q[:, :, 2:], k[:, :, 2:], v[:, :, 2:])
    torch.testing.assert_close(out[:, :, 2:], alone)
    assert out.isfinite().all()
    added = torch.zeros(6, 6, dtype=torch.float64).masked_fill(~visible, -torch.inf)  # of another type than the queries
    torch.testing.assert_close(routes.attention(q, k, v, added), out)


@pytest.mark.parametrize(("length", "keys"), [(6, 6), (2, 9), (1, 4)])
def test_the_attention_weights_are_those_of_the_output(length: int, keys: int) -> None:
    q, k, v = problem(length, keys)
    heads = q.shape[1] * q.shape[3]
    weights = routes.attention_weights(q, k)
    assert weights.shape == (2, heads, length, keys)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, heads, length))
    out = torch.einsum("bmgtk,bmkd->bmtgd", weights.unflatten(1, (q.shape[1], -1)), v)
    torch.testing.assert_close(out, routes.attention(q, k, v))


def test_heads_of_a_group_share_their_keys_and_no_others():
    q, k, v = problem(10, 10)
    other = v.detach().clone()
    other[:, 1] += 1
    changed = (routes.attention(q, k, v) != routes.attention(q, k, other)).any(-1)
    assert not changed[:, 0].any()
    assert changed[:, 1].all()
