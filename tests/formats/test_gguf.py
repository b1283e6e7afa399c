"""A GGUF file holds our weights under llama.cpp's names, and llama.cpp computes with them what we compute."""

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.fox import STEP, TEXT

from picolm.data.tokenizer import load_tokenizer
from picolm.errors import PicoError
from picolm.formats import FORMATS, collect, export
from picolm.formats.importing import import_model
from picolm.formats.llamacpp import gguf_name
from picolm.store import Run
from picolm.train.sample import load_model

gguf = pytest.importorskip("gguf", reason="needs: pip install 'picolm[gguf]'")


def numbers(tensor: Any) -> torch.Tensor:
    """What a tensor of the file holds, by the library's own reading of its bytes."""
    return torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float32, "F32"), (torch.bfloat16, "BF16"), (torch.float16, "F16")])
def test_the_file_holds_the_weights_as_they_are(
    make_run: Callable[..., Run], tmp_path: Path, dtype: torch.dtype, kind: str
) -> None:
    run = make_run(dtype)
    export(run, STEP, "gguf", tmp_path / "out")
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    exported = collect(run, run[STEP])
    assert set(read) == {gguf_name(name) for name in exported.weights}
    for name, weight in exported.weights.items():
        tensor = read[gguf_name(name)]
        assert tensor.tensor_type.name == (kind if weight.ndim == 2 else "F32")
        assert torch.equal(numbers(tensor).reshape(weight.shape), weight.float()), name


