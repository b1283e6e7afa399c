"""Cross-entropy of a linear layer's output that never holds all of that output.

The logits of a chunk of positions are made and turned, in place, into the loss's gradient in them, from which come the
gradients of the hidden states and of the weight: with a vocabulary of 50304 and 2048 positions all logits would take
412 MB in float32, several times over. Because the gradients are made in the forward pass, nothing is computed twice. All
chunks use one piece of memory, which leaves no holes behind, and what needs float32 is done in tiles that fit the cache.

Matrix products run in the dtype of the hidden states, the softmax and all sums in float32: in bfloat16,
`linear_cross_entropy` of torch 2.13 takes 2.7 times as long and returns a bfloat16 loss.

Legend: B rows, S tokens of a row, P positions, C positions of a chunk, H model width, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .objective import Loss, NextToken

CHUNK_LOGITS = {"cpu": 2**22, "other": 2**27}  # 8 MiB in bfloat16, a quarter of a GiB on a GPU
LEAST_ROWS = 512  # each chunk passes over the whole weight and its gradient
TILE = {"cpu": 2**20, "other": 2**27}  # numbers that are in float32 at one time: 4 MiB on a CPU
MOST_NATS = 60.0  # up to here -ln of a float32 probability is exact; beyond it loses digits, and then underflows


class LinearNextToken(NextToken):
    """The objective of a causal language model whose logits are `de_embedding_proj`, a linear layer, of its `hidden`."""

    def loss(self: Any, tokens_BS: Tensor, noise: object = None) -> Loss:
        """Sum of -ln p(token | tokens before it) over all but the first position. `noise` is not used: nothing is random.

        The logits are never whole in memory, so forward hooks of de_embedding_proj see nothing here.
        """
        hidden_PH, targets_P = self._inputs(tokens_BS)
        return Loss(linear_cross_entropy(hidden_PH, self.de_embedding_proj.weight, targets_P), targets_P.numel())

    def predictions(self: Any, tokens_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Return the terms of `loss`, and whether each token is the likeliest in its place, [B, T]."""
        hidden_PH, targets_P = self._inputs(tokens_BS)
        nats_P, likeliest_P = linear_predictions(hidden_PH, self.de_embedding_proj.weight, targets_P)
        return nats_P.view(tokens_BS.shape[0], -1), likeliest_P.view(tokens_BS.shape[0], -1)

    def _inputs(self: Any, tokens_BS: Tensor) -> tuple[Tensor, Tensor]:
        return self.hidden(tokens_BS[:, :-1]).flatten(0, 1), tokens_BS[:, 1:].flatten()


def linear_cross_entropy(
    hidden_PH: Tensor, weight_VH: Tensor, targets_P: Tensor, shares_P: Tensor | None = None
) -> Tensor:
    """-sum_p share_p log softmax(weight hidden_p)[target_p], a float32 scalar in nats, differentiable once.

    shares_P: factors of the terms, of which no gradient is computed; None: all are 1.
    """
    if not torch.is_grad_enabled():
        nats_P = linear_token_nats(hidden_PH, weight_VH, targets_P)
        return (nats_P if shares_P is None else nats_P * shares_P).sum()
    return _LinearCrossEntropy.apply(hidden_PH, weight_VH, targets_P, shares_P)


@torch.no_grad()
def linear_token_nats(hidden_PH: Tensor, weight_VH: Tensor, targets_P: Tensor) -> Tensor:
    """The terms of `linear_cross_entropy`, float32, [P]; no gradient."""
    return torch.cat([_nats(*chunk) for chunk in _logits(hidden_PH, weight_VH, targets_P)])


@torch.no_grad()
def linear_predictions(hidden_PH: Tensor, weight_VH: Tensor, targets_P: Tensor) -> tuple[Tensor, Tensor]:
    """The terms of `linear_cross_entropy`, and whether each target has the largest of the logits, both [P]; no gradient."""
    nats, likeliest = [], []
    for logits_CV, targets_C in _logits(hidden_PH, weight_VH, targets_P):
        nats.append(_nats(logits_CV, targets_C))
        likeliest.append(logits_CV.argmax(-1) == targets_C)
    return torch.cat(nats), torch.cat(likeliest)


