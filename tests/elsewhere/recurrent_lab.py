"""A recurrent model as a user writes it: its state after the tokens so far is all that it keeps of them.

Legend: B rows, T positions, H width, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from picolm.models import Anatomy, NextToken, Part


@dataclass(frozen=True)
class RecurrentConfig:
    model_type: str = "recurrent_lab:Recurrent"
    vocab_size: int = 64
    """Number of different tokens."""
    max_seq_len: int = 16
    """Tokens of a row."""
    width: int = 24
    """Numbers in the state of a block."""
    depth: int = 2
    """Number of blocks."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "use_attribute_docstrings": True}

    def problems(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if self.depth < 1:
            yield ("depth",), f"{self.depth} should be at least 1"


class Block(nn.Module):
    """h_t = (1 - z_t) h_{t-1} + z_t tanh(W x_t), a minimal gated recurrence whose gate z_t is a function of x_t."""

    def __init__(self, width: int):
        super().__init__()
        self.gate, self.candidate, self.out = (nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(self, x_BTH: Tensor, state_BH: Tensor) -> Tensor:
        gates_BTH, candidates_BTH, states = self.gate(x_BTH).sigmoid(), self.candidate(x_BTH).tanh(), []
        for gate_BH, candidate_BH in zip(gates_BTH.unbind(1), candidates_BTH.unbind(1)):
            state_BH = torch.lerp(state_BH, candidate_BH, gate_BH)
            states.append(state_BH)
        return torch.stack(states, 1)


class Recurrent(NextToken, nn.Module):
    """Tokens to logits through blocks whose state is carried from token to token."""

    Config: ClassVar[type] = RecurrentConfig
    state_prefix: ClassVar[str] = ""

    def __init__(self, config: RecurrentConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config.width) for _ in range(config.depth))
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)

    def new_cache(self) -> dict[int, Tensor]:
        """The state of each block after the tokens so far."""
        return {}

    def forward(self, tokens_BT: Tensor, cache: dict[int, Tensor] | None = None) -> Tensor:
        x_BTH = self.embedding(tokens_BT)
        kept = cache if cache is not None else {}
        for number, block in enumerate(self.blocks):
            states_BTH = block(x_BTH, kept.get(number, torch.zeros_like(x_BTH[:, 0])))
            kept[number] = states_BTH[:, -1]
            x_BTH = x_BTH + block.out(states_BTH)
        return self.head(x_BTH)

    def anatomy(self) -> Anatomy:
        parts = {"embedding": Part("embedding"), "mlp.output": Part("out")}
        return Anatomy(layers=self.config.depth, width=self.config.width, block="blocks.{}", parts=parts)

    def flops_per_token(self, length: int) -> int:
        return 6 * sum(p.numel() for p in self.parameters())

    def parameter_roles(self) -> dict[str, str]:
        return {name: "matrix" if name.startswith("blocks") else "embedding" for name, _ in self.named_parameters()}

    @torch.no_grad()
    def init_parameters(self, generator: torch.Generator) -> None:
        for parameter in self.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)

    def hf_config(self) -> dict[str, Any]:
        return asdict(self.config)

    def modelling_files(self) -> dict[str, str]:
        return {}
