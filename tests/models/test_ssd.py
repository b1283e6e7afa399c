"""The forms of the state space recurrence agree, whatever the shapes and however fast a state decays."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from picolm.models import ssd
from picolm.models.attention import twice_differentiable
from picolm.models.convolution import Convolution

Inputs = list[Tensor]
NAMES = ("y", "state", "x", "dt", "A", "B", "C", "first")


def inputs(rows=2, length=50, groups=1, heads=4, size=3, state=5, dtype=torch.float64, step=0.3, seed=0) -> Inputs:
    """x, dt, A, B, C, and the state before the first position."""
    torch.manual_seed(seed)
    found = [
        torch.randn(rows, length, heads, size, dtype=dtype),
        step * torch.rand(rows, length, heads, dtype=dtype),
        -4 * torch.rand(heads, dtype=dtype),
        torch.randn(rows, length, groups, state, dtype=dtype),
        torch.randn(rows, length, groups, state, dtype=dtype),
        torch.randn(rows, heads, size, state, dtype=dtype),
    ]
    return [each.requires_grad_() for each in found]


def with_gradients(form, given: Inputs) -> list[Tensor]:
    """What a form returns, and the gradients of fixed weights of it."""
    found = form(*given)
    weights = [torch.cos(torch.arange(each.numel()).double()).view_as(each).to(each.dtype) for each in found]
    return [*found, *torch.autograd.grad(found, given, weights)]


def check(ours: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for name, a, b in zip(NAMES, ours, expected, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-30), name


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 3),
    length=st.integers(1, 70),
    groups=st.integers(1, 3),
    per_group=st.integers(1, 3),
    size=st.integers(1, 4),
    state=st.integers(1, 5),
    chunk=st.integers(1, 80),
    step=st.sampled_from([1e-9, 0.05, 0.5]),
)
def test_all_forms_and_their_gradients_agree(rows, length, groups, per_group, size, state, chunk, step):
    given_ = inputs(rows, length, groups, groups * per_group, size, state, step=step)
    expected = with_gradients(ssd.recurrence, given_)
    check(with_gradients(lambda *a: ssd.plain(*a, chunk=chunk), given_), expected, 1e-12)
    if 4 * step * chunk <= ssd.RANGE:
        check(with_gradients(lambda *a: ssd.chunked(*a, chunk=chunk), given_), expected, 1e-12)
    check(with_gradients(ssd.scan, given_), expected, 1e-12)


def test_the_mixing_matrix_is_what_the_recurrence_multiplies_by():
    x, dt, A, B, C, _ = inputs(groups=2)
    matrix_BHTT = ssd.mixing(dt, A, B, C)
    y, _ = ssd.recurrence(x, dt, A, B, C)
    torch.testing.assert_close(torch.einsum("bhts,bshp->bthp", matrix_BHTT, x), y, rtol=1e-12, atol=1e-12)
    assert matrix_BHTT.triu(1).count_nonzero() == 0
    assert (matrix_BHTT < 0).any()


def test_two_halves_are_the_whole():
    *given_, first = inputs(length=90)
    x, dt, A, B, C = given_
    whole, last = ssd.scan(*given_, first)
    a, between = ssd.scan(x[:, :37], dt[:, :37], A, B[:, :37], C[:, :37], first)
    b, end = ssd.scan(x[:, 37:], dt[:, 37:], A, B[:, 37:], C[:, 37:], between)
    torch.testing.assert_close(torch.cat((a, b), 1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(end, last, rtol=1e-12, atol=1e-12)


def test_a_constant_input_to_one_channel_sums_to_a_geometric_series():
    decay, length = 0.9, 200
    ones = torch.ones(1, length, 1, 1, dtype=torch.float64)
    dt = torch.ones(1, length, 1, dtype=torch.float64)
    A = torch.tensor([decay], dtype=torch.float64).log()
    y, _ = ssd.scan(ones, dt, A, ones, ones)
    t = torch.arange(1, length + 1, dtype=torch.float64)
    torch.testing.assert_close(y.flatten(), (1 - decay**t) / (1 - decay), rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("decay", "chunk"), [(0.5, 64), (1.8, 64), (2.0, 32), (3.7, 32), (7.4, 16), (14.9, 8), (15.1, None), (1e30, None)]
)
def test_chunks_are_halved_until_none_decays_too_much(decay, chunk):
    a_BTH = torch.zeros(2, 256, 3)
    a_BTH[1, 64:128, 2] = -decay
    assert ssd.chunk_size(a_BTH) == chunk


def test_chunks_have_equal_lengths_and_a_nan_stays_one():
    assert [ssd.chunk_size(torch.zeros(1, length, 1)) for length in (2, 50, 64, 65, 130, 512)] == [
        2,
        50,
        64,
        33,
        44,
        64,
    ]
    x, dt, A, B, C, first = (each.detach() for each in inputs(length=9))
    dt[0, 4] = torch.nan
    y, last = ssd.scan(x, dt, A, B, C, first)
    assert y[0, 4:].isnan().all()
    assert last[0].isnan().all()
    assert not y[1].isnan().any()


@pytest.mark.parametrize("step", [1e-6, 0.1, 1.0, 3.0, 30.0, 1e4, 1e20])
def test_in_float32_no_decay_is_too_fast(step):
    """A is 4 at most: at a step of 0.4, chunks of 64 decay by 50; from 4 on, by more than any float32 can hold."""
    exact = inputs(length=150, step=step)
    x, dt, A, B, C, first = [each.detach().float().requires_grad_() for each in exact]
    ours = with_gradients(ssd.scan, [x, dt, A, B, C, first])
    assert all(each.isfinite().all() for each in ours)
    rounded = [each.detach().double().requires_grad_() for each in (x, dt, A, B, C, first)]
    expected = with_gradients(ssd.recurrence, rounded)
    for name, a, b in zip(NAMES, ours, expected):
        assert (a - b).norm() <= 2e-5 * b.norm() + 1e-30, name


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_small_and_large_gradients_keep_their_digits_at_the_end_of_the_range(scale):
    """Values are scaled by exp(±60) inside of a chunk."""
    exact = [each.detach().float() for each in inputs(length=64)]
    exact[1] = torch.full_like(exact[1], 119.0 / 64)
    exact[2] = torch.full_like(exact[2], -1.0)
    given_ = [each.requires_grad_() for each in exact]
    assert ssd.chunk_size(given_[1] * given_[2]) == 64
    y, _ = ssd.scan(*given_)
    weights = torch.randn(y.shape)
    ours = torch.autograd.grad(y, given_, weights * scale)
    wide = [each.detach().double().requires_grad_() for each in given_]
    expected = torch.autograd.grad(ssd.recurrence(*wide)[0], wide, weights.double())
    for a, b in zip(ours, expected):
        assert (a.double() / scale - b).norm() <= 1e-4 * b.norm()


def test_bfloat16_is_near_float32():
    x, dt, A, B, C, first = (each.detach().float() for each in inputs(length=128, size=16, state=16))
    given_ = [each.requires_grad_() for each in (x.bfloat16(), dt, A, B.bfloat16(), C.bfloat16(), first)]
    ours = with_gradients(ssd.scan, given_)
    wide = [each.detach().double().requires_grad_() for each in given_]
    for name, a, b in zip(NAMES, ours, with_gradients(ssd.recurrence, wide)):
        assert (a.double() - b).norm() <= 0.03 * b.norm(), name
    assert ours[0].dtype == torch.bfloat16
    assert ours[1].dtype == torch.float32


def test_second_derivatives_are_those_of_differences():
    given_ = inputs(rows=1, length=9, heads=2, size=2, state=2)
    with twice_differentiable():
        assert torch.autograd.gradgradcheck(ssd.scan, given_)
        assert torch.autograd.gradgradcheck(
            Convolution(3, 4).double(), [torch.randn(1, 6, 3).double().requires_grad_()]
        )


def test_first_derivatives_are_those_of_differences():
    given_ = inputs(rows=1, length=9, groups=2, heads=4, size=2, state=2)
    assert torch.autograd.gradcheck(lambda *a: ssd.chunked(*a, chunk=4), given_)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 4), st.integers(1, 6), st.integers(0, 8))
def test_the_convolution_is_that_of_torch(rows, length, channels, kernel, cut):
    torch.manual_seed(length)
    convolution = Convolution(channels, kernel).double()
    torch.nn.init.normal_(convolution.weight)
    torch.nn.init.normal_(convolution.bias)
    x = torch.randn(rows, length, channels, dtype=torch.float64, requires_grad=True)
    given_ = [x, *convolution.parameters()]
    with twice_differentiable():
        expected = convolution(x)
    gradients = torch.autograd.grad(expected, given_, torch.cos(expected.detach()))
    ours = convolution(x)
    for a, b in zip((ours, *torch.autograd.grad(ours, given_, torch.cos(ours.detach()))), (expected, *gradients)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    cut = min(cut, length - 1)
    early, late = x[:, :cut], x[:, cut:]
    if cut:
        continued = convolution(late, convolution.window(early))
        torch.testing.assert_close(continued, expected[:, cut:], rtol=1e-12, atol=1e-12)
        assert torch.equal(convolution.window(late, convolution.window(early)), convolution.window(x))


def test_a_convolution_in_pieces_is_that_of_the_whole(monkeypatch):
    torch.manual_seed(0)
    convolution, x = Convolution(5, 4), torch.randn(7, 9, 5)
    torch.nn.init.normal_(convolution.weight)

    def found():
        y = convolution(x)
        return [y, *torch.autograd.grad(y.square().sum(), list(convolution.parameters()))]

    whole = found()
    monkeypatch.setattr("picolm.models.convolution.PIECE", 100)
    torch.testing.assert_close(found(), whole)
