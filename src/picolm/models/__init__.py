"""Architectures: the Model protocol, and the registry that finds one by its `model_type`.

A model brings its own objective, its own noise and its own generation; the loop never asks which it is.
"""

from collections.abc import Iterator
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from picolm.models.decoder import Decoder, DecoderConfig, Loss
from picolm.models.noise import Noise
from picolm.registry import Registry

__all__ = ["MODELS", "Decoder", "DecoderConfig", "Loss", "Model", "ModelConfig", "Noise"]


class ModelConfig(Protocol):
    """A frozen dataclass; the docstring under each field is its help text."""

    vocab_size: int
    max_seq_len: int

    def problems(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Broken rules between fields: (the fields, what to do)."""
        ...


@runtime_checkable
class Model(Protocol):
    """What training, capture and generation ask of an `nn.Module` (its other methods are those of `Decoder`).

    tokens_BS are rows of S = T + 1 token ids, inputs and shifted targets in one. What is random in `loss` comes from `noise`,
    one stream of numbers for each of the rows: then it is the same for any number of processes and micro-batches.
    The loss of a step is the sum of `Loss.nats` over the sum of `Loss.tokens`, over all micro-batches and processes.
    `token_nats` has the terms of `loss`, with zeros where nothing is predicted, or a term for each token that it scores.
    """

    Config: ClassVar[type]
    state_prefix: ClassVar[str]
    config: Any

    def forward(self, tokens_BT: Tensor) -> Tensor: ...

    def loss(self, tokens_BS: Tensor, noise: Noise | None = None) -> Loss: ...

    def token_nats(self, tokens_BS: Tensor) -> Tensor: ...

    def flops_per_token(self, length: int) -> int: ...

    def parameter_roles(self) -> dict[str, str]: ...

    def init_parameters(self, generator: torch.Generator) -> None: ...

    def generate(self, prompt_BT: Tensor, max_new_tokens: int, **options: Any) -> Tensor: ...

    def hf_config(self) -> dict[str, Any]: ...

    def modelling_files(self) -> dict[str, str]: ...


MODELS: Registry[type[Any]] = Registry("model")  # classes that follow `Model`; Any, since they are nn.Modules too
MODELS.add("pico_decoder")(Decoder)
