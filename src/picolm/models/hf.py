"""The Pico decoder for transformers (4.57 and 5): the only file of the models that imports it.

A copy of it travels with every checkpoint as pico_decoder.py, together with the files it imports from, so that
`AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)` needs nothing of this package. What `forward` takes
and returns is what LlamaForCausalLM takes and returns.

Legend: B rows, T positions of queries, K positions of keys (those of the cache and the T new ones), V vocabulary,
H model width, N query heads.
"""

from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

# transformers 4 copies, of a local checkpoint, only the modules that this very file names.
from .anatomy import Anatomy  # noqa: F401
from .attention import causal_mask
from .decoder import Decoder, DecoderConfig
from .generate import generate  # noqa: F401
from .layers import Block  # noqa: F401
from .loss import linear_cross_entropy  # noqa: F401
from .objective import Loss  # noqa: F401
from .wrapping import Embeddings, check_others, own_config, take_fields

# transformers renamed past_key_values to cache in 5.24; `forward` takes both names.
CACHE = next(field.name for field in fields(CausalLMOutputWithPast) if field.name in ("cache", "past_key_values"))


class PicoDecoderHFConfig(PretrainedConfig):
    """The fields of `DecoderConfig`, also under the names that tools around transformers ask for."""

    model_type = "pico_decoder"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "attention_n_heads",
        "num_key_value_heads": "attention_n_kv_heads",
        "intermediate_size": "activation_hidden_dim",
        "max_position_embeddings": "max_seq_len",
        "rms_norm_eps": "norm_eps",
        "rope_theta": "position_emb_theta",
    }

    def __init__(self, use_cache: bool = True, tie_word_embeddings: bool = False, **options: Any):
        take_fields(self, DecoderConfig, options)
        super().__init__(**options)
        self.use_cache = use_cache
        self.tie_word_embeddings = tie_word_embeddings  # after super(), which in transformers 4 makes it True

    def decoder_config(self) -> DecoderConfig:
        return own_config(self, DecoderConfig)


class PicoDecoderHF(Embeddings, PreTrainedModel, GenerationMixin):
    """A `Decoder` behind the interface of transformers' causal language models."""

    config_class = PicoDecoderHFConfig
    base_model_prefix = "pico_decoder"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: PicoDecoderHFConfig):
        super().__init__(config)
        self.pico_decoder = Decoder(config.decoder_config())
        self.gradient_checkpointing = False
        self.loss_type = "ForCausalLM"  # transformers guesses it from the name of the class
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Any = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Compute what a LlamaForCausalLM computes from these arguments.

        attention_mask: [B, K], 0 at padding, or [B, 1 or N, T, K], boolean (True: visible) or added to the scores.
        position_ids: [B or 1, T]. Without a cache and a mask, a jump in them begins another document of a packed row, which
            sees nothing of those before it.
        cache, past_key_values: two names of one argument, any cache of transformers that keeps every position.
        labels: the tokens again, -100 where none is predicted; `shift_labels`: those of the next position. The loss is
            their mean in nats, or their sum / num_items_in_batch.

        Raises TypeError for an argument that is not among these and is neither None nor False, and ValueError for values
        that do not fit together or lie outside of the context.
        """
        shift_labels = others.pop(
            "shift_labels", None
        )  # as a parameter it would be one that Trainer asks every row for
        others.pop("cache_position", None)  # of transformers before 5.24; it follows from the cache
        check_others(others, type(self).__name__)
        x_BTH, layers = self._inputs(input_ids, inputs_embeds, same(cache, past_key_values), use_cache)
        mask = _mask(attention_mask, position_ids, x_BTH, layers)
        positions = self._positions(position_ids, x_BTH, layers)
        states: list[Tensor] | None = [] if asked(output_hidden_states, self.config, "output_hidden_states") else None
        weights: list[Tensor] | None = [] if asked(output_attentions, self.config, "output_attentions") else None
        hidden_BTH = self._blocks(x_BTH, positions, layers, mask, states, weights)
        logits_BTV = self.pico_decoder.de_embedding_proj(kept(hidden_BTH, logits_to_keep))
        loss = None
        if labels is not None:
            loss = loss_of_labels(self, logits_BTV, x_BTH.shape[1], labels, num_items_in_batch, shift_labels)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BTV,
            hidden_states=None if states is None else (*states, hidden_BTH),
            attentions=None if weights is None else tuple(layers.padded(of_layer) for of_layer in weights),
            **{CACHE: layers.cache},
        )
        return output if asked(return_dict, self.config, "return_dict") else output.to_tuple()

    def _inputs(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, cache: Any, use_cache: bool | None
    ) -> tuple[Tensor, "_Layers"]:
        """Return the embeddings [B, T, H] and the cache that they continue."""
        if inputs_embeds is None and input_ids is not None:
            x_BTH = self.get_input_embeddings()(input_ids)
        elif input_ids is None and inputs_embeds is not None:
            x_BTH = inputs_embeds
        else:
            raise ValueError("give either input_ids or inputs_embeds")
        if cache is None and asked(use_cache, self.config, "use_cache") and not self._recomputes():
            cache = DynamicCache()
        return x_BTH, _Layers(cache, x_BTH.shape[1])

    def _positions(self, position_ids: Tensor | None, x_BTH: Tensor, layers: "_Layers") -> Tensor:
        """Return the position of each new token, [T] or [B or 1, T]. Raises ValueError for one outside of the context."""
        if position_ids is None:
            self.pico_decoder.check_context(layers.stop)
            return torch.arange(layers.start, layers.stop, device=x_BTH.device)
        check_positions(position_ids, x_BTH.shape[1])
        self.pico_decoder.check_context(int(position_ids.max()) + 1)
        return position_ids.to(x_BTH.device)

    def _blocks(
        self,
        x_BTH: Tensor,
        positions: Tensor,
        layers: "_Layers",
        mask: Tensor | None,
        states: list[Tensor] | None,
        weights: list[Tensor] | None,
    ) -> Tensor:
        """Return the normed residual stream; collect the input of each block and its attention weights where asked for."""
        rotations = self.pico_decoder.rotations(positions, x_BTH)
        cache = layers if layers.cache is not None else None
        for block in self.pico_decoder.layers:
            if states is not None:
                states.append(x_BTH)
            arguments = x_BTH, rotations, cache, mask, weights
            recompute = self._gradient_checkpointing_func if self._recomputes() else None
            x_BTH = block(*arguments) if recompute is None else recompute(block.__call__, *arguments)
        return self.pico_decoder.output_norm(x_BTH)

    def _recomputes(self) -> bool:
        """Whether the backward pass computes the blocks again (gradient checkpointing); then there is no cache."""
        return self.gradient_checkpointing and self.training


class _Layers:
    """A cache of transformers as the blocks of `Decoder` use one: the new positions are [start, stop).

    A static cache returns all of its room, and up to version 5.22 has to be told where the new positions are.
    """

    def __init__(self, cache: Any, length: int):
        if cache is not None and not (hasattr(cache, "get_seq_length") and hasattr(cache, "update")):
            raise TypeError(
                f"cache: {type(cache).__name__} is no Cache of transformers; use DynamicCache or StaticCache"
            )
        self.cache = cache
        self.start = int(cache.get_seq_length()) if cache is not None else 0
        self.stop = self.room = self.start + length

    def get_seq_length(self) -> int:
        return self.start

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Add the keys and values of the new positions; return those of all positions so far."""
        where = {"cache_position": torch.arange(self.start, self.stop, device=keys.device)}
        keys, values = self.cache.update(keys, values, layer, where)
        self.room = keys.shape[2]
        if self.room < self.stop:
            raise ValueError(f"the cache keeps {self.room} of {self.stop} positions; this model needs all of them")
        return keys[:, :, : self.stop], values[:, :, : self.stop]

    def padded(self, weights_BNTK: Tensor) -> Tensor:
        """Return attention weights for all the room of the cache: 0 where there are no keys yet."""
        return pad(weights_BNTK, (0, self.room - self.stop))


