"""The parts of a decoder block: RMSNorm, rotary positions, grouped-query attention, SwiGLU, and the block itself.

Each weight is the weight of a module that is called, so that hooks see what goes in and out of it.

Legend: B rows, T positions of queries, K positions of keys, H model width, N query heads, M key-value heads,
G = N / M query heads per key-value head, D = H / N head size, F = D / 2 rotation frequencies.
"""

import math
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from .attention import attention, attention_weights

LOG2_E = 1 / math.log(2)


class Cache(Protocol):
    """Keys and values of the positions so far: our own (generate.py) or one of transformers, whose two names these are."""

    def get_seq_length(self) -> int: ...

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]: ...


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, the quotient in float32 (Zhang & Sennrich 2019).

    Under autocast the result is rounded to its dtype here, once, rather than by each of the layers that read it.
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        return to_autocast(
            (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight
        )


def to_autocast(x: Tensor) -> Tensor:
    """Return `x` in the dtype of autocast, where that is enabled."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def rotations(positions_T: Tensor, head_size: int, theta: float, like: Tensor) -> Tensor:
    """Return the cosine and sine of t theta^(-2f/D) for each position t and frequency f, [T, F, 2], float32.

    Positions of [B, T] (a row of its own for each row of tokens) give [B, T, F, 2]. Computed by each forward pass (some
    50 us) rather than kept: nothing to share between models, to move to a device or to lose when a model is built on the
    meta device.
    """
    exact = torch.promote_types(like.dtype, torch.float32)
    powers_F = torch.arange(0, head_size, 2, device=like.device).to(exact) / head_size
    angles_TF = positions_T.to(exact)[..., None] * (1.0 / theta**powers_F)
    return torch.stack((angles_TF.cos(), angles_TF.sin()), -1)


def rotate(x_BTND: Tensor, rotations_TF2: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021) on the interleaved pairs (x0, x1), (x2, x3), …, in float32, rounded once."""
    x_BTNF2 = x_BTND.to(rotations_TF2.dtype).unflatten(-1, (-1, 2))
    turns_T1F2 = rotations_TF2[..., None, :, :]
    if torch.compiler.is_compiling():  # the compiler fuses this form, and knows no complex numbers
        (a, b), (cos, sin) = x_BTNF2.unbind(-1), turns_T1F2.unbind(-1)
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1)
    else:  # a quarter of the time of the other form on a CPU
        turned = torch.view_as_real(torch.view_as_complex(x_BTNF2) * torch.view_as_complex(turns_T1F2))
    return turned.flatten(-2).to(x_BTND.dtype)


class Attention(nn.Module):
    """Self-attention in which each group of query heads shares a key-value head (Ainslie et al. 2023).

    causal: whether a position sees only those up to its own, unless a mask says what it sees.
    """

    def __init__(self, width: int, heads: int, kv_heads: int, layer: int, causal: bool = True):
        super().__init__()
        self.heads, self.kv_heads, self.layer, self.causal = heads, kv_heads, layer, causal
        kv_width = width // heads * kv_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(
        self,
        x_BTH: Tensor,
        rotations_TF2: Tensor,
        cache: Cache | None = None,
        mask: Tensor | None = None,
        weights: list[Tensor] | None = None,
    ) -> Tensor:
        """mask: see `attention`. weights: a list that the attention weights of this layer are appended to, [B, N, T, K]."""
        M, scale = self.kv_heads, LOG2_E * (x_BTH.shape[-1] // self.heads) ** -0.5  # for weights that are powers of two
        q_BTND = rotate(self.q_proj(x_BTH).unflatten(-1, (self.heads, -1)), rotations_TF2 * scale)
        k_BMTD = rotate(self.k_proj(x_BTH).unflatten(-1, (M, -1)), rotations_TF2).transpose(1, 2)
        v_BMTD = self.v_proj(x_BTH).unflatten(-1, (M, -1)).transpose(1, 2)
        if cache is not None:
            k_BMTD, v_BMTD = cache.update(k_BMTD, v_BMTD, self.layer)
        q_BMTGD = q_BTND.unflatten(2, (M, -1)).transpose(1, 2)
        if weights is not None:
            weights.append(attention_weights(q_BMTGD, k_BMTD, mask, self.causal))
        out_BMTGD = attention(q_BMTGD, k_BMTD, v_BMTD, mask, self.causal)
        return self.o_proj(out_BMTGD.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """w_2(silu(w_0 x) * w_1 x) (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w_0 = nn.Linear(width, hidden, bias=False)
        self.w_1 = nn.Linear(width, hidden, bias=False)
        self.w_2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BTH: Tensor) -> Tensor:
        return self.w_2(silu(self.w_0(x_BTH)) * self.w_1(x_BTH))


class Block(nn.Module):
    """x + attention(norm(x)), then x + swiglu(norm(x))."""

    def __init__(self, width: int, heads: int, kv_heads: int, hidden: int, eps: float, layer: int, causal: bool = True):
        super().__init__()
        self.attention = Attention(width, heads, kv_heads, layer, causal)
        self.attention_norm = RMSNorm(width, eps)
        self.swiglu = SwiGLU(width, hidden)
        self.swiglu_norm = RMSNorm(width, eps)

    def forward(
        self,
        x_BTH: Tensor,
        rotations_TF2: Tensor,
        cache: Cache | None = None,
        mask: Tensor | None = None,
        weights: list[Tensor] | None = None,
    ) -> Tensor:
        x_BTH = x_BTH + self.attention(self.attention_norm(x_BTH), rotations_TF2, cache, mask, weights)
        return x_BTH + self.swiglu(self.swiglu_norm(x_BTH))


def draw_matrix(name: str, values: Tensor, init: str, additions: int, generator: torch.Generator) -> None:
    """Fill an initial matrix. init: that of the configuration. additions: how often a layer adds to the residual stream; what
    writes to it is smaller by the root of that.
    """
    if init == "normal":
        residual = name.endswith(("o_proj.weight", "w_2.weight"))
        values.normal_(0.0, 0.02 / (math.sqrt(additions) if residual else 1.0), generator=generator)
    elif name == "embedding_proj.weight":
        values.normal_(generator=generator)
    else:
        bound = values.shape[1] ** -0.5  # what kaiming_uniform_(a=sqrt(5)) of nn.Linear comes to
        values.uniform_(-bound, bound, generator=generator)
