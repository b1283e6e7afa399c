"""Export GGUF, the file format of llama.cpp. This is the only module that imports the package `gguf`.

llama.cpp rotates the pairs (x0, x1), (x2, x3), … like Pico, so the rows of q and k are not reordered.
"""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from picolm.data.tokenizer import parse_tokenizer
from picolm.errors import PicoError
from picolm.formats import FORMATS, Exported
from picolm.models import MODELS, Diffusion, StateSpace
from picolm.models.llama import check_equivalent, gguf_name, llama_config
from picolm.models.mamba2 import gguf_shape, to_gguf

log = logging.getLogger("picolm")

FILE = "model.gguf"
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # gguf.TokenType


@FORMATS.add("gguf")
def gguf(exported: Exported, folder: Path) -> None:
    """Write model.gguf, in the element type of the weights.

    A decoder is a `llama` there, a state space model a `mamba2`. Raises PicoError if the package `gguf` is missing, for other
    models, and if llama.cpp lacks the tokenizer.
    """
    try:
        from gguf import GGUFWriter
    except ImportError as error:
        raise PicoError("--format gguf needs: pip install 'picolm[gguf]'") from error
    model_class = MODELS.get(exported.config.model_type)
    if model_class is StateSpace:
        writer, tensors = GGUFWriter(folder / FILE, "mamba2"), to_gguf(exported.weights, exported.config)
        for key, value in gguf_shape(exported.config).items():
            add: Callable[..., None] = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(f"mamba2.{key}", value)
    elif model_class is Diffusion:
        raise PicoError(
            "--format gguf: the llada of llama.cpp has a logit for every token that it reads, also for the one that hides "
            "others, which a pico_diffusion has not: its probabilities would be others; use --format torch for its plain weights"
        )
    else:
        check_equivalent(model_class)
        writer, tensors = GGUFWriter(folder / FILE, "llama"), {gguf_name(n): t for n, t in exported.weights.items()}
        _write_llama_shape(writer, llama_config(exported.config, exported.dtype, exported.generation))
    _write_about(writer, exported)
    _write_tokenizer(writer, exported)
    for name, tensor in tensors.items():
        _write_tensor(writer, name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_about(writer: Any, exported: Exported) -> None:
    from gguf import LlamaFileType

    config, types = exported.config, {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16"}
    if exported.dtype not in types:
        raise PicoError(f"the weights are {exported.dtype}; a GGUF file holds float32, float16 or bfloat16")
    writer.add_name(f"{exported.origin['run']} step {exported.origin['step']}")
    writer.add_file_type(LlamaFileType[types[exported.dtype]])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)


def _write_llama_shape(writer: Any, llama: Mapping[str, Any]) -> None:
    writer.add_embedding_length(llama["hidden_size"])
    writer.add_block_count(llama["num_hidden_layers"])
    writer.add_feed_forward_length(llama["intermediate_size"])
    writer.add_head_count(llama["num_attention_heads"])
    writer.add_head_count_kv(llama["num_key_value_heads"])
    writer.add_rope_dimension_count(llama["head_dim"])
    writer.add_rope_freq_base(llama["rope_theta"])
    writer.add_layer_norm_rms_eps(llama["rms_norm_eps"])


def _write_tensor(writer: Any, name: str, tensor: Tensor) -> None:
    """Add a tensor to the file; vectors are stored as float32, as llama.cpp requires."""
    from gguf import GGMLQuantizationType

    if tensor.ndim == 1:
        tensor = tensor.float()
    if tensor.dtype == torch.bfloat16:  # numpy has no bfloat16: pass the bytes and name their type
        writer.add_tensor(name, tensor.contiguous().view(torch.uint8).numpy(), raw_dtype=GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, tensor.contiguous().numpy())


def _write_tokenizer(writer: Any, exported: Exported) -> None:
    """Write tokens, their types and merges from the run's tokenizer.json; without one, write no vocabulary."""
    if "tokenizer.json" not in exported.tokenizer:
        writer.add_tokenizer_model("no_vocab")
        return
    tokenizer = json.loads(exported.tokenizer["tokenizer.json"])
    _check_tokenizer(tokenizer)
    tokens, kinds = _tokens(tokenizer, exported.config.vocab_size)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    _write_special_tokens(writer, exported)
    writer.add_add_space_prefix(False)


def _write_special_tokens(writer: Any, exported: Exported) -> None:
    """Write the tokens that begin, end and pad a text, and whether they are added when a text is encoded.

    Raises PicoError if the tokenizer adds other tokens.
    """
    bos, eos, pad = (exported.generation.get(f"{name}_token_id") for name in ("bos", "eos", "pad"))
    ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if bos is not None:
        writer.add_bos_token_id(bos)
    if ends:
        writer.add_eos_token_id(ends[0])
    if len(ends) > 1:  # llama.cpp ends a text at either
        writer.add_eot_token_id(ends[1])
    if len(ends) > 2:
        log.warning(
            "A GGUF file names two tokens that end a text; %s end it here, and %s are left out.", ends, ends[2:]
        )
    if pad is not None:
        writer.add_pad_token_id(pad)
    before, after = _put_around(exported.tokenizer["tokenizer.json"])
    if (before, after) not in [(a, b) for a in ([], [bos]) for b in ([], ends[:1])]:
        raise PicoError(
            f"--format gguf: the tokenizer puts the tokens {before} before and {after} after a text; llama.cpp puts only "
            f"bos_token_id ({bos}) before and eos_token_id ({eos}) after it"
        )
    writer.add_add_bos_token(bool(before))
    writer.add_add_eos_token(bool(after))


def _put_around(content: bytes) -> tuple[list[int], list[int]]:
    """Return the token ids that the post-processor of a tokenizer.json adds before and after a text."""
    tokenizer = parse_tokenizer(content, "tokenizer.json")
    whole, plain = (tokenizer.encode("a", add_special_tokens=special).ids for special in (True, False))
    start = next((i for i in range(len(whole)) if plain and whole[i : i + len(plain)] == plain), None)
    if start is None:
        raise PicoError("--format gguf: the post-processor of the tokenizer changes the tokens of a text")
    return whole[:start], whole[start + len(plain) :]


def _tokens(tokenizer: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Return the text and the type of each token id; ids without a token get `[unused N]` and the type unused."""
    tokens, kinds = [f"[unused {number}]" for number in range(size)], [_UNUSED] * size
    for token, number in tokenizer["model"]["vocab"].items():
        tokens[number], kinds[number] = token, _NORMAL
    for added in tokenizer.get("added_tokens", []):
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    return tokens, kinds


def _check_tokenizer(tokenizer: dict[str, Any]) -> None:
    """Raise PicoError unless the tokenizer splits text like GPT-2's: llama.cpp selects its rules by a name."""
    before = tokenizer.get("pre_tokenizer") or {}
    model, normalizer = tokenizer["model"], tokenizer.get("normalizer") or {}
    if normalizer.get("type") == "NFC":
        log.warning("llama.cpp does not normalize text: what is not in Unicode's form NFC becomes other tokens there.")
    reasons = [
        reason
        for reason, holds in (
            (f"its model is {model['type']}, not BPE", model["type"] != "BPE"),
            ("its pre-tokenizer is not the ByteLevel of GPT-2", before.get("type") != "ByteLevel"),
            ("it puts a space in front", bool(before.get("add_prefix_space"))),
            (f"it changes text before ({normalizer.get('type')})", normalizer.get("type", "NFC") != "NFC"),
            ("it does not split words from spaces", not before.get("use_regex", True)),
            ("it leaves whole words unmerged (ignore_merges)", bool(model.get("ignore_merges"))),
        )
        if holds
    ]
    if reasons:
        raise PicoError(f"--format gguf: llama.cpp would read text otherwise than this tokenizer: {'; '.join(reasons)}")
