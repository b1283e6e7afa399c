"""A causal convolution of each channel with its own few weights, and SiLU: what stands before a state space layer.

On a CPU, sums of shifted inputs in pieces that fit the cache take half of the time of torch's conv1d, and the backward pass
makes them again rather than keep them. Elsewhere conv1d is used, which is differentiable twice.

Legend: B rows, T positions, C channels, K weights of a channel, the last for the position itself.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, pad, silu

from .attention import is_plain

PIECE = 2**18  # numbers of the input that are worked on at one time: 1 MiB in float32


class Convolution(nn.Module):
    """silu(bias + sum_k weight_k x_{t - K + 1 + k}) of each channel; before the first position are zeros, or a window."""

    def __init__(self, channels: int, kernel: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, kernel))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BTC: Tensor, window_BWC: Tensor | None = None) -> Tensor:
        """window_BWC: the inputs before x_BTC, at most K - 1."""
        before = 0 if window_BWC is None else window_BWC.shape[1]
        whole = x_BTC if window_BWC is None else torch.cat((window_BWC.to(x_BTC.dtype), x_BTC), 1)
        form = _plain if x_BTC.device.type != "cpu" or is_plain() else _shifted
        return form(whole, self.weight, self.bias)[:, before:]

    def window(self, x_BTC: Tensor, window_BWC: Tensor | None = None) -> Tensor:
        """Return the inputs that the next position sees beside itself, [B, K - 1 or fewer, C]."""
        whole = x_BTC if window_BWC is None else torch.cat((window_BWC.to(x_BTC.dtype), x_BTC), 1)
        return whole[:, max(0, whole.shape[1] - self.weight.shape[1] + 1) :]


def _plain(x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor) -> Tensor:
    x_BCT = pad(x_BTC.mT, (weight_CK.shape[1] - 1, 0))
    weight, bias = weight_CK.to(x_BTC.dtype), bias_C.to(x_BTC.dtype)
    return silu(conv1d(x_BCT, weight[:, None], bias, groups=len(weight)).mT)


@torch.compiler.disable
def _shifted(x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor) -> Tensor:
    return _Shifted.apply(x_BTC, weight_CK, bias_C)


class _Shifted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        for rows in _pieces(x):
            y[rows] = silu(_sum(x[rows], weight, bias), inplace=True)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, bias = ctx.saved_tensors
        exact = _exact(x, weight)
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        grad_weight, grad_bias = torch.zeros_like(weight, dtype=exact), torch.zeros_like(bias, dtype=exact)
        for rows in _pieces(x):
            inputs, before = x[rows].to(exact), _sum(x[rows], weight, bias)
            grad = torch.ops.aten.silu_backward(grad_y[rows].to(exact), before)
            grad_bias += grad.sum((0, 1))
            grad_inputs = torch.zeros_like(grad)
            for k, shift in _shifts(weight, x.shape[1]):
                end = x.shape[1] - shift
                grad_inputs[:, :end].addcmul_(grad[:, shift:], weight[:, k].to(exact))
                grad_weight[:, k] += (grad[:, shift:] * inputs[:, :end]).sum((0, 1))
            grad_x[rows] = grad_inputs
        return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


def _sum(x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor) -> Tensor:
    """Return what SiLU is taken of, in float32 or float64."""
    exact = _exact(x_BTC, weight_CK)
    x_BTC, weight_CK = x_BTC.to(exact), weight_CK.to(exact)
    total = bias_C.to(exact).expand(x_BTC.shape).clone()
    for k, shift in _shifts(weight_CK, x_BTC.shape[1]):
        total[:, shift:].addcmul_(x_BTC[:, : x_BTC.shape[1] - shift], weight_CK[:, k])
    return total


def _exact(x: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)


def _shifts(weight_CK: Tensor, length: int) -> Iterator[tuple[int, int]]:
    """Yield each weight and by how many positions its input is earlier, if there are so many."""
    kernel = weight_CK.shape[1]
    yield from ((k, kernel - 1 - k) for k in reversed(range(kernel)) if kernel - 1 - k < length)


def _pieces(x_BTC: Tensor) -> Iterator[slice]:
    rows = max(1, PIECE // max(1, x_BTC[0].numel() if len(x_BTC) else 1))
    yield from (slice(start, start + rows) for start in range(0, len(x_BTC), rows))
