"""Convert a Pico decoder to a LlamaForCausalLM of transformers, and back. Both compute the same function.

Parameter names differ, and one more thing: rotary positions turn the pairs (x0, x1), (x2, x3), … of a head in Pico and
(x0, x_D/2), (x1, x_D/2+1), … in transformers. So the rows of q and k are reordered within each head; attention scores
are sums over all of them and do not change.

Legend: N heads, D head size, F = D / 2, H model width.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from torch import Tensor

from picolm.errors import PicoError
from picolm.models.decoder import Decoder, DecoderConfig
from picolm.trusted import check_form

_OUTSIDE = {
    "embedding_proj.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "de_embedding_proj.weight": "lm_head.weight",
}
_INSIDE = {
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.o_proj": "self_attn.o_proj",
    "attention_norm": "input_layernorm",
    "swiglu.w_0": "mlp.gate_proj",
    "swiglu.w_1": "mlp.up_proj",
    "swiglu.w_2": "mlp.down_proj",
    "swiglu_norm": "post_attention_layernorm",
}
_GGUF_OUTSIDE = {"embedding_proj": "token_embd", "output_norm": "output_norm", "de_embedding_proj": "output"}
_GGUF_INSIDE = {
    "attention_norm": "attn_norm", "attention.q_proj": "attn_q", "attention.k_proj": "attn_k",
    "attention.v_proj": "attn_v", "attention.o_proj": "attn_output", "swiglu_norm": "ffn_norm",
    "swiglu.w_0": "ffn_gate", "swiglu.w_1": "ffn_up", "swiglu.w_2": "ffn_down",
}  # fmt: skip
_COMPUTED = ("rotary_emb.inv_freq",)  # stored by old versions of transformers, but not a parameter
_SAME = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "attention_n_heads": "num_attention_heads",
    "attention_n_kv_heads": "num_key_value_heads",
    "activation_hidden_dim": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
}
# The defaults of LlamaConfig for keys that a config.json does not have.
_DEFAULTS = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
}  # fmt: skip


def check_equivalent(model_class: type) -> None:
    """Raise PicoError unless `model_class` is `Decoder`, the only architecture that computes what a Llama computes."""
    if model_class is not Decoder:
        raise PicoError(
            f"{model_class.__name__} has no Llama equivalent: only pico_decoder computes what a LlamaForCausalLM computes; "
            "use --format torch for its plain weights"
        )


def names(config: DecoderConfig) -> dict[str, str]:
    """Return the Llama name of each Pico parameter, in the order of `Decoder.named_parameters`."""
    first, *others = _OUTSIDE.items()
    blocks = {
        f"layers.{i}.{own}.weight": f"model.layers.{i}.{other}.weight"
        for i in range(config.n_layers)
        for own, other in _INSIDE.items()
    }
    return dict([first]) | blocks | dict(others)


def gguf_name(name: str) -> str:
    """Return the llama.cpp name of a Pico parameter: layers.3.attention.q_proj.weight -> blk.3.attn_q.weight."""
    module = name.removesuffix(".weight")
    if module in _GGUF_OUTSIDE:
        return _GGUF_OUTSIDE[module] + ".weight"
    _, layer, part = module.split(".", 2)
    return f"blk.{layer}.{_GGUF_INSIDE[part]}.weight"


def with_output_layer(weights: Mapping[str, Tensor], llama: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights of a Llama with a separate output layer: a copy of the embedding if the two are tied."""
    embedding, output = _OUTSIDE["embedding_proj.weight"], _OUTSIDE["de_embedding_proj.weight"]
    if output in weights or not llama.get("tie_word_embeddings"):
        return dict(weights)
    return {**weights, output: weights.get(embedding, next(iter(weights.values()))).clone()}


