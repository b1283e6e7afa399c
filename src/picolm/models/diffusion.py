"""Masked diffusion (MDLM, LLaDA): the decoder's blocks without the causal mask, trained to predict tokens that are hidden.

A row is what it is for a decoder: T + 1 tokens, of which the first is given and never hidden. So both bound or compute the same
ln p of the other T. The embedding has one more row, for the mask; no logit belongs to it. There is no input for the noise level:
the number of masks says it.

Legend: B rows, S = T + 1 positions, T predicted tokens, P hidden positions of all rows, H model width, V vocabulary, N pieces,
D draws.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from .anatomy import Anatomy
from .decoder import TRAVELLING, Decoder, DecoderConfig
from .generate import check
from .loss import linear_cross_entropy, linear_predictions
from .masked import PADDING, Hidden, bound, fill, hide_by_time, hide_exactly, left_to_right, nats_along
from .objective import Likelihood, Loss, Noise, Piece, Score


@dataclass(frozen=True)
class DiffusionConfig(DecoderConfig):
    """The shape of a masked diffusion model: the keys of a Pico decoder, and how tokens are hidden in training."""

    model_type: Literal["pico_diffusion"] = "pico_diffusion"  # type: ignore[assignment]
    """The architecture."""

    masking: Literal["exact", "by_time"] = "exact"
    """How training hides tokens. `exact`: k of the T tokens of a row, k uniform in 1 … T and spread evenly over the rows of a
    batch, weight T / k. `by_time`: each with probability t, uniform in [masking_least, 1], weight 1 / t; this is biased, by a
    share of about masking_least, and one draw varies more (13 times in variance for a small trained model)."""

    masking_least: float = 0.001
    """Least t of `by_time`; smaller ones bias the loss less, and its variance grows as -ln masking_least."""

    def problems(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """What rules between fields are broken: the fields, and what to do about them."""
        yield from super().problems()
        if self.masking_least >= 1:
            yield ("masking_least",), f"{self.masking_least} must be below 1"


class Diffusion(Decoder):
    """Tokens, some of them hidden, to logits of the tokens at their own positions. Implements `masked.Denoiser`."""

    Config: ClassVar[type] = DiffusionConfig
    state_prefix: ClassVar[str] = "pico_diffusion."
    likelihood: ClassVar[Likelihood] = "bound"
    causal: ClassVar[bool] = False
    marks: ClassVar[int] = 1
    config: DiffusionConfig

    @property
    def mask(self) -> int:
        """The id of the token that stands for a hidden one."""
        return self.config.vocab_size

    def forward(self, tokens_BS: Tensor, cache: Any = None) -> Tensor:
        """Return the logits of the token at each position, [B, S, V]. Raises ValueError past the context, and for a cache."""
        if cache is not None:
            raise ValueError("each position sees those after it, so nothing of the earlier ones can be kept")
        return self.de_embedding_proj(self.hidden(tokens_BS))

    def check_context(self, positions: int) -> None:
        """Raise ValueError for more positions than the model was built for: the first token and max_seq_len predicted ones."""
        if positions > self.config.max_seq_len + 1:
            raise ValueError(
                f"{positions} positions, but this model reads max_seq_len + 1 = {self.config.max_seq_len + 1}"
            )

    def loss(self, tokens_BS: Tensor, noise: object = None) -> Loss:
        """Return an estimate of the bound of -ln p of all but the first tokens, by one draw of hidden tokens for each row."""
        where_BS, weights_B = self._hide(tokens_BS, noise)
        return self._paid(self.hidden(tokens_BS.masked_fill(where_BS, self.mask)), tokens_BS, where_BS, weights_B)

    @torch.compiler.disable  # random numbers come from generators that a compiled graph does not know
    def _hide(self, tokens_BS: Tensor, noise: object) -> Hidden:
        if not isinstance(noise, Noise):
            raise ValueError("the loss of masked diffusion is random: it needs the noise that hides tokens")
        asked_BS = torch.ones_like(tokens_BS, dtype=torch.bool)
        asked_BS[:, 0] = False
        if self.config.masking == "by_time":
            return hide_by_time(asked_BS, noise, self.config.masking_least)
        return hide_exactly(asked_BS, noise)

    @torch.compiler.disable  # the number of hidden tokens changes from step to step, and each would be compiled anew
    def _paid(self, hidden_BSH: Tensor, tokens_BS: Tensor, where_BS: Tensor, weights_B: Tensor) -> Loss:
        shares_B = weights_B.to(torch.promote_types(hidden_BSH.dtype, torch.float32))
        shares_P = shares_B[:, None].expand_as(where_BS)[where_BS]
        weight_VH = self.de_embedding_proj.weight
        nats = linear_cross_entropy(hidden_BSH[where_BS], weight_VH, tokens_BS[where_BS], shares_P)
        return Loss(nats, tokens_BS[:, 1:].numel())

    def logits_at(self, tokens_BT: Tensor, where_BT: Tensor) -> Tensor:
        """Return the logits at some positions, [P, V]; PADDING is seen by no other position."""
        return self.de_embedding_proj(self._seen(tokens_BT)[where_BT])

    def nats_at(self, tokens_BT: Tensor, where_BT: Tensor, targets_P: Tensor) -> tuple[Tensor, Tensor]:
        """Return -ln p of the tokens at some positions, and whether they are the likeliest, [P]."""
        return linear_predictions(self._seen(tokens_BT)[where_BT], self.de_embedding_proj.weight, targets_P)

    def _seen(self, tokens_BT: Tensor) -> Tensor:
        seen_BT = tokens_BT != PADDING
        mask = None if seen_BT.all() else seen_BT[:, None, None, :]
        return self.hidden(tokens_BT.clamp(min=0), mask=mask)

    def predictions(self, tokens_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Return exact -ln p of each token but the first, from left to right, and whether it is the likeliest, [B, T]."""
        asked_BS = torch.ones_like(tokens_BS, dtype=torch.bool)
        asked_BS[:, 0] = False
        nats_BS, likeliest_BS = nats_along(self, tokens_BS, asked_BS, left_to_right(asked_BS))
        return nats_BS[:, 1:], likeliest_BS[:, 1:]

    @torch.no_grad()
    def score(self, pieces: Sequence[Piece], *, draws: int = 1, noise: object = None) -> Score:
        """Return a bound of -ln p of the pieces, the mean of `draws`, or for 0 draws exact nats from left to right.

        Exact ones compute a row for each scored token. Padding is hidden from the attention, so it changes no score. Raises
        ValueError for a piece whose first token is scored, and for a bound without noise.
        """
        device = self.de_embedding_proj.weight.device
        if wrong := [piece for piece in pieces if not 0 <= piece.scored < len(piece.tokens)]:
            raise ValueError(f"{wrong[0].scored} scored tokens of {len(wrong[0].tokens)}: the first one is given")
        tokens_NS = pad_sequence([piece.tokens for piece in pieces], True, PADDING).to(device)
        ends_N1 = torch.tensor([[len(piece.tokens)] for piece in pieces], device=device)
        scored_N1 = torch.tensor([[piece.scored] for piece in pieces], device=device)
        places_S = torch.arange(tokens_NS.shape[1], device=device)
        asked_NS = (places_S < ends_N1) & (places_S >= ends_N1 - scored_N1)
        if draws == 0:
            nats_NS, likeliest_NS = nats_along(self, tokens_NS, asked_NS, left_to_right(asked_NS))
            error_N, likeliest_N = torch.zeros(len(pieces)), (likeliest_NS | ~asked_NS).all(-1)
        else:
            if not isinstance(noise, Noise):
                raise ValueError("a bound is random: it needs noise; draws=0 gives exact nats")
            nats_NS, sums_DN = bound(self, tokens_NS, asked_NS, noise, draws)
            error_N, likeliest_N = sums_DN.std(0) / math.sqrt(draws) if draws > 1 else sums_DN[0] * math.nan, None
        nats = [nats_S[asked_S] for nats_S, asked_S in zip(nats_NS, asked_NS)]
        return Score(nats, error_N, draws, exact=draws == 0, likeliest=likeliest_N)

    def without_noise(self, tokens_BS: Tensor) -> Tensor:
        """Run the blocks on what a decoder reads of a row, with nothing hidden (noise level 0); returns [B, T, H].

        Captures keep the activations of this pass: they do not depend on chance, and are aligned with those of a decoder.
        """
        return self.hidden(tokens_BS[:, :-1])

    def hide(self, tokens_BT: Tensor, share: float, noise: Noise) -> Tensor:
        """Return the tokens with a share of those after the first hidden, to the nearest whole number."""
        length = tokens_BT.shape[1] - 1
        ranks_BT = pad(torch.stack(noise.permutations([length] * len(tokens_BT))), (1, 0), value=length)
        return tokens_BT.masked_fill(ranks_BT < round(share * length), self.mask)

    def new_cache(self) -> None:  # type: ignore[override]
        """Return None: nothing can be kept of earlier positions, which see the later ones."""

    @torch.no_grad()
    def generate(self, prompt_BT: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        """Return the prompt and up to `max_new_tokens` further tokens; options as in `infill`.

        What follows the end of a text is filled with `eos`, and what all rows have after their end is left out.
        """
        self._check(prompt_BT, max_new_tokens, **options)
        length = prompt_BT.shape[1]
        masks_BT = prompt_BT.new_full((len(prompt_BT), max_new_tokens), self.mask)
        tokens_BT = self.infill(torch.cat((prompt_BT, masks_BT), 1), **options)
        ends = _ends(options.get("eos"))
        if not ends:
            return tokens_BT
        ended_BT = torch.isin(tokens_BT, torch.tensor(ends, device=tokens_BT.device))
        ended_BT[:, :length] = False
        after_BT = ended_BT.cumsum(-1) - ended_BT.long() > 0
        return tokens_BT.masked_fill(after_BT, ends[0])[:, : int((~after_BT).sum(-1).max())]

    @torch.no_grad()
    def infill(
        self, tokens_BT: Tensor, *, eos: int | Sequence[int] | None = None, use_cache: bool = True, **options: Any
    ) -> Tensor:
        """Return the tokens with a token in place of each `mask`, [B, T]; options as in `masked.fill`.

        use_cache: accepted as by other models; there is no cache. Raises ValueError where the first token is a mask.
        """
        self._check(tokens_BT, 0, **options)
        if (tokens_BT[:, :1] == self.mask).any():
            raise ValueError("the first token is given, never filled in: put the end-of-text token there")
        return fill(self, tokens_BT, ends=_ends(eos), **options)

    def _check(
        self, tokens_BT: Tensor, new: int, temperature: float = 0.0, top_k: Any = None, top_p: Any = None, **others: Any
    ) -> None:
        check(tokens_BT, new, self.config.max_seq_len + 1, temperature, top_k, top_p)

    def flops_per_token(self, length: int) -> int:
        """Floating-point operations of one training step per predicted token of rows of `length` of them.

        As for a decoder, but all length + 1 positions are computed with all keys, and the logits of half of them.
        """
        weights = {name: p.numel() for name, p in self.named_parameters() if p.ndim == 2}
        unembedding = weights.pop("de_embedding_proj.weight")
        body = sum(weights.values()) - weights["embedding_proj.weight"]
        attention = 2 * self.config.n_layers * self.config.d_model * (length + 1)
        return 6 * (2 * body + 2 * attention + unembedding) * (length + 1) // (2 * length)

    def anatomy(self) -> Anatomy:
        """Return what the parts of this model are called, and how heads are cut from them."""
        note = "attention sees both sides, and activations are those of rows in which nothing is hidden"
        return replace(super().anatomy(), notes=(note,))

    def hf_config(self) -> dict[str, Any]:
        """The content of config.json beside the weights, with which transformers builds this model (see hf_diffusion.py)."""
        return {
            **super().hf_config(),
            "architectures": ["PicoDiffusionHF"],
            "auto_map": {
                "AutoConfig": "pico_diffusion.PicoDiffusionHFConfig",
                "AutoModelForMaskedLM": "pico_diffusion.PicoDiffusionHF",
            },
            "mask_token_id": self.mask,
            "use_cache": False,
        }

    @staticmethod
    def modelling_files() -> dict[str, str]:
        """The Python files that make a checkpoint load without this package: name to content."""
        names = {"pico_diffusion.py": "hf_diffusion.py"} | {
            name: name for name in (*TRAVELLING, "diffusion.py", "masked.py")
        }
        return {name: Path(__file__).with_name(source).read_text(encoding="utf-8") for name, source in names.items()}


def _ends(eos: int | Sequence[int] | None) -> list[int]:
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
