"""The Pico state space model for transformers (4.57 and 5), as hf.py is for the decoder.

A copy of it travels with every checkpoint as pico_statespace.py, together with the files it imports from, so that
`AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)` needs nothing of this package.

Legend: B rows, T new positions, K all positions (those of the cache and the T new ones), V vocabulary, D model width.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

# transformers 4 copies, of a local checkpoint, only the modules that this very file names.
from .anatomy import Anatomy  # noqa: F401
from .attention import attention  # noqa: F401
from .convolution import Convolution  # noqa: F401
from .decoder import Decoder  # noqa: F401
from .generate import generate  # noqa: F401
from .hf import CACHE, asked, check_positions, kept, loss_of_labels, same
from .layers import RMSNorm  # noqa: F401
from .loss import LinearNextToken  # noqa: F401
from .objective import Loss  # noqa: F401
from .ssd import scan  # noqa: F401
from .statespace import StateCache, StateSpace, StateSpaceConfig
from .wrapping import Embeddings, check_others, own_config, take_fields


class PicoStateSpaceHFConfig(PretrainedConfig):
    """The fields of `StateSpaceConfig`, also under the names that tools around transformers ask for."""

    model_type = "pico_statespace"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "max_position_embeddings": "max_seq_len",
        "layer_norm_epsilon": "norm_eps",
    }

    def __init__(self, use_cache: bool = True, tie_word_embeddings: bool = False, **options: Any):
        take_fields(self, StateSpaceConfig, options)
        super().__init__(**options)
        self.use_cache = use_cache
        self.tie_word_embeddings = tie_word_embeddings  # after super(), which in transformers 4 makes it True

    def statespace_config(self) -> StateSpaceConfig:
        return own_config(self, StateSpaceConfig)


class States(StateCache):
    """A `StateCache` with what `generate` of transformers asks of a cache. It cannot be shortened: a state is a sum."""

    is_compileable = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows of these beams."""
        self.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        if self.layers:
            rows = len(next(iter(self.layers.values()))[-1])
            self.select(torch.arange(rows).repeat_interleave(repeats))


class PicoStateSpaceHF(Embeddings, PreTrainedModel, GenerationMixin):
    """A `StateSpace` behind the interface of transformers' causal language models."""

    config_class = PicoStateSpaceHFConfig
    base_model_prefix = "pico_statespace"
    supports_gradient_checkpointing = True
    _no_split_modules = ["StateSpaceBlock"]  # noqa: RUF012
    _is_stateful = True  # so that transformers refuses what shortens a cache (assisted generation)

    def __init__(self, config: PicoStateSpaceHFConfig):
        super().__init__(config)
        self.pico_statespace = StateSpace(config.statespace_config())
        self.gradient_checkpointing = False
        self.loss_type = "ForCausalLM"  # transformers guesses it from the name of the class
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Return False: `forward` makes the cache."""
        return False

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
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Compute logits, and the loss where there are labels.

        attention_mask: [B, K], 0 at padding before or after the tokens of a row.
        position_ids: [B or 1, T]. Without a cache and a mask, a jump in them begins another document of a packed row, which
            sees nothing of those before it. Otherwise they change nothing: the model has no embedding of positions.
        cache, past_key_values: two names of one argument: what an earlier call returned under this name, which is changed.
        labels: the tokens again, -100 where none is predicted; `shift_labels`: those of the next position. The loss is
            their mean in nats, or their sum / num_items_in_batch.

        Raises TypeError for an argument that is not among these and is neither None nor False, and ValueError for values
        that do not fit together.
        """
        shift_labels = others.pop("shift_labels", None)  # a parameter would be asked of every row by Trainer
        others.pop("cache_position", None)  # of transformers before 5.24; it follows from the cache
        check_others(others, type(self).__name__)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x_BTD = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        states = _states(
            same(cache, past_key_values), asked(use_cache, self.config, "use_cache") and not self._recomputes()
        )
        mask_BT = _mask(attention_mask, x_BTD, states)
        hidden: list[Tensor] | None = [] if asked(output_hidden_states, self.config, "output_hidden_states") else None
        documents = _documents(position_ids, x_BTD)
        if documents is None or attention_mask is not None or states is not None:
            hidden_BTD = self._blocks(x_BTD, states, mask_BT, hidden)
        else:
            hidden_BTD = documents.packed(self._blocks(documents.unpacked(x_BTD), None, None, hidden))
            hidden = None if hidden is None else [documents.packed(state) for state in hidden]
        logits_BTV = self.pico_statespace.de_embedding_proj(kept(hidden_BTD, logits_to_keep))
        loss = None
        if labels is not None:
            loss = loss_of_labels(self, logits_BTV, x_BTD.shape[1], labels, num_items_in_batch, shift_labels)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BTV,
            hidden_states=None if hidden is None else (*hidden, hidden_BTD),
            **{CACHE: states},
        )
        return output if asked(return_dict, self.config, "return_dict") else output.to_tuple()

    def _blocks(
        self, x_BTD: Tensor, states: States | None, mask_BT: Tensor | None, hidden: list[Tensor] | None
    ) -> Tensor:
        """Return the normed residual stream; collect the input of each block where asked for."""
        for block in self.pico_statespace.layers:
            if hidden is not None:
                hidden.append(x_BTD)
            recompute = self._gradient_checkpointing_func if self._recomputes() else None
            arguments = x_BTD, states, mask_BT
            x_BTD = block(*arguments) if recompute is None else recompute(block.__call__, *arguments)
        if states is not None:
            states.length += x_BTD.shape[1]
        return self.pico_statespace.output_norm(x_BTD)

    def _recomputes(self) -> bool:
        """Whether the backward pass computes the blocks again (gradient checkpointing); then there is no cache."""
        return self.gradient_checkpointing and self.training


