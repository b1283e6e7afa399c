"""A Mamba-2 of transformers computes what the state space model computes; what does not fit is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.fox import STEP, same

from picolm.errors import PicoError
from picolm.formats import export
from picolm.formats.importing import import_model
from picolm.models import StateSpace, StateSpaceConfig
from picolm.models.mamba2 import from_mamba2, mamba2_config, statespace_config, to_mamba2
from picolm.store import Run
from picolm.train.sample import load_model

SHAPE = StateSpaceConfig(d_model=24, n_layers=2, vocab_size=61, max_seq_len=40, state_size=5, head_dim=8, n_groups=3)
GOOD = json.loads(json.dumps(mamba2_config(SHAPE, "float32", {})))


@pytest.mark.slow
def test_transformers_gives_the_same_logits_and_the_same_text(state_space_run: Run, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    export(state_space_run, None, "mamba2", tmp_path / "out")
    theirs, ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), load_model(state_space_run, STEP)
    assert type(theirs).__name__ == "Mamba2ForCausalLM"
    tokens = torch.randint(1, 61, (2, 33), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens), rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}  # which no prompt holds
    assert torch.equal(theirs.generate(tokens, **options), ours.generate(tokens, 7))


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_a_mamba2_that_transformers_made_becomes_a_run(tied: bool, tmp_path: Path) -> None:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        hidden_size=32, num_heads=8, head_dim=8, num_hidden_layers=2, vocab_size=50, state_size=6, n_groups=2,
        tie_word_embeddings=tied, chunk_size=8,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = Mamba2ForCausalLM(config)
    theirs.save_pretrained(tmp_path / "theirs")
    run, step = import_model(str(tmp_path / "theirs"), tmp_path / "run", None)
    assert step == 0
    assert run.config["model"]["model_type"] == "pico_statespace"
    tokens = torch.randint(0, 50, (2, 21))
    with torch.no_grad():
        torch.testing.assert_close(load_model(run, 0)(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-5)


def test_a_round_trip_keeps_every_bit(state_space_run: Run, tmp_path: Path) -> None:
    export(state_space_run, STEP, "mamba2", tmp_path / "out")
    assert (tmp_path / "out" / "pico.json").exists()
    back, step = import_model(str(tmp_path / "out"), tmp_path / "back", None)
    assert step == STEP
    assert same(state_space_run, back)
    assert back.config["model"] == state_space_run.config["model"]


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_there_and_back_is_the_identity(layers: int, groups: int, heads: int, size: int, kernel: int) -> None:
    width = groups * heads * size
    config = StateSpaceConfig(
        d_model=width,
        expand=1,
        n_layers=layers,
        vocab_size=7,
        state_size=3,
        head_dim=size,
        n_groups=groups,
        conv_kernel=kernel,
    )
    weights = {name: torch.randn(p.shape) for name, p in StateSpace(config).named_parameters()}
    there = to_mamba2(weights, config)
    assert statespace_config(mamba2_config(config, "float32", {})) == config
    back = from_mamba2(there, config)
    assert sorted(back) == sorted(weights)
    assert all(torch.equal(back[name], value) for name, value in weights.items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"time_step_limit": [0.0, 0.02]}, "time_step_limit is [0.0, 0.02]: steps are not clamped here"),
        ({"time_step_limit": [0.001, "Infinity"]}, "time_step_limit is [0.001, inf]"),
        ({"use_bias": True}, "use_bias is true: there are no biases in the projections"),
        ({"use_conv_bias": False}, "use_conv_bias is false: the convolutions have biases"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', not 'silu'"),
        ({"rms_norm": False}, "rms_norm is False: the norm is an RMSNorm of the gated values"),
        ({"norm_before_gate": True}, "norm_before_gate is True"),
        ({"num_heads": 5}, "num_heads is 5, and expand * hidden_size / head_dim 6"),
        ({"n_groups": 4}, "6 heads are not 4 groups of one size"),
        ({"quantization_config": {"bits": 4}}, "its weights are quantized"),
        ({"model_type": "mamba"}, "model_type is 'mamba', not 'mamba2'"),
    ],
)
def test_a_model_that_computes_something_else_is_refused_with_the_reason(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(PicoError) as refusal:
        statespace_config(GOOD | changes)
    assert words in str(refusal.value)
    assert str(refusal.value).startswith("a Pico state space model cannot compute what this model computes: ")


def test_an_open_limit_is_none_however_it_is_written() -> None:
    for limit in ([0.0, math.inf], [0.0, "Infinity"], [0, {"__float__": "Infinity"}], None):
        assert statespace_config(GOOD | {"time_step_limit": limit}) == SHAPE


@pytest.mark.parametrize(("key", "value"), [("state_size", "many"), ("time_step_limit", "none"), ("n_groups", [1])])
def test_a_number_that_is_none_is_named(key: str, value: Any) -> None:
    with pytest.raises(PicoError, match=f"config.json of the model: .*{key}"):
        statespace_config(GOOD | {key: value})


def test_tensors_without_a_place_and_of_other_shapes_are_named(state_space_run: Run, tmp_path: Path) -> None:
    name = "backbone.layers.0.mixer.in_proj.weight"
    for number, (change, words) in enumerate([
        (lambda t: t.update(other=torch.zeros(2)), "holds other, for which there is no place in a Pico state space model"),
        (lambda t: t.pop(name), f"does not hold {name}; is a file of it missing"),
        (lambda t: t.update({name: torch.zeros(3, 24)}), rf"{name} has 3 rows; its configuration says \d+"),
    ]):  # fmt: skip
        out = tmp_path / f"out{number}"
        export(state_space_run, STEP, "mamba2", out)
        tensors = load_file(out / "model.safetensors")
        change(tensors)
        save_file(tensors, out / "model.safetensors")
        with pytest.raises(PicoError, match=words):
            import_model(str(out), tmp_path / "new", None)
        assert not (tmp_path / "new").exists()


def test_formats_of_other_architectures_are_refused(state_space_run: Run, fox: Run, tmp_path: Path) -> None:
    with pytest.raises(PicoError, match="StateSpace has no Llama equivalent"):
        export(state_space_run, STEP, "llama", tmp_path / "out")
    with pytest.raises(PicoError, match="Decoder has no Mamba-2 equivalent: only pico_statespace"):
        export(fox, STEP, "mamba2", tmp_path / "out")
