"""Convert a Pico state space model to a Mamba2ForCausalLM of transformers, and back. Both compute the same function.

transformers keeps the five projections of a layer as the rows of one matrix (z, x, B, C, dt), and its three convolutions as
one. Values are moved, never changed.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from picolm.errors import PicoError
from picolm.models.llama import check_names
from picolm.models.statespace import StateSpace, StateSpaceConfig
from picolm.trusted import check_form

_OUTSIDE = {
    "embedding_proj.weight": "backbone.embeddings.weight",
    "output_norm.weight": "backbone.norm_f.weight",
    "de_embedding_proj.weight": "lm_head.weight",
}
_INSIDE = {
    "ssm_norm.weight": "norm.weight",
    "ssm.A_log": "mixer.A_log",
    "ssm.dt_bias": "mixer.dt_bias",
    "ssm.D": "mixer.D",
    "ssm.norm.weight": "mixer.norm.weight",
    "ssm.o_proj.weight": "mixer.out_proj.weight",
}
_JOINED = {
    "mixer.in_proj.weight": [f"ssm.{part}_proj.weight" for part in ("z", "x", "b", "c", "dt")],
    "mixer.conv1d.weight": [f"ssm.{part}_conv.weight" for part in ("x", "b", "c")],
    "mixer.conv1d.bias": [f"ssm.{part}_conv.bias" for part in ("x", "b", "c")],
}
_KERNEL = "mixer.conv1d.weight"  # [channels, 1, kernel] there
_GGUF = {
    "backbone.embeddings.weight": "token_embd.weight",
    "backbone.norm_f.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "norm.weight": "attn_norm.weight",
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.conv1d.weight": "ssm_conv1d.weight",
    "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.dt_bias": "ssm_dt.bias",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.norm.weight": "ssm_norm.weight",
    "mixer.out_proj.weight": "ssm_out.weight",
}
_SAME = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "state_size": "state_size",
    "head_dim": "head_dim",
    "expand": "expand",
    "n_groups": "n_groups",
    "conv_kernel": "conv_kernel",
    "norm_eps": "layer_norm_epsilon",
}
_DEFAULTS = {
    "vocab_size": 32768, "hidden_size": 4096, "num_hidden_layers": 64, "state_size": 128, "head_dim": 64, "expand": 2,
    "n_groups": 8, "conv_kernel": 4, "layer_norm_epsilon": 1e-5, "num_heads": 128,
}  # of Mamba2Config, for keys that a config.json does not have  # fmt: skip
_SPECIAL = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}  # and these


def check_equivalent(model_class: type) -> None:
    """Raise PicoError unless `model_class` is `StateSpace`, the only architecture that computes what a Mamba-2 computes."""
    if model_class is not StateSpace:
        raise PicoError(
            f"{model_class.__name__} has no Mamba-2 equivalent: only pico_statespace computes what a Mamba2ForCausalLM "
            "computes; use --format torch for its plain weights"
        )


def special_tokens(mamba: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ids of the tokens that begin, end and pad a text, from the config.json of a Mamba-2."""
    return {name: mamba.get(name, default) for name, default in _SPECIAL.items()}


def to_mamba2(weights: Mapping[str, Tensor], config: StateSpaceConfig) -> dict[str, Tensor]:
    """Return the weights of the Mamba2ForCausalLM that computes the same logits as a `StateSpace`."""
    found = {other: weights[own] for own, other in _OUTSIDE.items()}
    for block, other in _blocks(config):
        found |= {other + name: weights[block + own] for own, name in _INSIDE.items()}
        found |= {other + name: torch.cat([weights[block + own] for own in parts]) for name, parts in _JOINED.items()}
        found[other + _KERNEL] = found[other + _KERNEL][:, None]
    return found


def to_gguf(weights: Mapping[str, Tensor], config: StateSpaceConfig) -> dict[str, Tensor]:
    """Return the tensors of a `mamba2` of llama.cpp. It keeps A itself rather than ln(-A), in float32 as all but the matrices."""
    found = {}
    for name, tensor in to_mamba2(weights, config).items():
        block, part = re.fullmatch(r"(?:backbone\.layers\.(\d+)\.)?(.*)", name).groups()  # type: ignore[union-attr]
        if part == "mixer.A_log":
            tensor = -tensor.float().exp()
        if part in ("mixer.A_log", "mixer.D"):
            tensor = tensor.float()[:, None]
        elif part == "mixer.norm.weight":
            tensor = tensor.float().unflatten(0, (config.n_groups, -1))
        elif part == "mixer.conv1d.weight":
            tensor = tensor.float()[:, 0]
        found[("" if block is None else f"blk.{block}.") + _GGUF[part]] = tensor
    return found


def gguf_shape(config: StateSpaceConfig) -> dict[str, int | float]:
    """Return the sizes of a `mamba2` of llama.cpp by its keys."""
    return {
        "embedding_length": config.d_model,
        "block_count": config.n_layers,
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "ssm.conv_kernel": config.conv_kernel,
        "ssm.inner_size": config.inner,
        "ssm.state_size": config.state_size,
        "ssm.time_step_rank": config.heads,
        "ssm.group_count": config.n_groups,
    }


