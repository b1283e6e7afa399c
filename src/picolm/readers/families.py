"""Architectures of transformers: what their parts are called, how heads are cut from them, how their files hold them.

The mappings were checked against transformers: for each family the sum over heads of A_h (x W_V^T + b_V) W_O[:, h]^T + b_O is
the output of its attention (tests/readers/test_families.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from picolm.errors import StoreError
from picolm.models.anatomy import Anatomy, Part

Fused = Literal["by head", "by part"]
QKV = ("attention.query", "attention.key", "attention.value")


@dataclass(frozen=True)
class Family:
    """What the configuration does not say of an architecture.

    fused: the module of a block that holds queries, keys and values in one matrix, None where there are three; its rows are
    sorted by head and then by part (query, key, value), or by part and then by head. transposed: modules of a block whose
    weights are stored as inputs x outputs (Conv1D). renamed: modules whose names in files are older than those of transformers 5,
    by name in the file. notes: why a circuit is not all that the attention computes. numbers: what the configuration does not
    say of layers, width, heads, kv_heads and head_size.
    """

    block: str
    parts: Mapping[str, Part]
    fused: str | None = None
    order: Fused = "by part"
    transposed: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    numbers: Mapping[str, int] = field(default_factory=dict)


class PartForm(BaseModel, extra="forbid"):
    module: str
    cut: Literal["heads", "kv_heads"] | None = None
    by: Literal["rows", "columns"] = "rows"


Number = Annotated[int, Field(gt=0)]


class FamilyForm(BaseModel, extra="forbid"):
    """A family as a user writes it in series.yaml. Without `block`, only numbers of a known one are given."""

    block: str = ""
    parts: dict[str, PartForm] = {}
    fused: str | None = None
    order: Fused = "by part"
    transposed: list[str] = []
    notes: list[str] = []
    numbers: dict[Literal["layers", "width", "heads", "kv_heads", "head_size"], Number] = {}

    def family(self, where: str) -> Family:
        """Return the family. Raises StoreError for a block without a place for its number, and for a part that is missing."""
        numbers = {str(number): value for number, value in self.numbers.items()}
        if self.model_fields_set == {"numbers"}:
            return Family("", {}, numbers=numbers)
        if self.block.count("{}") != 1 or self.block.count("{") != 1:
            raise StoreError(
                f"{where}: anatomy.block is {self.block!r}; expected a name with {{}} for the number of the block"
            )
        if self.fused and (missing := [role for role in QKV if role not in self.parts]):
            raise StoreError(
                f"{where}: anatomy.fused is {self.fused!r}, and anatomy.parts has no {missing[0]}: a name for each third"
            )
        parts = {role: Part(part.module, part.cut, part.by) for role, part in self.parts.items()}
        return Family(self.block, parts, self.fused, self.order, tuple(self.transposed), {}, tuple(self.notes), numbers)


def _parts(
    embedding: str,
    unembedding: str,
    attention: tuple[str, str, str, str],
    mlp: str,
    norms: tuple[str, str],
) -> dict[str, Part]:
    """attention: the modules of queries, keys, values and outputs. norms: those before the attention and at the end."""
    query, key, value, output = attention
    before_attention, final = norms
    return {
        "embedding": Part(embedding),
        "final_norm": Part(final),
        "unembedding": Part(unembedding),
        "attention.norm": Part(before_attention),
        "attention.query": Part(query, "heads"),
        "attention.key": Part(key, "kv_heads"),
        "attention.value": Part(value, "kv_heads"),
        "attention.output": Part(output, "heads", by="columns"),
        "mlp.output": Part(mlp),
    }


BIASES = "queries, keys and values have biases, which circuits leave out"
NORMED = "queries and keys are normed: the QK circuit is not the score of the attention"
NORM_AFTER = "a norm follows the attention: the OV circuit is not what reaches the residual stream"
_PLAIN = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_NORMS = ("input_layernorm", "model.norm")
_LLAMA = Family("model.layers.{}", _parts("model.embed_tokens", "lm_head", _PLAIN, "mlp.down_proj", _NORMS))

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "olmo": _LLAMA,
    "gemma": _LLAMA,
    "smollm3": _LLAMA,
    "qwen2": replace(_LLAMA, notes=(BIASES,)),
    "qwen3": replace(_LLAMA, notes=(NORMED,)),
    "olmo2": replace(
        _LLAMA,
        parts={role: part for role, part in _LLAMA.parts.items() if role != "attention.norm"},
        notes=(NORMED, NORM_AFTER),
    ),
    "gemma2": replace(_LLAMA, notes=(NORM_AFTER,)),
    "phi": Family(
        "model.layers.{}",
        _parts(
            "model.embed_tokens",
            "lm_head",
            (*_PLAIN[:3], "self_attn.dense"),
            "mlp.fc2",
            ("input_layernorm", "model.final_layernorm"),
        ),
        notes=(BIASES,),
    ),
    "phi3": Family(
        "model.layers.{}",
        _parts(
            "model.embed_tokens",
            "lm_head",
            ("self_attn.query", "self_attn.key", "self_attn.value", "self_attn.o_proj"),
            "mlp.down_proj",
            _NORMS,
        ),
        fused="self_attn.qkv_proj",
    ),
    "gpt_neox": Family(
        "gpt_neox.layers.{}",
        _parts(
            "gpt_neox.embed_in",
            "lm_head",
            ("attention.query", "attention.key", "attention.value", "attention.dense"),
            "mlp.dense_4h_to_h",
            ("input_layernorm", "gpt_neox.final_layer_norm"),
        ),
        fused="attention.query_key_value",
        order="by head",
        renamed={"embed_out": "lm_head"},
        notes=(BIASES,),
    ),
    "gpt2": Family(
        "transformer.h.{}",
        _parts(
            "transformer.wte",
            "lm_head",
            ("attn.query", "attn.key", "attn.value", "attn.c_proj"),
            "mlp.c_proj",
            ("ln_1", "transformer.ln_f"),
        ),
        fused="attn.c_attn",
        transposed=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        notes=(BIASES,),
    ),
}
# The numbers of a model in config.json.
_NUMBERS = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "width": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head"),
    "kv_heads": ("num_key_value_heads", "n_query_groups"),
    "head_size": ("head_dim", "head_size"),
}


def anatomy_of(config: Mapping[str, Any], family: Family | None) -> Anatomy:
    """Return the anatomy of a model from its config.json. Raises ValueError for a number that is none.

    In a known family without `num_key_value_heads`, each query head has a key-value head of its own. Tied embeddings are one
    part with two roles.
    """
    keys = {
        number: next((key for key in names if config.get(key) is not None), names[0])
        for number, names in _NUMBERS.items()
    }
    numbers: dict[str, Any] = {number: config.get(key) for number, key in keys.items()}
    if family is None:
        return Anatomy(**numbers, keys=keys)
    numbers |= family.numbers
    keys |= {number: f"numbers.{number}" for number in family.numbers}
    if numbers["kv_heads"] is None:
        numbers["kv_heads"], keys["kv_heads"] = numbers["heads"], keys["heads"]
    parts = dict(family.parts)
    if config.get("tie_word_embeddings", False) and "embedding" in parts:
        parts["unembedding"] = parts["embedding"]
    return Anatomy(**numbers, block=family.block, parts=parts, keys=keys, notes=family.notes)
