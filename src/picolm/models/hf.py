"""The Pico decoder for transformers (4.57 and 5): the only file of the models that imports it.

A copy of it travels with every checkpoint as pico_decoder.py, together with the files it imports from, so that
`AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)` needs nothing of this package.

Legend: B rows, T positions, V vocabulary.
"""

from dataclasses import asdict, fields
from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

# transformers 4 copies, of a local checkpoint, only the modules that this very file names.
from .attention import attention  # noqa: F401
from .decoder import Decoder, DecoderConfig
from .generate import generate  # noqa: F401
from .layers import Block  # noqa: F401
from .loss import linear_cross_entropy  # noqa: F401


class PicoDecoderHFConfig(PretrainedConfig):
    """The fields of `DecoderConfig`, also under the names that tools around transformers ask for."""

    model_type = "pico_decoder"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
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
        defaults = asdict(DecoderConfig())
        del defaults["model_type"]
        for name, default in defaults.items():
            setattr(self, name, options.pop(name, default))
        self.use_cache = use_cache
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(**options)

    def decoder_config(self) -> DecoderConfig:
        return DecoderConfig(**{field.name: getattr(self, field.name) for field in fields(DecoderConfig)})


class PicoDecoderHF(PreTrainedModel, GenerationMixin):
    """A `Decoder` behind the interface of transformers' causal language models."""

    config_class = PicoDecoderHFConfig
    base_model_prefix = "pico_decoder"
    _no_split_modules = ["Block"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: PicoDecoderHFConfig):
        super().__init__(config)
        self.pico_decoder = Decoder(config.decoder_config())
        self.post_init()

    def get_input_embeddings(self) -> Any:
        return self.pico_decoder.embedding_proj

    def set_input_embeddings(self, value: Any) -> None:
        self.pico_decoder.embedding_proj = value

    def get_output_embeddings(self) -> Any:
        return self.pico_decoder.de_embedding_proj

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.pico_decoder.de_embedding_proj = new_embeddings

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and with `labels` (the tokens again, -100 where none is predicted) the mean loss in nats.

        Rows are causal and positions relative, so padding on the right needs no mask, and padding on the left (zeros
        of `attention_mask`) only hides its keys.
        """
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        padding_BK = None
        if attention_mask is not None and not attention_mask.all():
            padding_BK = attention_mask == 0
        hidden_BTH = self.pico_decoder.hidden(input_ids, past_key_values, padding_BK)
        logits_BTV = self.pico_decoder.de_embedding_proj(hidden_BTH[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(
            loss=loss, logits=logits_BTV, past_key_values=past_key_values if use_cache else None
        )
