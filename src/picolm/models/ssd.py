"""The state space recurrence of Mamba-2 (Dao and Gu 2024), in forms that agree.

For each head, h_t = exp(a_t) h_{t-1} + dt_t x_t B_t^T and y_t = h_t C_t, with a_t = dt_t A <= 0. Written out,
y_t = sum_{s <= t} exp(a_{s+1} + … + a_t) (C_t B_s) dt_s x_s: a product with a matrix, as in attention (`mixing`). In chunks,
both are used: the matrix inside of a chunk, the state from one chunk to the next.

On a CPU the matrices of decays, one for each head, cost the most. `_Chunked` makes none: with c_t the sum of a in the chunk so
far and m half of its sum, exp(c_t - c_s) = exp(c_t - m) exp(m - c_s), so that values are scaled before and after one product with
scores C B^T that all heads of a group share. The factors lie in exp(±RANGE / 2) where a chunk decays by RANGE at most: if it
decays more, chunks are made smaller, down to LEAST positions; then `plain` takes its place, which is exact for any decay.
`plain` is also what a compiler fuses on a GPU, and what has second derivatives.

Sums of a are taken in float64: differences of float32 sums lose 2e-5 (on MPS, which has no float64, they do). The products are
in float32 for bfloat16, too: the gradient of a decay is a difference of sums that almost cancel, and would be wrong by a fifth.

Legend: B rows, T positions, K chunks, Q positions of a chunk, G groups, H heads, M = H / G heads of a group, P head size,
N state size, V = M P values of a group.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .attention import is_plain

CHUNK, LEAST = 64, 8
RANGE = 120.0  # values and gradients between 1e-12 and 1e12 times exp(±60) stay inside of float32


def scan(
    x_BTHP: Tensor, dt_BTH: Tensor, A_H: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, state_BHPN: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return y [B, T, H, P] and the state after the last position [B, H, P, N], by the fastest form.

    dt_BTH: float32 or float64, at least 0. A_H: negative. state_BHPN: that before the first position (default: 0).
    """
    if x_BTHP.shape[1] == 1:
        return recurrence(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, state_BHPN)
    if x_BTHP.device.type != "cpu" or is_plain():
        return plain(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, state_BHPN)
    return _fastest_on_cpu(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, state_BHPN)


