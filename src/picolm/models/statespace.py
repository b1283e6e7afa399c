"""The Pico state space model: a causal language model of Mamba-2 blocks (Dao and Gu 2024).

Each block is a gated state space layer behind an RMSNorm; there is no MLP and no embedding of positions. Of the layer, the
projections to the gate z, the values x, what is written B, what is read C, and the step dt are modules of their own, so
that each weight has a name. Mamba2ForCausalLM of transformers computes the same function (see mamba2.py).

Legend: B rows, T positions, S = T + 1 (inputs and the targets shifted by one), D model width, I = expand D inner width,
G groups, H heads, P head size (I = H P), N state size, K width of the convolution, V vocabulary.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from .anatomy import Anatomy, Part
from .convolution import Convolution
from .layers import RMSNorm, draw_matrix, to_autocast
from .loss import LinearNextToken
from .ssd import mixing, scan

TRAVELLING = (
    "anatomy.py",
    "attention.py",
    "convolution.py",
    "decoder.py",
    "generate.py",
    "hf.py",
    "layers.py",
    "loss.py",
    "objective.py",
    "ssd.py",
    "statespace.py",
    "wrapping.py",
)  # with every checkpoint, beside hf_statespace.py; the decoder's, because hf.py stands on them


@dataclass(frozen=True)
class StateSpaceConfig:
    """The shape of a Pico state space model."""

    model_type: Literal["pico_statespace"] = "pico_statespace"
    """The architecture."""

    d_model: int = 768
    """Width of the residual stream; expand * d_model is a multiple of head_dim."""

    n_layers: int = 28
    """Number of blocks."""

    vocab_size: int = 50304
    """Number of different tokens; every token id in the data is below it."""

    max_seq_len: int = 2048
    """Predicted tokens of a training row; evaluation and generation stay within it, though the model reads rows of any length."""

    state_size: int = 128
    """Numbers that each channel of a head keeps of the past (N of Mamba-2)."""

    head_dim: int = 64
    """Channels of a head; there are expand * d_model / head_dim heads."""

    expand: int = 2
    """Width inside of a block, in widths of the residual stream."""

    n_groups: int = 1
    """Groups of heads; the heads of a group write and read the state by the same vectors (B and C of Mamba-2)."""

    conv_kernel: int = 4
    """Positions that the convolution before the state space layer sees."""

    norm_eps: float = 1e-6
    """Added to the mean square in RMSNorm."""

    init: Literal["normal", "torch_default"] = "normal"
    """Initial matrices: `normal` (std 0.02; o_proj smaller by sqrt(n_layers)), or `torch_default`; the rest as in Mamba-2."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "use_attribute_docstrings": True}

    @property
    def inner(self) -> int:
        """The width inside of a block."""
        return self.expand * self.d_model

    @property
    def heads(self) -> int:
        """The number of heads of a block."""
        return self.inner // self.head_dim

    def problems(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """What rules between fields are broken: the fields, and what to do about them."""
        wrong = False
        for entry in fields(self):
            value = getattr(self, entry.name)
            if not isinstance(value, str) and not 0 < value < math.inf:
                wrong = True
                yield (entry.name,), f"{value} must be positive and finite"
        if wrong:
            return
        if self.inner % self.head_dim:
            divisors = ", ".join(str(n) for n in range(1, self.inner + 1) if self.inner % n == 0)
            yield (
                ("d_model", "expand", "head_dim"),
                f"{self.inner} channels inside of a block are not heads of {self.head_dim} channels; use one of {divisors}",
            )
        elif self.heads % self.n_groups:
            divisors = ", ".join(str(n) for n in range(1, self.heads + 1) if self.heads % n == 0)
            yield ("n_groups",), f"{self.heads} heads are not {self.n_groups} groups of one size; use one of {divisors}"


class StateCache:
    """What the blocks keep of the positions so far, of one size however many they were.

    layers: by block, the last K - 1 inputs of each convolution [B, K - 1, …], and the state [B, H, P, N].
    """

    def __init__(self) -> None:
        self.length = 0
        self.layers: dict[int, tuple[Tensor, ...]] = {}

    def get_seq_length(self, layer: int = 0) -> int:
        """Return the number of positions so far."""
        return self.length

    def select(self, rows_B: Tensor) -> None:
        """Keep these rows, in this order; a row may come several times."""
        self.layers = {
            layer: tuple(t.index_select(0, rows_B.to(t.device)) for t in kept) for layer, kept in self.layers.items()
        }


class GatedNorm(nn.Module):
    """RMSNorm of y silu(z), for each group of channels (Dao and Gu 2024)."""

    def __init__(self, width: int, groups: int, eps: float):
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        exact = torch.promote_types(y.dtype, torch.float32)
        gated = (y.to(exact) * torch.nn.functional.silu(z.to(exact))).unflatten(-1, (self.groups, -1))
        normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + self.eps)
        return to_autocast(normed.flatten(-2).to(y.dtype) * self.weight)