def _logits(hidden_PH: Tensor, weight_VH: Tensor, targets_P: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the logits and the targets of one chunk of positions after the other."""
    weight_VH = weight_VH.to(hidden_PH.dtype)
    for chunk in _chunks(hidden_PH, weight_VH):
        yield hidden_PH[chunk] @ weight_VH.mT, targets_P[chunk]


def _nats(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    exact = torch.promote_types(logits_CV.dtype, torch.float32)
    return -logits_CV.to(exact).log_softmax(-1).gather(1, targets_C[:, None]).squeeze(1)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_PH: Tensor, weight_VH: Tensor, targets_P: Tensor, shares_P: Tensor | None) -> Tensor:
        exact = torch.promote_types(hidden_PH.dtype, torch.float32)
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden_PH) if needs_hidden else None
        grad_weight = torch.zeros_like(weight_VH, dtype=exact) if needs_weight else None
        weight = weight_VH.to(hidden_PH.dtype)
        nats_P = torch.empty(hidden_PH.shape[:1], dtype=exact, device=hidden_PH.device)
        chunks = list(_chunks(hidden_PH, weight_VH))
        logits_CV = hidden_PH.new_empty(min(chunks[0].stop, hidden_PH.shape[0]), weight.shape[0])
        for chunk in chunks:
            hidden_CH = hidden_PH[chunk]
            logits = torch.mm(hidden_CH, weight.mT, out=logits_CV[: hidden_CH.shape[0]])
            nats_P[chunk] = _to_gradient(logits, targets_P[chunk, None])
            if shares_P is not None:
                logits.mul_(shares_P[chunk, None])
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[chunk])
            if grad_weight is not None:
                _add_product(grad_weight, logits.mT, hidden_CH)
        rare = nats_P > MOST_NATS
        if rare.any():
            nats_P[rare] = linear_token_nats(hidden_PH[rare], weight, targets_P[rare])
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight_VH.dtype
        return (nats_P if shares_P is None else nats_P * shares_P).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else (grad_hidden.to(grad.dtype) * grad).to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad).to(ctx.weight_dtype),
            None,
            None,
        )


def _chunks(hidden_PH: Tensor, weight_VH: Tensor) -> Iterator[slice]:
    size = max(LEAST_ROWS, _of_device(CHUNK_LOGITS, hidden_PH) // weight_VH.shape[0])
    for start in range(0, max(1, hidden_PH.shape[0]), size):  # one empty chunk of no positions
        yield slice(start, start + size)


def _to_gradient(logits_CV: Tensor, targets_C1: Tensor) -> Tensor:
    """Turn logits into softmax - target, in place; returns the nats of the targets, inf where the softmax underflows."""
    rows = _tile_rows(logits_CV)
    exact = torch.promote_types(logits_CV.dtype, torch.float32)
    tile_RV = torch.empty_like(logits_CV[:rows], dtype=exact)
    nats_C1 = torch.empty_like(logits_CV[:, :1], dtype=exact)
    for logits, targets, nats in zip(logits_CV.split(rows), targets_C1.split(rows), nats_C1.split(rows)):
        values = tile_RV[: logits.shape[0]].copy_(logits)
        torch.softmax(values, -1, out=values)
        probability = values.gather(1, targets)
        torch.log(probability, out=nats)
        values.scatter_(1, targets, probability - 1)
        logits.copy_(values)
    return -nats_C1.squeeze(1)


def _add_product(sum_VH: Tensor, a_VC: Tensor, b_CH: Tensor) -> None:
    """Add a b to the sum. The sum may be of a wider dtype, to which a CPU would first convert the whole product."""
    rows = _tile_rows(sum_VH)
    for tile, a in zip(sum_VH.split(rows), a_VC.split(rows)):
        tile.add_(a @ b_CH)


def _tile_rows(x: Tensor) -> int:
    return max(1, _of_device(TILE, x) // x.shape[1])


def _of_device(sizes: dict[str, int], x: Tensor) -> int:
    return sizes.get(x.device.type, sizes["other"])
