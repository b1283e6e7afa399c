"""Causal attention with grouped keys, by whichever route is the fastest on the device; all routes agree.

On GPUs the fused kernels of `scaled_dot_product_attention` win. On CPUs they do not: there this module multiplies
blocks of queries with all the keys up to the block's end, as plain matrix products. The upper triangle is never computed,
only the diagonal block needs a mask, and the query heads of a group share one product with their common keys. In
bfloat16, at 512 positions and 12 heads, it takes 27 % (head size 32) to 30 % (head size 8) of the fused CPU kernel's time.
The price is that in bfloat16 the scores are rounded before the softmax, as in any unfused implementation.

Legend: B rows, M key-value heads, G query heads per key-value head, T positions of queries, K positions of keys (the
queries are the last T of them), D head size; P = B * M independent problems, R = T * G query rows, position-major.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# The probabilities of a layer are kept for the backward pass where they take no more than this, and computed again beyond
# it, to the same bits: they grow with the square of the length, and making them again costs a fifth of the time.
KEEP_BYTES = 2**26


def attention(q_BMTGD: Tensor, k_BMKD: Tensor, v_BMKD: Tensor, padding_BK: Tensor | None = None) -> Tensor:
    """softmax(q k^T) v over the keys up to each query's own position, [B, M, T, G, D]; q is already scaled.

    padding_BK: True at keys that only their own position may see (padding on the left of shorter prompts in a batch).
    """
    if padding_BK is not None or q_BMTGD.device.type != "cpu":
        return fused(q_BMTGD, k_BMKD, v_BMKD, padding_BK)
    return block_causal(q_BMTGD, k_BMKD, v_BMKD)


def fused(q_BMTGD: Tensor, k_BMKD: Tensor, v_BMKD: Tensor, padding_BK: Tensor | None = None) -> Tensor:
    """`attention` by the kernels of torch; without a mask where the causal one is implied."""
    T, G, K = q_BMTGD.shape[2], q_BMTGD.shape[3], k_BMKD.shape[2]
    mask = None
    if padding_BK is not None or 1 < T < K:  # torch's `is_causal` would align the first query with the first key
        mask = torch.ones(T, K, dtype=torch.bool, device=k_BMKD.device).tril(K - T)
    if mask is not None and padding_BK is not None:
        own_TK = torch.eye(K, dtype=torch.bool, device=k_BMKD.device)[K - T :]
        mask = mask & (own_TK | ~padding_BK[:, None, None, :])
    q_BNTD = q_BMTGD.permute(0, 1, 3, 2, 4).flatten(1, 2)
    out_BNTD = scaled_dot_product_attention(
        q_BNTD, k_BMKD, v_BMKD, mask, is_causal=mask is None and T > 1, scale=1.0, enable_gqa=G > 1
    )
    return out_BNTD.unflatten(1, (-1, G)).transpose(2, 3)


@torch.compiler.disable  # unrolled into a compiled graph, its blocks take minutes to compile and run slower
def block_causal(q_BMTGD: Tensor, k_BMKD: Tensor, v_BMKD: Tensor) -> Tensor:
    """`attention` by plain matrix products over blocks of queries."""
    G = q_BMTGD.shape[3]
    with torch.autocast(
        q_BMTGD.device.type, enabled=False
    ):  # which would run the softmax in float32, at twice the time
        q_PRD = q_BMTGD.flatten(2, 3).flatten(0, 1)
        out_PRD = _BlockCausal.apply(q_PRD, k_BMKD.flatten(0, 1), v_BMKD.flatten(0, 1), G)
    return out_PRD.view(q_BMTGD.shape)


class _BlockCausal(torch.autograd.Function):
    """Written out because autograd would pad and add a full-length gradient of k and v for every block."""

    @staticmethod
    def forward(ctx: Any, q_PRD: Tensor, k_PKD: Tensor, v_PKD: Tensor, group: int) -> Tensor:
        out_PRD = torch.empty_like(q_PRD)
        kept: list[Tensor] = []
        keep = (
            q_PRD.shape[0] * q_PRD.shape[1] * k_PKD.shape[1] * q_PRD.element_size() <= 2 * KEEP_BYTES
        )  # half is future
        for rows, end in _blocks(q_PRD, k_PKD, group):
            probabilities = _probabilities(q_PRD[:, rows], k_PKD[:, :end], group)
            out_PRD[:, rows] = probabilities @ v_PKD[:, :end]
            if keep:
                kept.append(probabilities)
        ctx.group = group
        ctx.save_for_backward(q_PRD, k_PKD, v_PKD, *kept)
        return out_PRD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_PRD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_PRD, k_PKD, v_PKD, *kept = ctx.saved_tensors
        grad_q = torch.empty_like(q_PRD)
        exact = torch.promote_types(q_PRD.dtype, torch.float32)  # sums over blocks lose nothing to bfloat16
        grad_k = torch.zeros_like(k_PKD.mT, dtype=exact, memory_format=torch.contiguous_format)
        grad_v = torch.zeros_like(grad_k)  # both [P, D, K]: the long side last is faster for small heads
        for i, (rows, end) in enumerate(_blocks(q_PRD, k_PKD, ctx.group)):
            q, k, v, grad = q_PRD[:, rows], k_PKD[:, :end], v_PKD[:, :end], grad_PRD[:, rows]
            probabilities = kept[i] if kept else _probabilities(q, k, ctx.group)
            grad_v[..., :end].add_(grad.mT @ probabilities)  # `+=` would copy the slice onto itself
            grad_scores = torch._softmax_backward_data(grad @ v.mT, probabilities, -1, q.dtype)
            grad_q[:, rows] = grad_scores @ k
            grad_k[..., :end].add_(q.mT @ grad_scores)
        return grad_q, grad_k.mT.to(k_PKD.dtype), grad_v.mT.to(v_PKD.dtype), None


def _blocks(q_PRD: Tensor, k_PKD: Tensor, group: int) -> Iterator[tuple[slice, int]]:
    """The query rows of each block and the end of the keys it sees. 64 positions, and at most 16 blocks, were fastest."""
    K, T = k_PKD.shape[1], q_PRD.shape[1] // group
    size = max(64, -(-T // 16))
    for start in range(0, T, size):
        stop = min(start + size, T)
        yield slice(start * group, stop * group), K - T + stop


def _probabilities(q: Tensor, k: Tensor, group: int) -> Tensor:
    """Of one block, whose diagonal is the last square of its scores."""
    scores = q @ k.mT
    size = q.shape[1] // group
    future = torch.full((size, size), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    scores[..., -size:].add_(future.repeat_interleave(group, dim=0))  # a third of the time of masked_fill_
    return scores.softmax(-1)