def _mask(attention_mask: Tensor | None, position_ids: Tensor | None, x_BTH: Tensor, layers: _Layers) -> Tensor | None:
    """Return what `attention` needs to know beyond that it is causal. Raises ValueError and TypeError."""
    T, K, device = x_BTH.shape[1], layers.stop, x_BTH.device
    if attention_mask is None:
        if position_ids is None or layers.cache is not None:
            return None
        documents_BT = (position_ids.diff(prepend=position_ids[:, :1] - 1) != 1).cumsum(-1).to(device)
        if not documents_BT.any():
            return None
        return causal_mask(T, K, device) & (documents_BT[:, None, :, None] == documents_BT[:, None, None, :])
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim not in (2, 4):
        raise TypeError(f"attention_mask: expected a tensor of [rows, keys] or [rows, heads, tokens, keys] ({K} keys)")
    if attention_mask.shape[-1] < K or (layers.cache is None and attention_mask.shape[-1] > K):
        raise ValueError(f"attention_mask is for {attention_mask.shape[-1]} keys; there are {K}")
    mask = attention_mask.to(device)[..., :K]
    if mask.ndim == 4:
        return _whole(mask)
    if (mask != 0).all():
        return None
    own_TK = torch.eye(K, dtype=torch.bool, device=device)[K - T :]  # padding sees itself: nothing is divided by 0
    return causal_mask(T, K, device) & (own_TK | (mask != 0)[:, None, None, :])


def _whole(mask: Tensor) -> Tensor:
    """Return a mask of [B, N, T, K] in which queries that would see nothing (padding) see every key: no NaN comes of them."""
    if mask.dtype == torch.bool:
        return mask | ~mask.any(-1, keepdim=True)
    if not mask.is_floating_point():
        raise TypeError(
            f"attention_mask of four dimensions is {mask.dtype}; expected bool (True: visible) or floats (added)"
        )
    return mask.masked_fill(mask.amax(-1, keepdim=True) == -torch.inf, 0.0)


def loss_of_labels(
    model: Any, logits_BTV: Tensor, length: int, labels: Tensor, items: Any, shift_labels: Tensor | None
) -> Any:
    """Return what transformers takes for the loss of a causal model. Raises ValueError unless all `length` logits are there."""
    if logits_BTV.shape[1] != length:
        raise ValueError("labels need the logits of all positions: leave logits_to_keep out")
    return model.loss_function(
        logits=logits_BTV,
        labels=labels,
        vocab_size=logits_BTV.shape[-1],
        num_items_in_batch=items,
        shift_labels=shift_labels,
    )


def check_positions(position_ids: Tensor, length: int) -> None:
    """Raise ValueError unless position_ids are [B or 1, length]."""
    if position_ids.ndim != 2 or position_ids.shape[1] != length:
        raise ValueError(
            f"position_ids of shape {tuple(position_ids.shape)} for {length} tokens a row; expected [rows, tokens]"
        )


def kept(hidden_BTH: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Return the positions whose logits are wanted: the last ones, those of an index, or all (0)."""
    wanted = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    return hidden_BTH[:, wanted]


def asked(argument: bool | None, config: Any, name: str) -> bool:
    """Return the argument, or where it is None what the configuration says."""
    return bool(getattr(config, name, False) if argument is None else argument)


def same(cache: Any, past_key_values: Any) -> Any:
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("cache and past_key_values are two names of one argument; give one of them")
    return past_key_values if cache is None else cache
