"""Masked diffusion for transformers (4.57 and 5), as a model that predicts masked tokens at their own positions.

A copy of it travels with every checkpoint as pico_diffusion.py, together with the files it imports from, so that
`AutoModelForMaskedLM.from_pretrained(checkpoint, trust_remote_code=True)` needs nothing of this package. What `forward` takes and
returns is what BertForMaskedLM takes and returns.

Legend: B rows, T positions, N query heads, V vocabulary, H model width.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

# transformers 4 copies, of a local checkpoint, only the modules that this very file names.
from .anatomy import Anatomy  # noqa: F401
from .attention import attention  # noqa: F401
from .decoder import Decoder  # noqa: F401
from .diffusion import Diffusion, DiffusionConfig
from .generate import generate  # noqa: F401
from .layers import Block  # noqa: F401
from .loss import linear_cross_entropy  # noqa: F401
from .masked import fill  # noqa: F401
from .objective import Loss  # noqa: F401
from .wrapping import Embeddings, check_others, own_config, take_fields


class PicoDiffusionHFConfig(PretrainedConfig):
    """The fields of `DiffusionConfig`, also under the names that tools around transformers ask for."""

    model_type = "pico_diffusion"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "attention_n_heads",
        "num_key_value_heads": "attention_n_kv_heads",
        "intermediate_size": "activation_hidden_dim",
        "rms_norm_eps": "norm_eps",
        "rope_theta": "position_emb_theta",
    }

    def __init__(self, tie_word_embeddings: bool = False, mask_token_id: int | None = None, **options: Any):
        take_fields(self, DiffusionConfig, options)
        self.mask_token_id = self.vocab_size if mask_token_id is None else mask_token_id
        self.max_position_embeddings = self.max_seq_len + 1  # the given first token and the predicted ones
        options.pop("max_position_embeddings", None)
        super().__init__(**options)
        self.tie_word_embeddings = tie_word_embeddings  # set last: transformers 4 ties them

    def diffusion_config(self) -> DiffusionConfig:
        return own_config(self, DiffusionConfig)


class PicoDiffusionHF(Embeddings, PreTrainedModel):
    """A `Diffusion` behind the interface of transformers' masked language models. The mask is `config.mask_token_id`."""

    config_class = PicoDiffusionHFConfig
    base_model_prefix = "pico_diffusion"
    _no_split_modules = ["Block"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: PicoDiffusionHFConfig):
        super().__init__(config)
        self.pico_diffusion = Diffusion(config.diffusion_config())
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> MaskedLMOutput | tuple[Any, ...]:
        """Compute logits of the token at each position, [B, T, V].

        attention_mask: [B, T], 0 at padding. labels: the tokens at masked positions, -100 at all others: nothing is shifted, and
        the loss is their mean in nats. Raises TypeError for an argument that is not among these and is neither None nor False,
        and ValueError past the context.
        """
        check_others(others, type(self).__name__)
        weights: list[Tensor] | None = [] if output_attentions else None
        mask = _visible(attention_mask, input_ids)
        hidden_BTH = self.pico_diffusion.hidden(input_ids, weights=weights, mask=mask)
        logits_BTV = self.pico_diffusion.de_embedding_proj(hidden_BTH)
        loss = None
        if labels is not None:
            exact = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
            loss = cross_entropy(exact.flatten(0, 1), labels.to(exact.device).flatten(), ignore_index=-100)
        attentions = None if weights is None else tuple(weights)
        output = MaskedLMOutput(loss=loss, logits=logits_BTV, attentions=attentions)
        return output.to_tuple() if return_dict is False else output

    def generate(self, input_ids: Tensor, max_new_tokens: int = 20, **options: Any) -> Tensor:
        """Return the prompt and further tokens; options as in `masked.fill` (steps, block_length, order, temperature, …)."""
        return self.pico_diffusion.generate(input_ids, max_new_tokens, **options)

    def infill(self, input_ids: Tensor, **options: Any) -> Tensor:
        """Return the tokens with a token in place of each mask; options as in `masked.fill`."""
        return self.pico_diffusion.infill(input_ids, **options)


def _visible(attention_mask: Tensor | None, input_ids: Tensor) -> Tensor | None:
    """Return which keys each position sees, [B, 1, 1, T]; None for all. A row of padding alone sees itself: no NaN."""
    if attention_mask is None:
        return None
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)} for tokens of {tuple(input_ids.shape)}; expected the same"
        )
    seen_BT = attention_mask.to(input_ids.device) != 0
    if seen_BT.all():
        return None
    return (seen_BT | ~seen_BT.any(-1, keepdim=True))[:, None, None, :]