def test_it_says_what_llama_cpp_needs_to_know(fox: Run, tmp_path: Path) -> None:
    export(fox, STEP, "gguf", tmp_path / "out")
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    told = {name: field.contents() for name, field in fields.items() if name.startswith(("llama.", "general."))}
    assert told["general.architecture"] == "llama"
    assert told["general.name"] == "fox step 7"
    assert told["llama.rope.freq_base"] == 5000.0
    assert told["llama.rope.dimension_count"] == 16
    assert told["llama.attention.head_count_kv"] == 2
    assert told["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 0
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert (len(tokens), tokens[0], tokens[-1]) == (320, "<|endoftext|>", "[unused 319]")


def server(place: Path) -> Any:
    """llama.cpp itself, with the file loaded, in float32 throughout."""
    llama = pytest.importorskip("xllamacpp", reason="needs: pip install xllamacpp")
    params = llama.CommonParams()
    params.model.path = str(place)
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = 64, 1, 0, False
    params.cpuparams.n_threads = 1
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.fit_params = False
    return llama.Server(params)


def next_token(running: Any, prompt: str | list[int]) -> tuple[list[tuple[int, float]], int]:
    """The likeliest tokens after a prompt with their ln p (none for half of a character), and the tokens of the prompt."""
    asked = {"prompt": prompt, "max_tokens": 1, "temperature": 0.0, "logprobs": 3, "cache_prompt": False}
    answer = running.handle_completions(asked)
    told = answer["choices"][0]["logprobs"]["content"] if answer["choices"][0]["logprobs"] else []
    return [(entry["id"], entry["logprob"]) for first in told for entry in first["top_logprobs"]], answer["usage"][
        "prompt_tokens"
    ]


STATE_SPACE = {"model_type": "pico_statespace", "d_model": 48, "n_layers": 2, "vocab_size": 320, "max_seq_len": 64}
MODELS: dict[str, dict[str, object]] = {
    "decoder": {},
    "state space": STATE_SPACE | {"state_size": 32, "head_dim": 16},
    "state space of groups and odd sizes": STATE_SPACE
    | {"state_size": 5, "head_dim": 8, "n_groups": 3, "conv_kernel": 3},
    "wide state space": STATE_SPACE | {"state_size": 16, "head_dim": 24, "expand": 3, "norm_eps": 0.01},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_reads_text_as_we_do_and_writes_the_same_tokens(
    name: str, make_run: Callable[..., Run], tmp_path: Path
) -> None:
    run = make_run(**MODELS[name])
    export(run, STEP, "gguf", tmp_path / "out")
    running, model, tokenizer = (
        server(tmp_path / "out" / "model.gguf"),
        load_model(run),
        load_tokenizer(run.step_path(STEP)),
    )
    compared = 0
    for text in ("The lazy fox doesn't", "We'LL  know,\n\n\tnaïve 1790!  ", "dog<|endoftext|>", "ж€", TEXT[:60]):
        tokens = tokenizer.encode(text.removesuffix("<|endoftext|>")).ids + [0] * text.count("<|endoftext|>")
        written = model.generate(torch.tensor([tokens]), 20)[0].tolist()
        ln_p_TV = model(torch.tensor([written]))[0].detach().double().log_softmax(-1)
        for end in range(len(tokens), len(written)):
            told, count = next_token(running, text if end == len(tokens) else written[:end])
            assert count == end
            assert not told or told[0][0] == written[end]
            for token, ln_p in told:
                assert ln_p == pytest.approx(float(ln_p_TV[end - 1, token]), abs=1e-4)
                compared += 1
    assert compared > 150


def test_a_model_without_a_tokenizer_has_no_vocabulary(fox: Run, tmp_path: Path) -> None:
    exported = collect(fox, fox[STEP])._replace(tokenizer={}, generation={})
    FORMATS.get("gguf")(exported, tmp_path)
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.model"].contents() == "no_vocab"
    assert fields["llama.vocab_size"].contents() == 320


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "its pre-tokenizer is not the ByteLevel of GPT-2"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "it puts a space in front"),
        ({"pre_tokenizer": {"type": "ByteLevel", "use_regex": False}}, "it does not split words from spaces"),
        ({"normalizer": {"type": "Lowercase"}}, r"it changes text before \(Lowercase\)"),
        ({"model": {"type": "Unigram", "vocab": {}, "merges": []}}, "its model is Unigram, not BPE"),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(
    fox: Run, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    exported = collect(fox, fox[STEP])
    tokenizer = json.loads(exported.tokenizer["tokenizer.json"]) | changes
    with pytest.raises(PicoError, match=f"llama.cpp would read text otherwise than this tokenizer: {words}"):
        FORMATS.get("gguf")(exported._replace(tokenizer={"tokenizer.json": json.dumps(tokenizer).encode()}), tmp_path)


def test_normal_forms_are_told(fox: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    exported = collect(fox, fox[STEP])
    tokenizer = json.loads(exported.tokenizer["tokenizer.json"]) | {"normalizer": {"type": "NFC"}}
    with caplog.at_level(logging.WARNING, "picolm"):
        FORMATS.get("gguf")(exported._replace(tokenizer={"tokenizer.json": json.dumps(tokenizer).encode()}), tmp_path)
    assert "llama.cpp does not normalize text" in caplog.text


def test_a_package_that_is_not_installed_is_named_with_the_command(
    fox: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(PicoError, match=r"--format gguf needs: pip install 'picolm\[gguf\]'"):
        export(fox, STEP, "gguf", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def with_bos(fox: Run, tmp_path: Path) -> Run:
    """An imported Llama whose texts begin with one token, end with two others, and are padded with a fourth."""
    export(fox, STEP, "llama", tmp_path / "llama")
    ids = {"bos_token_id": 5, "eos_token_id": [0, 7], "pad_token_id": 6}
    for name in ("config.json", "generation_config.json"):
        content = json.loads((tmp_path / "llama" / name).read_text())
        (tmp_path / "llama" / name).write_text(json.dumps(content | ids))
    tokenizer = json.loads((tmp_path / "llama" / "tokenizer.json").read_text())
    begin = next(token for token, number in tokenizer["model"]["vocab"].items() if number == 5)
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing", "pair": [],
        "single": [{"SpecialToken": {"id": begin, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {begin: {"id": begin, "ids": [5], "tokens": [begin]}},
    }  # fmt: skip
    (tmp_path / "llama" / "tokenizer.json").write_text(json.dumps(tokenizer))
    run, _ = import_model(str(tmp_path / "llama"), tmp_path / "imported", None)
    return run


def test_what_begins_ends_and_pads_a_text_survives_import_and_export(with_bos: Run, tmp_path: Path) -> None:
    export(with_bos, STEP, "llama", tmp_path / "again")
    for name in ("config.json", "generation_config.json"):
        content = json.loads((tmp_path / "again" / name).read_text())
        assert (content["bos_token_id"], content["eos_token_id"], content["pad_token_id"]) == (5, [0, 7], 6)
    export(with_bos, STEP, "gguf", tmp_path / "gguf")
    fields = gguf.GGUFReader(tmp_path / "gguf" / "model.gguf").fields
    names = ("bos_token_id", "eos_token_id", "eot_token_id", "padding_token_id", "add_bos_token", "add_eos_token")
    assert [fields[f"tokenizer.ggml.{name}"].contents() for name in names] == [5, 0, 7, 6, True, False]


@pytest.mark.slow
def test_llama_cpp_begins_a_text_where_transformers_does(with_bos: Run, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    export(with_bos, STEP, "gguf", tmp_path / "gguf")
    export(with_bos, STEP, "llama", tmp_path / "again")
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")("The lazy fox doesn't")["input_ids"]
    assert tokens[0] == 5
    told, count = next_token(server(tmp_path / "gguf" / "model.gguf"), "The lazy fox doesn't")
    assert count == len(tokens)
    ln_p_V = load_model(with_bos)(torch.tensor([tokens]))[0, -1].detach().double().log_softmax(-1)
    assert told
    for token, ln_p in told:
        assert ln_p == pytest.approx(float(ln_p_V[token]), abs=1e-4)


def test_a_tokenizer_that_puts_other_tokens_around_a_text_is_refused(fox: Run, tmp_path: Path) -> None:
    exported = collect(fox, fox[STEP])
    tokenizer = json.loads(exported.tokenizer["tokenizer.json"])
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing", "pair": [],
        "single": [{"SpecialToken": {"id": "x", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"x": {"id": "x", "ids": [9], "tokens": ["x"]}},
    }  # fmt: skip
    with pytest.raises(PicoError, match=r"puts the tokens \[9\] before and \[\] after a text; llama.cpp puts only"):
        FORMATS.get("gguf")(exported._replace(tokenizer={"tokenizer.json": json.dumps(tokenizer).encode()}), tmp_path)