class Mixing(NamedTuple):
    """How the heads of a layer make outputs of values.

    matrix_BHTT: outputs are its products with the values behind the convolution; rows are positions of outputs. Its entries
    are signed and their sums are not 1: they are no weights of attention. decay_BTH: -ln of what a position leaves of the state
    before it. state_BHPN: the state after the last position.
    """

    matrix_BHTT: Tensor
    decay_BTH: Tensor
    state_BHPN: Tensor


class StateSpaceLayer(nn.Module):
    """o(norm(scan(x, dt, B, C) + D x, z)), with x, B and C behind a causal convolution."""

    def __init__(self, config: StateSpaceConfig, layer: int):
        super().__init__()
        self.heads, self.groups, self.layer = config.heads, config.n_groups, layer
        width, inner, read = config.d_model, config.inner, config.n_groups * config.state_size
        self.z_proj = nn.Linear(width, inner, bias=False)
        self.x_proj = nn.Linear(width, inner, bias=False)
        self.b_proj = nn.Linear(width, read, bias=False)
        self.c_proj = nn.Linear(width, read, bias=False)
        self.dt_proj = nn.Linear(width, config.heads, bias=False)
        self.x_conv = Convolution(inner, config.conv_kernel)
        self.b_conv = Convolution(read, config.conv_kernel)
        self.c_conv = Convolution(read, config.conv_kernel)
        self.A_log = nn.Parameter(torch.zeros(config.heads))
        self.dt_bias = nn.Parameter(torch.zeros(config.heads))
        self.D = nn.Parameter(torch.ones(config.heads))
        self.norm = GatedNorm(inner, config.n_groups, config.norm_eps)
        self.o_proj = nn.Linear(inner, width, bias=False)

    def forward(
        self,
        x_BTD: Tensor,
        cache: StateCache | None = None,
        mask_BT: Tensor | None = None,
        mixed: list[Mixing] | None = None,
    ) -> Tensor:
        """mask_BT: False at padding, which changes no state. mixed: a list that a `Mixing` is appended to."""
        inputs = [self.x_proj(x_BTD), self.b_proj(x_BTD), self.c_proj(x_BTD)]
        dt_BTH = self.steps(x_BTD)
        if mask_BT is not None:
            inputs = [t * mask_BT[..., None].to(t.dtype) for t in inputs]
            dt_BTH = dt_BTH * mask_BT[..., None]
        before = cache.layers.get(self.layer) if cache is not None else None
        windows = before[:-1] if before is not None else (None, None, None)
        convolutions = (self.x_conv, self.b_conv, self.c_conv)
        x_BTI, B, C = (conv(t, window) for conv, t, window in zip(convolutions, inputs, windows))
        x_BTHP, B, C = (
            x_BTI.unflatten(-1, (self.heads, -1)),
            B.unflatten(-1, (self.groups, -1)),
            C.unflatten(-1, (self.groups, -1)),
        )
        A_H = -self.A_log.to(dt_BTH.dtype).exp()
        y_BTHP, state = scan(x_BTHP, dt_BTH, A_H, B, C, before[-1] if before is not None else None)
        if cache is not None:
            kept = (conv.window(t, window) for conv, t, window in zip(convolutions, inputs, windows))
            cache.layers[self.layer] = (*kept, state)
        if mixed is not None:
            own_HTT = torch.diag_embed(self.D[:, None].expand(-1, x_BTD.shape[1]))
            mixed.append(Mixing(mixing(dt_BTH, A_H, B, C) + own_HTT, -dt_BTH * A_H, state))
        y_BTHP = y_BTHP + self.D[:, None].to(x_BTHP.dtype) * x_BTHP
        return self.o_proj(self.norm(y_BTHP.flatten(2), self.z_proj(x_BTD)))

    def steps(self, x_BTD: Tensor) -> Tensor:
        """Return the step dt of each head at each position, float32 or float64, [B, T, H]."""
        raw_BTH = self.dt_proj(x_BTD)
        exact = torch.promote_types(raw_BTH.dtype, torch.float32)
        return softplus(raw_BTH.to(exact) + self.dt_bias.to(exact), threshold=40.0)  # exact in float64, too


