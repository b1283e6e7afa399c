"""Architectures: the Model protocol, and the registry that finds one by its `model_type`.

A model brings its own objective, its own noise and its own generation; the loop never asks which it is.
"""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from picolm.errors import PicoError
from picolm.models.anatomy import Anatomy, Part
from picolm.models.decoder import Decoder, DecoderConfig
from picolm.models.noise import Noise
from picolm.models.objective import Likelihood, Loss, NextToken, Piece, Score
from picolm.registry import Registry

__all__ = [
    "MODELS",
    "Anatomy",
    "Decoder",
    "DecoderConfig",
    "Likelihood",
    "Loss",
    "Model",
    "ModelConfig",
    "NextToken",
    "Noise",
    "Part",
    "Piece",
    "Score",
    "find_model",
]


class ModelConfig(Protocol):
    """A frozen dataclass; the docstring under each field is its help text."""

    vocab_size: int
    max_seq_len: int

    def problems(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Return broken rules between fields: (the fields, what to do)."""
        ...


@runtime_checkable
class Model(Protocol):
    """What training, capture, scoring and generation ask of an `nn.Module`.

    `NextToken` is the objective of a causal language model, so that such a model writes the other methods alone.
    tokens_BS are rows of `row_length(max_seq_len)` token ids. What is random in `loss` and `score` comes from `noise`, one
    stream of numbers for each of the rows: then it is the same for any number of processes and micro-batches. The loss of a
    step is the sum of `Loss.nats` over the sum of `Loss.tokens`, over all micro-batches and processes.
    """

    Config: ClassVar[type]
    config: Any
    state_prefix: ClassVar[str]
    likelihood: ClassVar[Likelihood]

    def forward(self, tokens_BT: Tensor) -> Tensor: ...

    @staticmethod
    def row_length(length: int) -> int: ...

    def loss(self, tokens_BS: Tensor, noise: Noise | None = None) -> Loss: ...

    def score(self, pieces: Sequence[Piece], *, draws: int = 1, noise: Noise | None = None) -> Score: ...

    def generate(self, prompt_BT: Tensor, max_new_tokens: int, **options: Any) -> Tensor: ...

    def new_cache(self) -> Any: ...

    def anatomy(self) -> Anatomy: ...

    def flops_per_token(self, length: int) -> int: ...

    def parameter_roles(self) -> dict[str, str]: ...

    def init_parameters(self, generator: torch.Generator) -> None: ...

    def hf_config(self) -> dict[str, Any]: ...

    def modelling_files(self) -> dict[str, str]: ...


MODELS: Registry[type[Any]] = Registry("model")  # classes that follow `Model`; Any, since they are nn.Modules too
MODELS.add("pico_decoder")(Decoder)

_OBJECTIVE = ("likelihood", "row_length", "loss", "score", "generate", "new_cache")


def find_model(name: str) -> type[Any]:
    """Return the architecture called `name`. Raises PicoError for one that there is not, or that lacks its objective."""
    found = MODELS.get(name)
    if missing := [attribute for attribute in _OBJECTIVE if not hasattr(found, attribute)]:
        raise PicoError(
            f"model.model_type: {name} has no {', '.join(missing)}. A model that predicts the next token inherits them from "
            "picolm.models.NextToken; any other says itself what its loss means (docs/tutorials/model.md)"
        )
    return found
