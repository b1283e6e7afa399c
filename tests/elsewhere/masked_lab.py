"""A BERT-like model as a user writes it: bidirectional, with the objective to predict tokens that were masked.

Legend: B rows, T positions, H width, N heads, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

from picolm.models import Anatomy, Loss, Noise, Part
from picolm.models.generate import choose


@dataclass(frozen=True)
class BertConfig:
    model_type: str = "masked_lab:Bert"
    vocab_size: int = 64
    """Number of different tokens; the mask is one more."""
    max_seq_len: int = 16
    """Tokens of a row."""
    hidden_size: int = 24
    """Width of the residual stream."""
    blocks: int = 2
    """Number of blocks."""
    heads: int = 4
    """Heads of each block."""
    masked: float = 0.15
    """Share of the tokens that are masked."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "use_attribute_docstrings": True}

    def problems(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if not 0 < self.masked < 1:
            yield ("masked",), f"{self.masked} should be between 0 and 1"


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.dense = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x_BTH: Tensor) -> Tensor:
        q, k, v = (
            part(x_BTH).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        return self.dense(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention, self.attention_norm = SelfAttention(width, heads), nn.LayerNorm(width)
        self.intermediate, self.output = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.output_norm = nn.LayerNorm(width)

    def forward(self, x_BTH: Tensor) -> Tensor:
        x_BTH = self.attention_norm(x_BTH + self.attention(x_BTH))
        return self.output_norm(x_BTH + self.output(gelu(self.intermediate(x_BTH))))


class Encoder(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.layer = nn.ModuleList(Block(config.hidden_size, config.heads) for _ in range(config.blocks))


class Bert(nn.Module):
    """Tokens, some of them masked, to logits of the tokens in all places."""

    Config: ClassVar[type] = BertConfig
    state_prefix: ClassVar[str] = "bert."
    likelihood: ClassVar[str] = "none"

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config, self.mask = config, config.vocab_size
        self.words = nn.Embedding(config.vocab_size + 1, config.hidden_size)
        self.positions = nn.Embedding(config.max_seq_len, config.hidden_size)
        self.encoder = Encoder(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTH = self.words(tokens_BT) + self.positions.weight[: tokens_BT.shape[1]]
        for block in self.encoder.layer:
            x_BTH = block(x_BTH)
        return self.head(x_BTH)

    @staticmethod
    def row_length(length: int) -> int:
        return length

    def loss(self, tokens_BS: Tensor, noise: Noise | None = None) -> Loss:
        assert noise is not None
        masked_BT = noise.uniform(tokens_BS.shape[1]) < self.config.masked
        logits_BTV = self(tokens_BS.masked_fill(masked_BT, self.mask))
        return Loss(cross_entropy(logits_BTV[masked_BT], tokens_BS[masked_BT], reduction="sum"), int(masked_BT.sum()))

    def score(self, pieces: Any, *, draws: int = 1, noise: Noise | None = None) -> Any:
        raise NotImplementedError("asked for a likelihood that there is not")

    @torch.no_grad()
    def generate(
        self, prompt_BT: Tensor, max_new_tokens: int, *, temperature: float = 0.0, top_k: Any = None, top_p: Any = None,
        generator: Any = None, **options: Any,
    ) -> Tensor:  # fmt: skip
        """Fill in masks after the prompt, the first one first."""
        tokens_BT = torch.nn.functional.pad(prompt_BT, (0, max_new_tokens), value=self.mask)
        for place in range(prompt_BT.shape[1], tokens_BT.shape[1]):
            tokens_BT[:, place : place + 1] = choose(self(tokens_BT)[:, place], temperature, top_k, top_p, generator)
        return tokens_BT

    def new_cache(self) -> None:
        return None

    def anatomy(self) -> Anatomy:
        heads = self.config.heads
        return Anatomy(
            layers=self.config.blocks,
            width=self.config.hidden_size,
            heads=heads,
            kv_heads=heads,
            head_size=self.config.hidden_size // heads,
            block="encoder.layer.{}",
            parts={
                "embedding": Part("words"),
                "attention.query": Part("attention.query", "heads"),
                "attention.key": Part("attention.key", "kv_heads"),
                "attention.value": Part("attention.value", "kv_heads"),
                "attention.output": Part("attention.dense", "heads", by="columns"),
                "mlp.output": Part("output"),
            },
            notes=("circuits leave the biases out",),
        )

    def flops_per_token(self, length: int) -> int:
        return 6 * sum(p.numel() for p in self.parameters() if p.ndim == 2)

    def parameter_roles(self) -> dict[str, str]:
        def role(name: str, parameter: Tensor) -> str:
            return "norm" if parameter.ndim == 1 else "matrix" if name.startswith("encoder") else "embedding"

        return {name: role(name, parameter) for name, parameter in self.named_parameters()}

    @torch.no_grad()
    def init_parameters(self, generator: torch.Generator) -> None:
        for name, parameter in self.named_parameters():
            values = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.copy_(values if parameter.ndim == 2 else torch.full_like(values, float("norm.weight" in name)))

    def hf_config(self) -> dict[str, Any]:
        return asdict(self.config)

    def modelling_files(self) -> dict[str, str]:
        return {}