def from_mamba2(weights: Mapping[str, Tensor], config: StateSpaceConfig) -> dict[str, Tensor]:
    """Return the weights of the `StateSpace` equal to a Mamba-2, the inverse of `to_mamba2`.

    Raises PicoError if tensors are missing, unknown, or of other shapes than the configuration says.
    """
    if config.n_layers > len(weights):
        raise PicoError(f"the configuration says {config.n_layers} layers, and the files hold {len(weights)} tensors")
    inside = [*_INSIDE.values(), *_JOINED]
    expected = [*_OUTSIDE.values(), *(other + name for _, other in _blocks(config) for name in inside)]
    check_names(weights, expected, "Pico state space model")
    found = {own: weights[other] for own, other in _OUTSIDE.items()}
    read = config.n_groups * config.state_size
    sizes = {"z": config.inner, "x": config.inner, "b": read, "c": read, "dt": config.heads}
    for block, other in _blocks(config):
        found |= {block + own: weights[other + name] for own, name in _INSIDE.items()}
        for name, parts in _JOINED.items():
            rows = [sizes[part.removeprefix("ssm.").partition("_")[0]] for part in parts]
            whole = weights[other + name]
            if whole.ndim == 3 and whole.shape[1] == 1:
                whole = whole[:, 0]
            if len(whole) != sum(rows):
                raise PicoError(f"{other}{name} has {len(whole)} rows; its configuration says {sum(rows)}")
            found |= {block + own: part.contiguous() for own, part in zip(parts, whole.split(rows))}
    return found


def with_output_layer(weights: Mapping[str, Tensor], mamba: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights of a Mamba-2 with a separate output layer: a copy of the embedding if the two are tied."""
    embedding, output = _OUTSIDE["embedding_proj.weight"], _OUTSIDE["de_embedding_proj.weight"]
    if output in weights or not mamba.get("tie_word_embeddings") or embedding not in weights:
        return dict(weights)
    return {**weights, output: weights[embedding].clone()}


def mamba2_config(config: StateSpaceConfig, dtype: str, special: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json for transformers. special: bos_token_id, eos_token_id, pad_token_id, if known."""
    return {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        **{other: getattr(config, own) for own, other in _SAME.items()},
        "num_heads": config.heads,
        "max_seq_len": config.max_seq_len,  # not read by transformers, which knows no context of it; for `pico import`
        "chunk_size": 64,
        "hidden_act": "silu",
        "use_bias": False,
        "use_conv_bias": True,
        "residual_in_fp32": False,
        "tie_word_embeddings": False,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
        **{name: special.get(name) for name in _SPECIAL},
    }


class _Numbers(BaseModel):
    """The numbers in the config.json of a Mamba-2 that a state space model is made from; null where the default holds."""

    vocab_size: int | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    state_size: int | None = None
    num_heads: int | None = None
    head_dim: int | None = None
    expand: int | None = None
    n_groups: int | None = None
    conv_kernel: int | None = None
    layer_norm_epsilon: float | None = None
    max_seq_len: int | None = None
    time_step_limit: list[float | None] | None = None


def statespace_config(mamba: Mapping[str, Any]) -> StateSpaceConfig:
    """Return the `StateSpaceConfig` of the config.json of a Mamba-2, the inverse of `mamba2_config`.

    Raises PicoError with all reasons if a Pico state space model cannot compute the same function.
    """
    stated = {**mamba}
    if isinstance(limit := stated.get("time_step_limit"), list):
        stated["time_step_limit"] = [_bound(each) for each in limit]
    check_form(stated, _Numbers, "config.json of the model")
    known = {**_DEFAULTS, **{key: value for key, value in stated.items() if value is not None}}
    reasons = list(_differences(known))
    try:
        config = StateSpaceConfig(
            max_seq_len=known.get("max_seq_len", StateSpaceConfig.max_seq_len),
            **{own: type(getattr(StateSpaceConfig, own))(known[other]) for own, other in _SAME.items()},
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise PicoError(f"config.json of the model: {error}") from error
    reasons += [f"{', '.join(names)}: {message}" for names, message in config.problems()]
    if not reasons and config.heads != known["num_heads"]:
        reasons.append(f"num_heads is {known['num_heads']}, and expand * hidden_size / head_dim {config.heads}")
    if reasons:
        raise PicoError("a Pico state space model cannot compute what this model computes: " + "; ".join(reasons))
    return config


def _differences(mamba: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message for each setting of a config.json that a state space model of Pico cannot represent."""
    if mamba.get("model_type") != "mamba2":
        yield f"model_type is {mamba.get('model_type')!r}, not 'mamba2'"
    low, high = (mamba.get("time_step_limit") or [0.0, math.inf])[:2]
    if low > 0 or high < math.inf:
        yield f"time_step_limit is [{low}, {high}]: steps are not clamped here"
    if mamba.get("use_bias"):
        yield "use_bias is true: there are no biases in the projections"
    if not mamba.get("use_conv_bias", True):
        yield "use_conv_bias is false: the convolutions have biases"
    if mamba.get("hidden_act", "silu") not in ("silu", "swish"):
        yield f"hidden_act is {mamba['hidden_act']!r}, not 'silu'"
    for key, expected in (("rms_norm", True), ("norm_before_gate", False)):
        if mamba.get(key, expected) != expected:
            yield f"{key} is {mamba[key]!r}: the norm is an RMSNorm of the gated values"
    if mamba.get("quantization_config"):
        yield "its weights are quantized"


def _bound(value: Any) -> Any:
    """Return a bound of time_step_limit, which JSON may hold as a text (`Infinity`) or in the form of transformers."""
    if isinstance(value, Mapping) and set(value) == {"__float__"}:
        value = value["__float__"]
    if isinstance(value, str) and value.lower().lstrip("+") in ("inf", "infinity"):
        return math.inf
    return value


def _blocks(config: StateSpaceConfig) -> Iterator[tuple[str, str]]:
    """Yield what stands before the names of a block here, and there."""
    yield from ((f"layers.{i}.", f"backbone.layers.{i}.") for i in range(config.n_layers))
