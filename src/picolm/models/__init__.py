"""Architectures: the Model protocol, and the registry that finds a model class by its `model_type`.

A model defines its own objective, noise and generation, so the training loop does not depend on the architecture.
"""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from picolm.errors import PicoError
from picolm.models.anatomy import Anatomy, Part
from picolm.models.decoder import Decoder, DecoderConfig
from picolm.models.diffusion import Diffusion, DiffusionConfig
from picolm.models.objective import Likelihood, Loss, NextToken, Noise, Piece, Score
from picolm.models.statespace import StateSpace, StateSpaceConfig
from picolm.registry import Registry

__all__ = [
    "MODELS",
    "Anatomy",
    "Decoder",
    "DecoderConfig",
    "Diffusion",
    "DiffusionConfig",
    "Likelihood",
    "Loss",
    "Model",
    "ModelConfig",
    "NextToken",
    "Noise",
    "Part",
    "Piece",
    "Score",
    "StateSpace",
    "StateSpaceConfig",
    "anatomy_of",
    "block_count",
    "describe",
    "find_model",
]


class ModelConfig(Protocol):
    """A frozen dataclass with the fields of the `model:` section; the docstring under each field is its help text."""

    vocab_size: int
    max_seq_len: int

    def problems(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Yield each broken rule between fields: (names of the fields, what to change)."""
        ...


def block_count(config: Any) -> tuple[str, int] | None:
    """Return the key of a model's configuration that says how many blocks it has, and its value; None if none does.

    It is needed before the model is built: a typing error may ask for more blocks than can be. A configuration names the
    key in its class variable `blocks_key`; without one, the key is `n_layers`, if there is one.
    """
    key = getattr(type(config), "blocks_key", "n_layers")
    number = getattr(config, key, None)
    return (key, number) if isinstance(number, int) else None


def anatomy_of(model: Any) -> Anatomy:
    """Return the anatomy of a model (the roles of its modules); an empty one if the model does not define it."""
    found: Anatomy = model.anatomy() if hasattr(model, "anatomy") else Anatomy()
    return found


def describe(model: Any) -> dict[str, Any]:
    """Return what a card says of a model: the numbers of its anatomy that it states, and its count of parameters.

    A model that has more to say, or other things, defines `describe()` itself.
    """
    if hasattr(model, "describe"):
        return dict(model.describe())
    anatomy = anatomy_of(model)
    numbers = {name: getattr(anatomy, name) for name in ("layers", "width", "heads", "kv_heads", "head_size")}
    stated = {name.replace("_", " "): number for name, number in numbers.items() if number is not None}
    return stated | {"vocabulary": model.config.vocab_size, "parameters": sum(p.numel() for p in model.parameters())}


@runtime_checkable
class Model(Protocol):
    """The methods that an `nn.Module` needs for training, capture, scoring and generation.

    A causal language model inherits its objective from `NextToken` and implements only the other methods. tokens_BS are
    rows of `row_length(max_seq_len)` token ids. `loss` and `score` take all random numbers from `noise`, which has one
    stream of numbers per row, so the result is the same for any number of processes and micro-batches. The loss of a
    step is the sum of `Loss.nats` divided by the sum of `Loss.tokens`, over all micro-batches and processes. `score` averages a
    bound over `draws`; for 0 draws it returns exact nats, and raises NotImplementedError if there are none. A model that hides
    tokens from itself in training may have a method `without_noise(tokens_BS)`, a forward pass in which it hides none: captures
    keep the activations of this pass.
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


MODELS: Registry[type[Any]] = Registry("model")  # classes that implement `Model`; Any, since they are nn.Modules too
MODELS.add("pico_decoder")(Decoder)
MODELS.add("pico_statespace")(StateSpace)
MODELS.add("pico_diffusion")(Diffusion)

_OBJECTIVE = ("likelihood", "row_length", "loss", "score", "generate", "new_cache")


def find_model(name: str) -> type[Any]:
    """Return the model class called `name`. Raises PicoError if it does not exist or lacks methods of the objective."""
    found = MODELS.get(name)
    if missing := [attribute for attribute in _OBJECTIVE if not hasattr(found, attribute)]:
        raise PicoError(
            f"model.model_type: {name} has no {', '.join(missing)}. A model that predicts the next token inherits them from "
            "picolm.models.NextToken; any other says itself what its loss means (docs/tutorials/model.md)"
        )
    return found
