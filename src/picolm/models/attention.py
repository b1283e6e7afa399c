"""Attention with grouped keys, causal or to both sides, by whichever route is the fastest on the device; all routes agree.

On GPUs the fused kernels of `scaled_dot_product_attention` win. On CPUs they do not: there this module multiplies
blocks of queries with all the keys up to the block's end, as plain matrix products. The upper triangle is never computed,
only the diagonal block needs a mask, and the query heads of a group share one product with their common keys. Attention to both
sides takes the same blocks with all keys and no mask. The rest is to touch the scores seldom, which is what costs:

- Weights are powers of two, not of e (the caller scales q by log2 e): exp2 takes half of the time of a softmax.
- They are not normalized: a column of ones beside v makes the same product give their sum, and the output is divided.
- Where the norms of q and k bound the scores, the largest score of a row is not looked for: nothing can overflow.
- The gradient of a score is w_ij (g_i v_j - g_i out_i) / sum_i; the column of ones takes the difference, too.

In bfloat16, at 512 positions and 12 heads of 8, this takes a fifth of the time of the fused CPU kernel. The price is that
bfloat16 scores are rounded before the exponential, as in any unfused implementation.

Legend: B rows, M key-value heads, G query heads per key-value head, T positions of queries, K positions of keys (the
queries are the last T of them), D head size, N = M * G query heads; P = B * M independent
problems, R = T * G query rows, position-major.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# Of each layer, so many bytes of weights are kept for the backward pass; the rest is computed again, to the same bits.
# They grow with the square of the length, and making all of them again would take a fifth of the time.
KEEP_BYTES = 56 * 2**20  # all of them at 2048 positions and 12 heads
SAFE_SCORE = (
    64.0  # 2^64, summed over keys and multiplied with values and gradients, stays far inside of float32's 2^±126
)


_plain = False


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Compute attention by plain operations inside of the block; its fast routes have no second derivative."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


def is_plain() -> bool:
    """Return whether what is computed now is to have second derivatives, see `twice_differentiable`."""
    return _plain


def attention(
    q_BMTGD: Tensor, k_BMKD: Tensor, v_BMKD: Tensor, mask: Tensor | None = None, causal: bool = True
) -> Tensor:
    """Return sum_j 2^(q k_j) v_j / sum_j 2^(q k_j), [B, M, T, G, D].

    The sums are over the keys j that `mask` shows: a tensor that broadcasts to [B, N, T, K], boolean (True: visible) or in nats
    that are added to the scores. Without a mask they are over the keys up to each query's own position, or, if not `causal`,
    over all keys.
    """
    if _plain:
        weights_BMGTK = attention_weights(q_BMTGD, k_BMKD, mask, causal).unflatten(1, (-1, q_BMTGD.shape[3]))
        return torch.einsum("bmgtk,bmkd->bmtgd", weights_BMGTK, v_BMKD)
    if mask is not None or q_BMTGD.device.type != "cpu" or q_BMTGD.dtype == torch.float16:
        return fused(q_BMTGD, k_BMKD, v_BMKD, mask, causal)
    return (block_causal if causal else block_full)(q_BMTGD, k_BMKD, v_BMKD)


def fused(q_BMTGD: Tensor, k_BMKD: Tensor, v_BMKD: Tensor, mask: Tensor | None = None, causal: bool = True) -> Tensor:
    """Compute `attention` by the kernels of torch; without a mask where the causal one is implied."""
    T, G, K = q_BMTGD.shape[2], q_BMTGD.shape[3], k_BMKD.shape[2]
    if causal and mask is None and 1 < T < K:  # torch's `is_causal` would align the first query with the first key
        mask = causal_mask(T, K, k_BMKD.device)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q_BMTGD.dtype)
    q_BNTD = q_BMTGD.permute(0, 1, 3, 2, 4).flatten(1, 2)
    grouped, of_16_bits = G > 1, q_BMTGD.dtype in (torch.bfloat16, torch.float16)
    if grouped and q_BMTGD.device.type == "cuda" and (mask is not None or not of_16_bits):
        # Here the fused kernel takes no groups; torch would hold the scores of all rows in memory.
        k_BMKD, v_BMKD, grouped = k_BMKD.repeat_interleave(G, 1), v_BMKD.repeat_interleave(G, 1), False
    is_causal = causal and mask is None and T > 1
    out_BNTD = scaled_dot_product_attention(
        q_BNTD, k_BMKD, v_BMKD, mask, is_causal=is_causal, scale=math.log(2), enable_gqa=grouped
    )
    return out_BNTD.unflatten(1, (-1, G)).transpose(2, 3)


def attention_weights(q_BMTGD: Tensor, k_BMKD: Tensor, mask: Tensor | None = None, causal: bool = True) -> Tensor:
    """Return the weights that `attention` gives to the values, [B, N, T, K], computed in float32 (or float64)."""
    T, K = q_BMTGD.shape[2], k_BMKD.shape[2]
    scores_BNTK = torch.einsum("bmtgd,bmkd->bmgtk", q_BMTGD, k_BMKD).flatten(1, 2)
    nats_BNTK = scores_BNTK.to(torch.promote_types(scores_BNTK.dtype, torch.float32)) * math.log(2)
    if mask is None and causal:
        mask = causal_mask(T, K, k_BMKD.device)
    if mask is not None:
        nats_BNTK = nats_BNTK.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else nats_BNTK + mask
    return nats_BNTK.softmax(-1).to(q_BMTGD.dtype)


def causal_mask(T: int, K: int, device: torch.device) -> Tensor:
    """Return True at the keys up to the position of each query, [T, K]; the queries are the last T positions."""
    return torch.ones(T, K, dtype=torch.bool, device=device).tril(K - T)


def block_causal(q_BMTGD: Tensor, k_BMKD: Tensor, v_BMKD: Tensor) -> Tensor:
    """Causal `attention` by plain matrix products over blocks of queries."""
    return _in_blocks(q_BMTGD, k_BMKD, v_BMKD, True)


def block_full(q_BMTGD: Tensor, k_BMKD: Tensor, v_BMKD: Tensor) -> Tensor:
    """`attention` over all keys by the same products."""
    return _in_blocks(q_BMTGD, k_BMKD, v_BMKD, False)


@torch.compiler.disable  # unrolled into a compiled graph, its blocks take minutes to compile and run slower
def _in_blocks(q_BMTGD: Tensor, k_BMKD: Tensor, v_BMKD: Tensor, causal: bool) -> Tensor:
    G = q_BMTGD.shape[3]
    with torch.autocast(
        q_BMTGD.device.type, enabled=False
    ):  # which would run the softmax in float32, at twice the time
        q_PRD = q_BMTGD.flatten(2, 3).flatten(0, 1)
        out_PRD = _InBlocks.apply(q_PRD, k_BMKD.flatten(0, 1), v_BMKD.flatten(0, 1), G, causal)
    return out_PRD.view(q_BMTGD.shape)


class _InBlocks(torch.autograd.Function):
    """Written out because autograd would pad and add a full-length gradient of k and v for every block."""

    @staticmethod
    def forward(ctx: Any, q_PRD: Tensor, k_PKD: Tensor, v_PKD: Tensor, group: int, causal: bool) -> Tensor:
        P, R, D = q_PRD.shape
        v1_PKD = torch.cat((v_PKD, v_PKD.new_ones(P, v_PKD.shape[1], 1)), -1)
        sums_PRD = q_PRD.new_empty(P, R, D + 1)
        ctx.shift = not q_PRD.norm(dim=-1).amax() * k_PKD.norm(dim=-1).amax() <= SAFE_SCORE
        future = _future(q_PRD, group) if causal else None
        kept: list[Tensor] = []
        room = KEEP_BYTES
        for rows, end in _blocks(q_PRD, k_PKD, group, causal):
            weights = _weights(q_PRD[:, rows], k_PKD[:, :end], future, ctx.shift)
            sums_PRD[:, rows] = torch.bmm(weights, v1_PKD[:, :end])
            room -= weights.nbytes
            if room >= 0:
                kept.append(weights)
        exact = sums_PRD.to(torch.promote_types(q_PRD.dtype, torch.float32))
        normalizer_PR1 = exact[..., D:].clone()
        out_PRD = (exact[..., :D] / normalizer_PR1).to(q_PRD.dtype)
        ctx.group, ctx.causal = group, causal
        ctx.save_for_backward(q_PRD, k_PKD, v1_PKD, out_PRD, normalizer_PR1, *kept)
        return out_PRD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_PRD: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q_PRD, k_PKD, v1_PKD, out_PRD, normalizer_PR1, *kept = ctx.saved_tensors
        exact = grad_PRD / normalizer_PR1  # float32, or float64
        shared_PR1 = (exact * out_PRD).sum(-1, keepdim=True)
        of_scores_PRD = (torch.cat((exact, -shared_PR1), -1) * math.log(2)).to(q_PRD.dtype)
        of_sums_PRD = exact.to(q_PRD.dtype)
        future = _future(q_PRD, ctx.group) if ctx.causal else None
        grad_q = torch.empty_like(q_PRD)
        grad_k = exact.new_zeros(k_PKD.mT.shape)  # sums over blocks lose nothing to bfloat16
        grad_v = torch.zeros_like(grad_k)  # both [P, D, K]: the long side last is faster for small heads
        for i, (rows, end) in enumerate(_blocks(q_PRD, k_PKD, ctx.group, ctx.causal)):
            q, k = q_PRD[:, rows], k_PKD[:, :end]
            weights = kept[i] if i < len(kept) else _weights(q, k, future, ctx.shift)
            grad_v[..., :end].add_(torch.bmm(of_sums_PRD[:, rows].mT, weights))  # `+=` would copy the slice onto itself
            grad_scores = torch.bmm(of_scores_PRD[:, rows], v1_PKD[:, :end].mT).mul_(weights)
            grad_q[:, rows] = torch.bmm(grad_scores, k)
            grad_k[..., :end].add_(torch.bmm(q.mT, grad_scores))
        return grad_q, grad_k.mT.to(k_PKD.dtype), grad_v.mT.to(k_PKD.dtype), None, None


def _block_size(q_PRD: Tensor, group: int) -> int:
    """In positions; blocks of 64, or of an eighth of the length in whole vectors of the CPU, were the fastest."""
    return max(64, 32 * -(-q_PRD.shape[1] // (group * 256)))


def _blocks(q_PRD: Tensor, k_PKD: Tensor, group: int, causal: bool) -> Iterator[tuple[slice, int]]:
    """The query rows of each block, and the end of the keys it sees."""
    K, T, size = k_PKD.shape[1], q_PRD.shape[1] // group, _block_size(q_PRD, group)
    for start in range(0, T, size):
        stop = min(start + size, T)
        yield slice(start * group, stop * group), K - T + stop if causal else K


def _future(q_PRD: Tensor, group: int) -> Tensor:
    """What to add to the scores of a block with the last square of its keys: -inf where the key is later."""
    size = _block_size(q_PRD, group)
    future = torch.full((size, size), float("-inf"), dtype=q_PRD.dtype, device=q_PRD.device).triu(1)
    return future.repeat_interleave(group, dim=0)


def _weights(q: Tensor, k: Tensor, future: Tensor | None, shift: bool) -> Tensor:
    """2^(q k^T) of one block, 0 at later keys if `future` says which; with `shift` relative to the largest of each row."""
    scores = torch.bmm(q, k.mT)
    if future is not None:
        rows = q.shape[1]
        size = future.shape[1] * rows // future.shape[0]
        scores[..., -size:].add_(future[:rows, :size])  # a third of the time of masked_fill_
    if shift:
        scores.sub_(scores.amax(-1, keepdim=True))
    return scores.exp2_()