@torch.compiler.disable  # which form is the right one depends on the numbers
def _fastest_on_cpu(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    with torch.autocast("cpu", enabled=False):
        chunk = chunk_size(dt.detach() * A.detach())
        if chunk is None:
            return plain(x, dt, A, B, C, state)
        return chunked(x, dt, A, B, C, state, chunk)


def recurrence(
    x_BTHP: Tensor, dt_BTH: Tensor, A_H: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, state_BHPN: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute `scan` one position after the other."""
    heads, exact = dt_BTH.shape[2], dt_BTH.dtype
    B_BTHN, C_BTHN = (t.to(exact).repeat_interleave(heads // t.shape[2], 2) for t in (B_BTGN, C_BTGN))
    x_BTHP, dtype = x_BTHP.to(exact), x_BTHP.dtype
    decay_BTH = (dt_BTH * A_H).exp()
    h = _initial(x_BTHP, B_BTGN, exact) if state_BHPN is None else state_BHPN.to(exact)
    outputs = []
    for t in range(x_BTHP.shape[1]):
        new = (dt_BTH[:, t, :, None] * x_BTHP[:, t])[..., None] * B_BTHN[:, t, :, None]
        h = decay_BTH[:, t, :, None, None] * h + new
        outputs.append((h * C_BTHN[:, t, :, None]).sum(-1))
    return torch.stack(outputs, 1).to(dtype), h


def mixing(dt_BTH: Tensor, A_H: Tensor, B_BTGN: Tensor, C_BTGN: Tensor) -> Tensor:
    """Return the matrix by which y = scan(x) is made of x, from a state of 0: [B, H, T of y, T of x].

    Its entries are signed, and their sums are not 1: they are no weights of attention.
    """
    exact, heads = dt_BTH.dtype, dt_BTH.shape[2]
    scores_BGTT = torch.einsum("btgn,bsgn->bgts", C_BTGN.to(exact), B_BTGN.to(exact))
    scores_BHTT = scores_BGTT.repeat_interleave(heads // scores_BGTT.shape[1], 1)
    return scores_BHTT * _decays(dt_BTH * A_H) * dt_BTH.mT[:, :, None]


def plain(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    state_BHPN: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Compute `scan` in chunks with a matrix of decays for each head: any decay, differentiable twice, no branches."""
    exact, groups = dt_BTH.dtype, B_BTGN.shape[2]
    x, dt, a, B, C = (_in_chunks(t, chunk) for t in (x_BTHP, dt_BTH, dt_BTH * A_H, B_BTGN, C_BTGN))
    c_BKQH = _sums(a, 2)
    end_BKH = c_BKQH[:, :, -1]
    scaled = (x * dt[..., None].to(x.dtype)).unflatten(3, (groups, -1))  # BKQGMP
    scores_BKGQQ = torch.einsum("bkqgn,bksgn->bkgqs", C, B)
    inside = scores_BKGQQ[:, :, :, None] * _decays(a).unflatten(2, (groups, -1)).to(x.dtype)
    y = torch.einsum("bkgmqs,bksgmp->bkqgmp", inside, scaled)
    to_end = (end_BKH[:, :, None] - c_BKQH).exp().to(x.dtype).unflatten(3, (groups, -1))
    made = torch.einsum("bksgn,bksgmp->bkgmpn", B, scaled * to_end[..., None]).to(exact).flatten(2, 3)  # BKHPN
    first = _initial(x_BTHP, B_BTGN, exact) if state_BHPN is None else state_BHPN.to(exact)
    between_BHKK = _decays(pad(end_BKH, (0, 0, 1, 0)))  # from the end of a chunk, or the start, to that of a later one
    states = torch.einsum("bhkj,bjhpn->bkhpn", between_BHKK.to(exact), torch.cat((first[:, None], made), 1))
    before = states[:, :-1].unflatten(2, (groups, -1)).to(x.dtype)
    from_start = c_BKQH.exp().to(x.dtype).unflatten(3, (groups, -1))
    y = y + torch.einsum("bkqgn,bkgmpn->bkqgmp", C, before) * from_start[..., None]
    return y.flatten(3, 4).flatten(1, 2)[:, : x_BTHP.shape[1]].to(x_BTHP.dtype), states[:, -1]


def chunked(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    state_BHPN: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Compute `scan` in chunks without a matrix of decays; differentiable once. No chunk may decay by more than RANGE."""
    dtype, groups, exact = x_BTHP.dtype, B_BTGN.shape[2], dt_BTH.dtype
    work = torch.promote_types(dtype, torch.float32)
    first = _initial(x_BTHP, B_BTGN, exact) if state_BHPN is None else state_BHPN.to(exact)
    x = _in_chunks(x_BTHP.to(work), chunk).unflatten(3, (groups, -1))
    dt, a = (_in_chunks(t, chunk).unflatten(3, (groups, -1)) for t in (dt_BTH, dt_BTH * A_H))
    B, C = (_in_chunks(t.to(work), chunk) for t in (B_BTGN, C_BTGN))
    y, last = _Chunked.apply(x, dt, a, B, C, first.unflatten(1, (groups, -1)).permute(0, 1, 4, 2, 3))
    y_BTHP = y.flatten(3, 4).flatten(1, 2)[:, : x_BTHP.shape[1]]
    return y_BTHP.to(dtype), last.permute(0, 1, 3, 4, 2).flatten(1, 2)


def chunk_size(a_BTH: Tensor) -> int | None:
    """Return the length of chunks, CHUNK or smaller, of which none decays by more than RANGE; None if LEAST is not enough."""
    T, most = a_BTH.shape[1], CHUNK
    while most >= LEAST:
        chunk = -(-T // -(-T // most))  # chunks of equal lengths
        if not (-_in_chunks(a_BTH, chunk).sum(2)).amax() > RANGE:  # so NaN, which stays NaN in any form, is not slow
            return chunk
        most //= 2
    return None


class _Chunked(torch.autograd.Function):
    """x, y: BKQGMP; dt, a: BKQGM; B, C: BKQGN; the states before and after: BGNMP.

    Inside, tensors are [B, K, G, …] with the values of a group side by side, so that everything is a product of matrices:
    [tril(C B^T) | C] @ [Xs ; Hs] with Xs = exp(m - c) dt x, and Hs = exp(m) h of the state before the chunk.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, a: Tensor, B: Tensor, C: Tensor, first: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows, K, Q, G, M, P = x.shape
        N = B.shape[-1]
        rise, fall, half = _scales(a)
        right = x.new_empty(rows, K, G, Q + N, M, P)
        torch.mul(_by_group(x), _by_group(fall * dt)[..., None], out=right[:, :, :, :Q])
        left = x.new_empty(rows, K, G, Q, Q + N)
        left[..., :Q] = (_by_group(C) @ _by_group(B).mT).tril_()
        left[..., Q:] = _by_group(C)
        made = _by_group(B).mT @ right[:, :, :, :Q].flatten(4)
        states = made.to(dt.dtype).unflatten(-1, (M, P))  # of the chunk alone; then, in place, those after each chunk
        h = first
        for k in range(K):
            scale = half[:, k, :, None, :, None]
            before = scale * h
            right[:, k, :, Q:] = before
            h = states[:, k].add_(before).mul_(scale)
        sums = (left @ right.flatten(4)).unflatten(-1, (M, P)).transpose(2, 3)
        y = (sums * rise[..., None]).to(x.dtype)
        ctx.save_for_backward(x, dt, B, left, right, rise, fall, half, states, y)
        return y, h.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_last: Tensor) -> tuple[Tensor, ...]:
        x, dt, B, left, right, rise, fall, half, states, y = ctx.saved_tensors
        Q, (M, P) = x.shape[2], x.shape[4:]
        grad_sums = _by_group((grad_y * rise[..., None]).to(x.dtype)).flatten(4)
        grad_left = grad_sums @ right.flatten(4).mT
        grad_right = left.mT @ grad_sums
        grad_made, of_ends, grad_first = _state_gradients(
            grad_right[:, :, :, Q:].unflatten(-1, (M, P)), grad_last, states, half
        )
        made = grad_made.to(x.dtype).flatten(4)
        grad_scores = grad_left[..., :Q].tril()
        grad_B = grad_scores.mT @ left[..., Q:] + right[:, :, :, :Q].flatten(4) @ made.mT
        grad_C = grad_left[..., Q:] + grad_scores @ _by_group(B)
        grad_scaled = (grad_right[:, :, :, :Q] + _by_group(B) @ made).unflatten(-1, (M, P)).transpose(2, 3)
        grad_x = (grad_scaled * (fall * dt)[..., None]).to(x.dtype)
        grad_dt = _dot(grad_scaled, x, dt.dtype) * fall
        # By each sum c: rise grows with it, fall shrinks; that to the middle cancels out. Then by each a in the sums.
        grad_c = (_dot(grad_y, y, dt.dtype) - grad_dt * dt).double()
        grad_c[:, :, -1] += of_ends
        grad_a = grad_c.flip(2).cumsum(2).flip(2).to(dt.dtype)
        return grad_x, grad_dt, grad_a, _by_position(grad_B), _by_position(grad_C), grad_first


def _state_gradients(
    grad_before: Tensor, grad_last: Tensor, states: Tensor, half: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of what each chunk adds to the state, of its whole decay, and of the first state."""
    made, of_ends, grad = torch.empty_like(states), torch.empty_like(half), grad_last
    for k in reversed(range(states.shape[1])):
        scale = half[:, k, :, None, :, None]
        of_ends[:, k] = (grad * states[:, k]).sum((2, 4))
        torch.mul(scale, grad, out=made[:, k])
        grad = scale * (grad_before[:, k] + made[:, k])
    return made, of_ends, grad


def _scales(a_BKQGM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return exp(c - m) and exp(m - c) of each position, and exp(m) of each chunk, with m the half of its whole decay."""
    c = _sums(a_BKQGM, 2)
    middle = c[:, :, -1:] / 2
    rise, fall, half = (difference.exp().to(a_BKQGM.dtype) for difference in (c - middle, middle - c, middle))
    return rise, fall, half.squeeze(2)


def _decays(a_BxTH: Tensor) -> Tensor:
    """Return exp(a_{s+1} + … + a_t) for positions s <= t, else 0, [B, …, H, T, T]."""
    c_BxHT = _sums(a_BxTH, -2).mT
    later = torch.ones(c_BxHT.shape[-1], c_BxHT.shape[-1], dtype=torch.bool, device=a_BxTH.device).triu(1)
    return (c_BxHT[..., None] - c_BxHT[..., None, :]).masked_fill(later, -torch.inf).exp().to(a_BxTH.dtype)


def _sums(a: Tensor, dim: int) -> Tensor:
    return (a if a.device.type == "mps" else a.double()).cumsum(dim)


def _dot(a_xP: Tensor, b_xP: Tensor, dtype: torch.dtype) -> Tensor:
    return (a_xP * b_xP).sum(-1, dtype=dtype)


def _initial(x_BTHP: Tensor, B_BTGN: Tensor, dtype: torch.dtype) -> Tensor:
    return x_BTHP.new_zeros(len(x_BTHP), *x_BTHP.shape[2:], B_BTGN.shape[-1], dtype=dtype)


def _in_chunks(t_BTx: Tensor, chunk: int) -> Tensor:
    """Return [B, K, Q, …]; positions after the last have dt = 0: they change nothing."""
    lacking = -t_BTx.shape[1] % chunk
    if lacking:
        t_BTx = pad(t_BTx, (0, 0) * (t_BTx.ndim - 2) + (0, lacking))
    return t_BTx.unflatten(1, (-1, chunk))


def _by_group(t_BKQGx: Tensor) -> Tensor:
    return t_BKQGx.transpose(2, 3)


def _by_position(t_BKGQx: Tensor) -> Tensor:
    return t_BKGQx.transpose(2, 3)