class StateSpaceBlock(nn.Module):
    """x + ssm(norm(x))."""

    def __init__(self, config: StateSpaceConfig, layer: int):
        super().__init__()
        self.ssm_norm = RMSNorm(config.d_model, config.norm_eps)
        self.ssm = StateSpaceLayer(config, layer)

    def forward(
        self,
        x_BTD: Tensor,
        cache: StateCache | None = None,
        mask_BT: Tensor | None = None,
        mixed: list[Mixing] | None = None,
    ) -> Tensor:
        return x_BTD + self.ssm(self.ssm_norm(x_BTD), cache, mask_BT, mixed)


class StateSpace(LinearNextToken, nn.Module):
    """Tokens to logits, for rows of any length. Deterministic, bit for bit, from run to run on one machine."""

    Config: ClassVar[type] = StateSpaceConfig
    state_prefix: ClassVar[str] = "pico_statespace."
    """What stands before the name of a parameter in model.safetensors."""

    def __init__(self, config: StateSpaceConfig):
        super().__init__()
        if problems := list(config.problems()):
            raise ValueError("; ".join(f"{', '.join(names)}: {message}" for names, message in problems))
        self.config = config
        self.embedding_proj = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(StateSpaceBlock(config, layer) for layer in range(config.n_layers))
        self.output_norm = RMSNorm(config.d_model, config.norm_eps)
        self.de_embedding_proj = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(self, tokens_BT: Tensor, cache: StateCache | None = None) -> Tensor:
        """Logits of the next token at every position, [B, T, V]. cache: the state that `tokens_BT` continue, and change."""
        return self.de_embedding_proj(self.hidden(tokens_BT, cache))

    def with_mixing(self, tokens_BT: Tensor) -> tuple[Tensor, list[Mixing]]:
        """Return the logits, and of each layer how its heads make their outputs of their values."""
        mixed: list[Mixing] = []
        return self.de_embedding_proj(self.hidden(tokens_BT, mixed=mixed)), mixed

    def hidden(self, tokens_BT: Tensor, cache: StateCache | None = None, mixed: list[Mixing] | None = None) -> Tensor:
        """Return the normed residual stream that the logits are read from, [B, T, D]."""
        x_BTD = self.embedding_proj(tokens_BT)
        for layer in self.layers:
            x_BTD = layer(x_BTD, cache, None, mixed)
        if cache is not None:
            cache.length += tokens_BT.shape[1]
        return self.output_norm(x_BTD)

    def new_cache(self) -> StateCache:
        """Return a cache of states that `forward` continues."""
        return StateCache()

    def flops_per_token(self, length: int) -> int:
        """Floating-point operations of one training step per token, the same for rows of any `length`.

        Two per multiplication of a matrix or a convolution, and of the recurrence (N I each for what is written, kept and
        read), forward; twice that backward. Embedding look-ups, norms and the choice of chunks are not counted.
        """
        weights = sum(
            p.numel() for name, p in self.named_parameters() if p.ndim == 2 and name != "embedding_proj.weight"
        )
        return 6 * (weights + 3 * self.config.n_layers * self.config.inner * self.config.state_size)

    def anatomy(self) -> Anatomy:
        """Return what the parts of this model are called, and how heads are cut from them."""
        config = self.config
        keys = {"layers": "n_layers", "width": "d_model", "heads": "head_dim", "head_size": "head_dim"}
        return Anatomy(
            layers=config.n_layers,
            width=config.d_model,
            heads=config.heads,
            head_size=config.head_dim,
            parts=PARTS,
            keys={number: f"model.{key}" for number, key in keys.items()},
            notes=(
                "values, what is written and what is read pass a convolution and SiLU before the state",
                "heads of a group write and read by the same vectors",
            ),
        )

    def parameter_roles(self) -> dict[str, str]:
        """What each parameter is to an optimizer: `matrix` (of the blocks), `embedding`, `norm`, or `dynamics` (A_log, dt_bias,
        D and the convolutions, which set how fast states decay: neither decayed nor orthogonalized).
        """
        return {name: _role(name) for name, _ in self.named_parameters()}

    @torch.no_grad()
    def init_parameters(self, generator: torch.Generator) -> None:
        """Set every parameter, in the order of `named_parameters`, with random numbers of `generator` alone.

        They are drawn on the generator's device: a CPU generator gives the same model on every accelerator.
        """
        for name, parameter in self.named_parameters():
            values = torch.ones(parameter.shape, device=generator.device)
            if _role(name) == "dynamics":
                _draw_dynamics(name, values, self.config.conv_kernel, generator)
            elif parameter.ndim == 2:
                draw_matrix(name, values, self.config.init, self.config.n_layers, generator)
            parameter.copy_(values)

    def hf_config(self) -> dict[str, Any]:
        """The content of config.json beside the weights, with which transformers builds this model (see hf_statespace.py)."""
        return {
            **asdict(self.config),
            "architectures": ["PicoStateSpaceHF"],
            "auto_map": {
                "AutoConfig": "pico_statespace.PicoStateSpaceHFConfig",
                "AutoModelForCausalLM": "pico_statespace.PicoStateSpaceHF",
            },
            "dtype": str(self.embedding_proj.weight.dtype).removeprefix("torch."),
            "tie_word_embeddings": False,
            "use_cache": True,
        }

    @staticmethod
    def modelling_files() -> dict[str, str]:
        """The Python files that make a checkpoint load without this package: name to content."""
        here = Path(__file__)
        names = {"pico_statespace.py": "hf_statespace.py"} | {name: name for name in TRAVELLING}
        return {name: here.with_name(source).read_text(encoding="utf-8") for name, source in names.items()}


