"""The Pico decoder: a causal language model of the Llama family, as published by the Pico project.

RMSNorm before each part, rotary positions on interleaved pairs, grouped-query attention, SwiGLU, no biases, untied
embeddings. The names of its parameters are those of the published checkpoints.

Legend: B rows, T positions, S = T + 1 (inputs and the targets shifted by one), H model width, V vocabulary.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .anatomy import Anatomy, Part, count
from .generate import KeyValueCache
from .layers import Block, Cache, RMSNorm, draw_matrix, rotations
from .loss import LinearNextToken

TRAVELLING = (
    "anatomy.py",
    "attention.py",
    "decoder.py",
    "generate.py",
    "layers.py",
    "loss.py",
    "objective.py",
    "wrapping.py",
)  # with every checkpoint, beside hf.py


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a Pico decoder. Every key of the published configurations, with its default."""

    model_type: Literal["pico_decoder"] = "pico_decoder"
    """The architecture."""

    d_model: int = 768
    """Width of the residual stream; a multiple of attention_n_heads."""

    n_layers: int = 12
    """Number of blocks (attention and SwiGLU)."""

    vocab_size: int = 50304
    """Number of different tokens; every token id in the data is below it."""

    batch_size: int = field(default=1024, metadata={"on_resume": "ignored"})
    """Accepted because published configurations have it, and used for nothing: see data.dataloader.batch_size."""

    max_seq_len: int = 2048
    """Context: the number of tokens a prediction can look back on; training rows are one token longer."""

    attention_n_heads: int = 12
    """Query heads of each block."""

    attention_n_kv_heads: int = 4
    """Key-value heads of each block; each is shared by attention_n_heads / attention_n_kv_heads query heads."""

    activation_hidden_dim: int = 3072
    """Width inside of the SwiGLU."""

    norm_eps: float = 1e-6
    """Added to the mean square in RMSNorm."""

    position_emb_theta: float = 10000.0
    """Base of the rotary position embedding: the slowest pair turns by about 1 / theta per position."""

    init: Literal["normal", "torch_default"] = "normal"
    """Initial weights: `normal` (std 0.02; o_proj and w_2 smaller by sqrt(2 n_layers)), `torch_default` as published."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "use_attribute_docstrings": True}

    def problems(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """What rules between fields are broken: the fields, and what to do about them."""
        for entry in fields(self):
            value = getattr(self, entry.name)
            if not isinstance(value, str) and not 0 < value < math.inf:
                yield (entry.name,), f"{value} must be positive and finite"
        if not self._positive("d_model", "attention_n_heads"):
            return
        width, heads, kv_heads = self.d_model, self.attention_n_heads, self.attention_n_kv_heads
        unit = 2 * heads  # each head has an even size
        if width % unit:
            near = " or ".join(str(n) for n in (width // unit * unit, (width // unit + 1) * unit) if n)
            what = f"not divisible by {heads} heads" if width % heads else f"heads of odd size {width // heads}"
            yield ("d_model", "attention_n_heads"), f"{width} is {what}; rotary positions turn pairs: try {near}"
        if kv_heads > 0 and heads % kv_heads:
            divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
            yield (
                ("attention_n_heads", "attention_n_kv_heads"),
                f"{heads} query heads cannot share {kv_heads} key-value heads evenly; use one of {divisors}",
            )

    def _positive(self, *names: str) -> bool:
        return all(getattr(self, name) > 0 for name in names)


class Decoder(LinearNextToken, nn.Module):
    """Tokens to logits. Deterministic, bit for bit, from run to run on one machine."""

    Config: ClassVar[type] = DecoderConfig
    state_prefix: ClassVar[str] = "pico_decoder."
    """What stands before the name of a parameter in model.safetensors."""
    causal: ClassVar[bool] = True
    """Whether a position sees only those up to its own."""
    marks: ClassVar[int] = 0
    """Rows of the embedding beyond the vocabulary: tokens that are read and never predicted."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        if problems := list(config.problems()):
            raise ValueError("; ".join(f"{', '.join(names)}: {message}" for names, message in problems))
        self.config = config
        self.embedding_proj = nn.Embedding(config.vocab_size + self.marks, config.d_model)
        self.layers = nn.ModuleList(
            Block(
                config.d_model,
                config.attention_n_heads,
                config.attention_n_kv_heads,
                config.activation_hidden_dim,
                config.norm_eps,
                layer,
                self.causal,
            )
            for layer in range(config.n_layers)
        )
        self.output_norm = RMSNorm(config.d_model, config.norm_eps)
        self.de_embedding_proj = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(self, tokens_BT: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits of the next token at every position, [B, T, V]. Raises ValueError past the context.

        cache: keys and values of earlier positions, which `tokens_BT` continue and are added to.
        """
        return self.de_embedding_proj(self.hidden(tokens_BT, cache))

    def with_patterns(self, tokens_BT: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the logits, and the attention weights of each layer, [B, heads, T, T]: rows are positions, columns what they
        attend to.
        """
        weights: list[Tensor] = []
        return self.de_embedding_proj(self.hidden(tokens_BT, weights=weights)), weights

    def hidden(
        self,
        tokens_BT: Tensor,
        cache: Cache | None = None,
        weights: list[Tensor] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the normed residual stream that the logits are read from, [B, T, H]. Raises ValueError past the context.

        weights: a list that the attention weights of each layer are appended to. mask: see `attention`.
        """
        start = cache.get_seq_length() if cache is not None else 0
        stop = start + tokens_BT.shape[1]
        self.check_context(stop)
        x_BTH = self.embedding_proj(tokens_BT)
        rotations_TF2 = self.rotations(torch.arange(start, stop, device=x_BTH.device), x_BTH)
        for layer in self.layers:
            x_BTH = layer(x_BTH, rotations_TF2, cache, mask, weights)
        return self.output_norm(x_BTH)

    def check_context(self, positions: int) -> None:
        """Raise ValueError for more positions than the model was built for."""
        context = self.config.max_seq_len
        if positions > context:
            raise ValueError(f"{positions} positions, but the context of this model is max_seq_len = {context}")

    def rotations(self, positions_T: Tensor, like: Tensor) -> Tensor:
        """Return what rotates queries and keys at these positions, see `layers.rotations`."""
        config = self.config
        return rotations(positions_T, config.d_model // config.attention_n_heads, config.position_emb_theta, like)

    def new_cache(self) -> KeyValueCache:
        """Return a cache of keys and values that `forward` continues."""
        return KeyValueCache()

    def flops_per_token(self, length: int) -> int:
        """Floating-point operations of one training step per token of rows of `length` positions.

        Two per multiplication of a weight, and per multiplication of attention with half of the keys on average, forward;
        twice that backward. Embedding look-ups, norms and softmax are not counted (Kaplan et al. 2020, causal).
        """
        weights = sum(
            p.numel() for name, p in self.named_parameters() if p.ndim == 2 and name != "embedding_proj.weight"
        )
        attention = (
            self.config.n_layers * self.config.d_model * (length + 1)
        )  # scores and values, (length + 1) / 2 keys each
        return 6 * (weights + attention)

    def anatomy(self) -> Anatomy:
        """Return what the parts of this model are called, and how heads are cut from them."""
        size = self.config.d_model // self.config.attention_n_heads
        return replace(anatomy_of(asdict(self.config)), head_size=size)

    def parameter_roles(self) -> dict[str, str]:
        """What each parameter is to an optimizer: `matrix` (two-dimensional, inside of the blocks), `embedding`, `norm`."""
        roles = {}
        for name, parameter in self.named_parameters():
            of_matrix = "embedding" if name.endswith("embedding_proj.weight") else "matrix"
            roles[name] = of_matrix if parameter.ndim == 2 else "norm"
        return roles

    @torch.no_grad()
    def init_parameters(self, generator: torch.Generator) -> None:
        """Set every parameter, in the order of `named_parameters`, with random numbers of `generator` alone.

        They are drawn on the generator's device: a CPU generator gives the same model on every accelerator.
        """
        for name, parameter in self.named_parameters():
            values = torch.ones(parameter.shape, device=generator.device)
            if parameter.ndim == 2:
                draw_matrix(name, values, self.config.init, 2 * self.config.n_layers, generator)
            parameter.copy_(values)

    def hf_config(self) -> dict[str, Any]:
        """The content of config.json beside the weights, with which transformers builds this model (see hf.py)."""
        return {
            **asdict(self.config),
            "architectures": ["PicoDecoderHF"],
            "auto_map": {
                "AutoConfig": "pico_decoder.PicoDecoderHFConfig",
                "AutoModelForCausalLM": "pico_decoder.PicoDecoderHF",
            },
            "dtype": str(self.embedding_proj.weight.dtype).removeprefix("torch."),
            "tie_word_embeddings": False,
            "use_cache": True,
        }

    @staticmethod
    def modelling_files() -> dict[str, str]:
        """The Python files that make a checkpoint load without this package: name to content."""
        here = Path(__file__)
        names = {"pico_decoder.py": "hf.py"} | {name: name for name in TRAVELLING}
        return {name: here.with_name(source).read_text(encoding="utf-8") for name, source in names.items()}


PARTS = {
    "embedding": Part("embedding_proj"),
    "final_norm": Part("output_norm"),
    "unembedding": Part("de_embedding_proj"),
    "attention.norm": Part("attention_norm"),
    "attention.query": Part("attention.q_proj", "heads"),
    "attention.key": Part("attention.k_proj", "kv_heads"),
    "attention.value": Part("attention.v_proj", "kv_heads"),
    "attention.output": Part("attention.o_proj", "heads", by="columns"),
    "mlp.output": Part("swiglu.w_2"),
}
# The numbers of a model in its configuration, and in that of a model of transformers, which a step may carry as config.json.
NUMBERS = {
    "layers": ("n_layers", "num_hidden_layers"),
    "width": ("d_model", "hidden_size"),
    "heads": ("attention_n_heads", "num_attention_heads"),
    "kv_heads": ("attention_n_kv_heads", "num_key_value_heads"),
    "head_size": ("head_dim",),
}


def anatomy_of(configuration: Mapping[str, Any]) -> Anatomy:
    """Return the anatomy of a model of which a configuration is known, as far as that states it: no default takes the place of
    a number that it leaves out. Raises ValueError for what is no number.
    """
    numbers: dict[str, Any] = {}
    for number, keys in NUMBERS.items():
        stated = next((configuration[key] for key in keys if configuration.get(key) is not None), None)
        numbers[number] = count(stated, f"the configuration of the run says model.{keys[0]}")
    return Anatomy(**numbers, parts=PARTS, keys={number: f"model.{keys[0]}" for number, keys in NUMBERS.items()})
