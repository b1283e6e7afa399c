"""A Pico decoder without MLPs: blocks of attention alone, the models in which Elhage et al. (2021) found induction heads.

model: {model_type: "attention_only:AttentionOnly", n_layers: 3, ...}
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from picolm.models import Anatomy, Decoder, DecoderConfig


@dataclass(frozen=True)
class AttentionOnlyConfig(DecoderConfig):
    """The shape of the model; the width of the MLP is that of none."""

    model_type: str = "attention_only:AttentionOnly"  # type: ignore[assignment]


class AttentionBlock(nn.Module):
    """x + attention(norm(x))."""

    def __init__(self, block: Any):
        super().__init__()
        self.attention, self.attention_norm = block.attention, block.attention_norm

    def forward(self, x_BTH: Tensor, rotations_TF2: Tensor, *options: Any) -> Tensor:
        return x_BTH + self.attention(self.attention_norm(x_BTH), rotations_TF2, *options)


class AttentionOnly(Decoder):
    """Tokens to logits by attention alone."""

    Config: ClassVar[type] = AttentionOnlyConfig

    def __init__(self, config: DecoderConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(map(AttentionBlock, self.layers))

    def anatomy(self) -> Anatomy:
        """Return the anatomy of the decoder, without an MLP."""
        whole = super().anatomy()
        return replace(whole, parts={role: part for role, part in whole.parts.items() if not role.startswith("mlp.")})

    @staticmethod
    def modelling_files() -> dict[str, str]:
        """No Python file travels with a checkpoint: it loads where this file is."""
        return {}

    def hf_config(self) -> dict[str, Any]:
        """Return config.json without the names of classes of transformers, which would build MLPs."""
        return {key: value for key, value in super().hf_config().items() if key not in ("architectures", "auto_map")}