PARTS = {
    "embedding": Part("embedding_proj"),
    "final_norm": Part("output_norm"),
    "unembedding": Part("de_embedding_proj"),
    "ssm.norm": Part("ssm_norm"),
    "ssm.gate": Part("ssm.z_proj", "heads"),
    "ssm.value": Part("ssm.x_proj", "heads"),
    "ssm.write": Part("ssm.b_proj"),
    "ssm.read": Part("ssm.c_proj"),
    "ssm.step": Part("ssm.dt_proj"),
    "ssm.output": Part("ssm.o_proj", "heads", by="columns"),
}


def _role(name: str) -> str:
    """Return what a parameter is to an optimizer, by its name."""
    module, _, last = name.rpartition(".")
    if last in ("A_log", "dt_bias", "D") or module.endswith("_conv"):
        return "dynamics"
    if module.endswith("norm"):
        return "norm"
    return "embedding" if module in ("embedding_proj", "de_embedding_proj") else "matrix"


def _draw_dynamics(name: str, values: Tensor, kernel: int, generator: torch.Generator) -> None:
    """Fill `values` as Mamba-2 does: A uniform in [1, 16], steps log-uniform in [1e-3, 1e-1], D of 1, convolutions as torch's.

    A head then forgets within 0.6 to 1000 positions. Steps from other values train worse or not at all.
    """
    if name.endswith("A_log"):
        values.uniform_(1.0, 16.0, generator=generator).log_()
    elif name.endswith("dt_bias"):
        steps = values.uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp_()
        values.copy_(steps + (-(-steps).expm1()).log())  # softplus of it is the step
    elif not name.endswith(".D"):
        values.uniform_(-(kernel**-0.5), kernel**-0.5, generator=generator)
