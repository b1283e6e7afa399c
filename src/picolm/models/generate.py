"""Text from a causal model: greedy or sampled, with or without a cache of keys and values, with the same result.

Legend: B rows, T positions, V vocabulary, M key-value heads, D head size.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class NotFinite(ValueError):
    """A model computes NaN or infinities where probabilities are wanted; nothing can be read from them."""


class KeyValueCache:
    """The keys and values of each layer at the positions so far, [B, M, T, D]."""

    def __init__(self) -> None:
        self._layers: list[tuple[Tensor, Tensor]] = []

    def get_seq_length(self) -> int:
        return self._layers[-1][0].shape[2] if self._layers else 0

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new positions; returns all of the layer's so far."""
        if layer == len(self._layers):
            self._layers.append((keys, values))
        else:
            old_keys, old_values = self._layers[layer]
            self._layers[layer] = torch.cat((old_keys, keys), 2), torch.cat((old_values, values), 2)
        return self._layers[layer]


@torch.no_grad()
def generate(
    model: Any,
    prompt_BT: Tensor,
    max_new_tokens: int,
    *,
    context: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> Tensor:
    """The prompt and up to `max_new_tokens` further tokens, [B, T + n].

    model: called with (tokens_BT), or (tokens_BT, cache) where its `new_cache` makes one, it returns logits_BTV; a cache
    holds what it keeps of the tokens before. temperature 0 takes the likeliest token; otherwise tokens are drawn with
    `generator` from the `top_k` likeliest and from the smallest set that holds `top_p` of the probability. A row that
    has produced `eos` (one of them, where there are several) is filled with the first, and generation ends when all rows
    have. Raises ValueError when prompt and new tokens do not fit into `context` positions, and NotFinite for a model that
    computes NaN.
    """
    check(prompt_BT, max_new_tokens, context, temperature, top_k, top_p)
    ends = torch.tensor([] if eos is None else [eos] if isinstance(eos, int) else list(eos), device=prompt_BT.device)
    cache, seen = model.new_cache() if use_cache else None, 0
    tokens_BT, ended_B1 = prompt_BT, torch.zeros_like(prompt_BT[:, :1], dtype=torch.bool)
    for _ in range(max_new_tokens):
        logits_BTV = model(tokens_BT) if cache is None else model(tokens_BT[:, seen:], cache)
        seen = tokens_BT.shape[1]
        next_B1 = choose(logits_BTV[:, -1], temperature, top_k, top_p, generator)
        if len(ends):
            next_B1 = torch.where(ended_B1, ends[0], next_B1)
            ended_B1 = ended_B1 | torch.isin(next_B1, ends)
        tokens_BT = torch.cat((tokens_BT, next_B1), 1)
        if ended_B1.all():
            break
    return tokens_BT


def choose(
    logits_BV: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """Return one token of each row, [B, 1]. Raises NotFinite for logits among which there is no largest number."""
    check_finite(logits_BV)
    if temperature == 0:
        return logits_BV.argmax(-1, keepdim=True)
    p_BV, tokens_BV = likeliest_first(logits_BV, temperature, top_k, top_p)
    device = p_BV.device if generator is None else generator.device
    drawn_B1 = torch.multinomial(p_BV.to(device), 1, generator=generator).to(p_BV.device)
    return tokens_BV.gather(1, drawn_B1)


def check_finite(logits_BV: Tensor) -> None:
    """Raise NotFinite for logits among which there is no largest number."""
    if not logits_BV.amax(-1).isfinite().all():  # NaN where any is NaN
        raise NotFinite("the model computes NaN or infinities for the next token; its weights may have diverged")


def likeliest_first(
    logits_BV: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> tuple[Tensor, Tensor]:
    """Return the weights of the tokens to draw from, 0 for those that top_p leaves out, and their ids, the likeliest first."""
    largest_B1 = logits_BV.amax(-1, keepdim=True)
    scaled_BV = (
        (logits_BV - largest_B1).double() / temperature
    ).float()  # of the smallest temperature, too, no infinity
    logits_BV, tokens_BV = scaled_BV.sort(stable=True, dim=-1, descending=True)
    p_BV = logits_BV[:, :top_k].softmax(-1)
    if top_p is not None:
        p_BV = p_BV.masked_fill(p_BV.cumsum(-1) - p_BV >= top_p, 0.0)  # the first is always kept
    return p_BV, tokens_BV


def check(prompt_BT: Tensor, new: int, context: int, temperature: float, top_k: Any, top_p: Any) -> None:
    """Raise ValueError for what does not fit into `context` positions, and for options out of range."""
    length = prompt_BT.shape[1]
    if not 0 < length <= context:
        raise ValueError(f"the prompt has {length} tokens; this model takes between 1 and {context}")
    if not 0 <= new <= context - length:
        raise ValueError(
            f"{new} new tokens after a prompt of {length} do not fit into a context of {context}: "
            f"ask for at most {context - length}"
        )
    if (
        not 0 <= temperature < math.inf
        or (top_k is not None and top_k < 1)
        or (top_p is not None and not 0 < top_p <= 1)
    ):
        raise ValueError(
            f"temperature {temperature}, top_k {top_k}, top_p {top_p}: temperature must be a number of at least 0, "
            "top_k at least 1, and top_p in (0, 1]"
        )