def _states(cache: Any, wanted: bool) -> Any:
    """Return the cache to continue, or a new one if it is wanted. Raises TypeError for one of another kind."""
    if cache is None:
        return States() if wanted else None
    if not isinstance(cache, States):
        raise TypeError(
            f"cache: {type(cache).__name__} keeps no states; leave it out, and continue the one that is returned"
        )
    return cache


def _mask(attention_mask: Tensor | None, x_BTD: Tensor, states: States | None) -> Tensor | None:
    """Return which of the new positions are no padding, [B, T]; None where all are. Raises ValueError and TypeError."""
    if attention_mask is None:
        return None
    new = x_BTD.shape[1]
    positions = new + (states.length if states is not None else 0)
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        raise TypeError(f"attention_mask: expected a tensor of [rows, positions] ({positions} positions)")
    if attention_mask.shape[1] != positions:
        raise ValueError(f"attention_mask is for {attention_mask.shape[1]} positions; there are {positions}")
    mask_BK = attention_mask.to(x_BTD.device) != 0
    if (mask_BK.int().diff(dim=1) > 0).sum(1).add(mask_BK[:, 0]).gt(1).any():
        raise ValueError("attention_mask: padding between the tokens of a row; put it before or after all of them")
    return None if mask_BK.all() else mask_BK[:, -new:]


class _Documents:
    """Packed rows of several documents, and the same documents in rows of their own, padded on the right."""

    def __init__(self, starts_BT: Tensor):
        self._shape = starts_BT.shape
        self._lengths = torch.diff(
            starts_BT.flatten().nonzero()[:, 0].cpu(), append=torch.tensor([starts_BT.numel()])
        ).tolist()

    def unpacked(self, x_BTD: Tensor) -> Tensor:
        """Return the documents of all rows, [documents, most positions, D]."""
        return pad_sequence(list(x_BTD.flatten(0, 1).split(self._lengths)), batch_first=True)

    def packed(self, x_NTD: Tensor) -> Tensor:
        """Undo `unpacked`."""
        parts = [x_TD[:length] for x_TD, length in zip(x_NTD, self._lengths)]
        return torch.cat(parts).unflatten(0, self._shape)


def _documents(position_ids: Tensor | None, x_BTD: Tensor) -> _Documents | None:
    """Return the documents of packed rows: each begins where `position_ids` jump. None where no row has several."""
    if position_ids is None:
        return None
    check_positions(position_ids, x_BTD.shape[1])
    starts_BT = (position_ids.diff(prepend=position_ids[:, :1] - 2) != 1).expand(len(x_BTD), -1).to(x_BTD.device)
    return _Documents(starts_BT) if starts_BT[:, 1:].any() else None