def to_llama(weights: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """Return the weights of the Llama that computes the same logits as a `Decoder`. Values are moved, never changed."""
    return {other: _halves(weights[own], _heads(own, config)) for own, other in names(config).items()}


def from_llama(weights: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """Return the weights of the `Decoder` equal to a Llama, the inverse of `to_llama`.

    Raises PicoError if tensors are missing or unknown, or if there are fewer tensors than layers.
    """
    if config.n_layers > len(weights):
        raise PicoError(f"the configuration says {config.n_layers} layers, and the files hold {len(weights)} tensors")
    expected = names(config)
    check_names([name for name in weights if not name.endswith(_COMPUTED)], expected.values())
    return {own: _pairs(weights[other], _heads(own, config)) for own, other in expected.items()}


def check_names(found: Collection[str], expected: Collection[str], kind: str = "Pico decoder") -> None:
    """Raise PicoError if the names of the tensors differ from the expected ones."""
    unknown, missing = sorted(set(found) - set(expected)), sorted(set(expected) - set(found))
    if unknown:
        bias = " (Pico decoders have no biases)" if unknown[0].endswith(".bias") and kind == "Pico decoder" else ""
        raise PicoError(f"the model holds {unknown[0]}{_more(unknown)}, for which there is no place in a {kind}{bias}")
    if missing:
        raise PicoError(f"the model does not hold {missing[0]}{_more(missing)}; is a file of it missing?")


_SPECIAL = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}  # and the defaults of LlamaConfig


def special_tokens(llama: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ids of the tokens that begin, end and pad a text, from a Llama's config.json; None if it has none."""
    return {name: llama.get(name, default) for name, default in _SPECIAL.items()}


def llama_config(config: DecoderConfig, dtype: str, special: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json for transformers 4 and 5. special: bos_token_id, eos_token_id, pad_token_id, if known.

    transformers 4 reads rope_theta and torch_dtype, transformers 5 rope_parameters and dtype.
    """
    theta = config.position_emb_theta
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{other: getattr(config, own) for own, other in _SAME.items()},
        "head_dim": config.d_model // config.attention_n_heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": False,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
        **{name: special.get(name) for name in _SPECIAL},
    }


class _Numbers(BaseModel):
    """The numbers in the config.json of a Llama that a decoder is made from; null where the default holds."""

    vocab_size: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int | None = None
    rms_norm_eps: float | None = None
    rope_theta: float | None = None


def decoder_config(llama: Mapping[str, Any]) -> DecoderConfig:
    """Return the `DecoderConfig` of a Llama's config.json, the inverse of `llama_config`.

    Raises PicoError with all reasons if a Pico decoder cannot compute the same function.
    """
    check_form(dict(llama), _Numbers, "config.json of the model")
    if reasons := list(_differences(llama)):
        raise PicoError("a Pico decoder cannot compute what this model computes: " + "; ".join(reasons))
    known = {**_DEFAULTS, **{key: value for key, value in llama.items() if value is not None}}
    known.setdefault("num_key_value_heads", known["num_attention_heads"])
    rope = {**_rope(llama)}
    try:
        config = DecoderConfig(
            position_emb_theta=float(rope.get("rope_theta", llama.get("rope_theta") or 10000.0)),
            **{own: type(getattr(DecoderConfig, own))(known[other]) for own, other in _SAME.items()},
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise PicoError(f"config.json of the model: {error}") from error
    if problems := [f"{', '.join(fields)}: {message}" for fields, message in config.problems()]:
        raise PicoError("a Pico decoder cannot compute what this model computes: " + "; ".join(problems))
    return config


def _differences(llama: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message for each setting of a config.json that a Pico decoder cannot represent."""
    if llama.get("model_type") != "llama":
        yield f"model_type is {llama.get('model_type')!r}, not 'llama'"
    for key, reason in (("attention_bias", "biases in attention"), ("mlp_bias", "biases in the MLP")):
        if llama.get(key):
            yield f"{key} is {llama[key]!r}: there are no {reason}"
    if llama.get("hidden_act", "silu") not in ("silu", "swish"):
        yield f"hidden_act is {llama['hidden_act']!r}, not 'silu'"
    kind = _rope(llama).get("rope_type", _rope(llama).get("type", "default"))
    if kind != "default":
        yield f"rotary positions are scaled (rope_type {kind!r})"
    if llama.get("partial_rotary_factor", _rope(llama).get("partial_rotary_factor", 1.0)) not in (None, 1, 1.0):
        yield "only a part of each head is turned (partial_rotary_factor)"
    if llama.get("quantization_config"):
        yield "its weights are quantized"
    heads, width = llama.get("num_attention_heads", 32), llama.get("hidden_size", 4096)
    size = llama.get("head_dim")
    if size is not None and size * heads != width:
        yield f"head_dim is {size}, and {heads} heads of it are not hidden_size = {width}"


def _rope(llama: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of rotary positions, from `rope_scaling` and `rope_parameters`.

    Raises PicoError if one of them is not an object.
    """
    found: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(said := llama.get(key) or {}, Mapping):
            raise PicoError(f"config.json of the model: {key} is {said!r}, not an object")
        found |= said
    return found


def _heads(name: str, config: DecoderConfig) -> int | None:
    """Return the number of heads of a weight whose rows are reordered (q and k); None for any other weight."""
    of = {"q_proj.weight": config.attention_n_heads, "k_proj.weight": config.attention_n_kv_heads}
    return next((heads for end, heads in of.items() if name.endswith(end)), None)


def _halves(weight: Tensor, heads: int | None) -> Tensor:
    """Reorder the rows (x0, x1, x2, x3, …) of each head to (x0, x2, …, x1, x3, …)."""
    if heads is None:
        return weight
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()  # N F 2 H -> N 2 F H


def _pairs(weight: Tensor, heads: int | None) -> Tensor:
    """Undo `_halves`."""
    if heads is None:
        return weight
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def _more(found: Collection[str]) -> str:
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""
