"""`pico generate`: the prompt is read as texts were in training, and what cannot be done is said."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fox import STEP

from picolm.data.tokenizer import encode_text, load_tokenizer, parse_tokenizer
from picolm.errors import PicoError
from picolm.store import Run
from picolm.train.sample import load_model, sample
from picolm.train.state import weight_address


def with_tokenizer(fox: Run, folder: Path, change: Callable[[dict[str, Any]], None]) -> Run:
    """The run with another tokenizer.json, which its digests know."""
    return remade(fox, folder, {"tokenizer.json": change})


def remade(
    fox: Run, folder: Path, changes: dict[str, Any], weights: Callable[[torch.Tensor], Any] | None = None
) -> Run:
    checkpoint = fox[STEP]
    texts = {
        name: checkpoint.read(name) for name in checkpoint.files if not name.endswith((".safetensors", "state.json"))
    }
    for name, change in changes.items():
        content = json.loads(texts[name])
        change(content)
        texts[name] = json.dumps(content).encode()
    tensors = {address: checkpoint[address].clone() for address in checkpoint.select(kind="weights")}
    if weights is not None:
        tensors = {address: weights(tensor) for address, tensor in tensors.items()}
    run = Run.create(folder, fox.config, {})
    run.commit(STEP, tensors, meta={"step": STEP}, texts=texts, weight_prefix="pico_decoder.")
    return run


def greedy(run: Run, prompt: str, new: int = 12) -> str:
    return sample(str(run.path), None, prompt, max_new_tokens=new, seed=0, temperature=0.0)


def post_processor(content: dict[str, Any]) -> None:
    content["post_processor"] = {
        "type": "TemplateProcessing", "pair": [], "single": [{"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }  # fmt: skip


def padding(content: dict[str, Any]) -> None:
    content["padding"] = {"strategy": {"Fixed": 24}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                          "pad_type_id": 0, "pad_token": "<|endoftext|>"}  # fmt: skip


def truncation(content: dict[str, Any]) -> None:
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}


@pytest.mark.parametrize("change", [post_processor, padding, truncation])
def test_a_prompt_is_encoded_as_texts_were_in_training(
    fox: Run, tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    run = with_tokenizer(fox, tmp_path / "run", change)
    assert greedy(run, "The lazy fox") == greedy(fox, "The lazy fox")


def test_a_special_token_in_a_prompt_is_text(fox: Run) -> None:
    assert greedy(fox, "dog<|endoftext|>fox").startswith("dog<|endoftext|>fox")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": math.nan}, "temperature nan"), ({"temperature": math.inf}, "temperature inf"),
        ({"temperature": -1.0}, "temperature -1.0"), ({"top_p": math.nan, "temperature": 1.0}, "top_p nan"),
        ({"top_p": 1.5}, r"top_p 1\.5"), ({"top_k": 0}, "top_k 0"), ({"top_k": -3}, "top_k -3"),
        ({"seed": -1}, "the seed -1 is out of range"), ({"seed": 2**64}, "out of range; take a whole number from 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; ask for at least 1"), ({"max_new_tokens": -5}, "max_new_tokens is -5"),
        ({"max_new_tokens": 10**9}, "do not fit into a context of 64"),
        ({"prompt": "fox \udcff"}, r"the prompt is not valid UTF-8 \(at character 4\)"),
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_told(fox: Run, options: dict[str, Any], words: str) -> None:
    asked: dict[str, Any] = {"prompt": "The", "max_new_tokens": 4, "seed": 0, "temperature": 0.8} | options
    with pytest.raises(PicoError, match=words):
        sample(str(fox.path), None, asked.pop("prompt"), **asked)


@pytest.mark.parametrize("temperature", [1e-40, 1e-320, 1e-12])
def test_the_smallest_temperatures_take_the_likeliest_token(fox: Run, temperature: float) -> None:
    found = sample(str(fox.path), None, "The lazy", max_new_tokens=12, seed=2**64 - 1, temperature=temperature)
    assert found == greedy(fox, "The lazy")


def test_a_model_that_computes_nan_writes_no_text(fox: Run, tmp_path: Path) -> None:
    run = remade(fox, tmp_path / "run", {}, lambda tensor: tensor.fill_(math.nan))
    for temperature in (0.0, 0.8):
        with pytest.raises(PicoError, match=r"step_7: the model computes NaN or infinities for the next token"):
            sample(str(run.path), None, "The", max_new_tokens=4, seed=0, temperature=temperature)


def test_weights_in_float64_are_computed_with_unrounded(fox: Run, tmp_path: Path) -> None:
    fine = 1 + 2.0**-40  # lost in float32
    run = remade(fox, tmp_path / "run", {}, lambda tensor: tensor.double() * fine)
    model = load_model(run)
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, run[STEP][weight_address(name)])
    assert model(torch.tensor([[1, 2]])).dtype == torch.float64
    assert greedy(run, "The lazy") == greedy(fox, "The lazy")


def test_generation_ends_at_each_of_several_ends(fox: Run, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(fox.step_path(STEP))
    prompt = tokenizer.encode("The lazy").ids
    tokens = load_model(fox).generate(torch.tensor([prompt]), 20)[0].tolist()
    stop = tokens[len(prompt) + 3]
    first = tokens.index(stop, len(prompt))

    def ends(content: dict[str, Any]) -> None:
        content["eos_token_id"] = [0, stop]

    run = remade(fox, tmp_path / "run", {"generation_config.json": ends})
    assert greedy(run, "The lazy", 20) == tokenizer.decode(tokens[: first + 1])


def test_a_word_that_the_vocabulary_does_not_hold_is_told() -> None:
    words = {"model": {"type": "WordLevel", "vocab": {"fox": 0, "dog": 1}, "unk_token": "[UNK]"},
             "pre_tokenizer": {"type": "WhitespaceSplit"}}  # fmt: skip
    tokenizer = parse_tokenizer(json.dumps({"version": "1.0", **words}).encode(), "here")
    assert encode_text(tokenizer, "fox dog fox", "the prompt") == [0, 1, 0]
    with pytest.raises(PicoError, match=r"the prompt cannot be encoded by the tokenizer of the run .*UNK"):
        encode_text(tokenizer, "fox cat", "the prompt")


def test_what_is_no_tokenizer_is_told() -> None:
    with pytest.raises(PicoError, match="here: is not UTF-8 text"):
        parse_tokenizer(b"\xff", "here")
