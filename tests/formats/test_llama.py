"""A Llama of transformers computes what we compute, without a line of our code; what does not fit is refused."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.alone import HIDE
from tests.fox import STEP, folder_of, same
from tests.hub_server import FakeHub, Folder

from picolm.errors import PicoError
from picolm.formats import export
from picolm.formats.importing import import_model
from picolm.models import Decoder, DecoderConfig
from picolm.models.llama import decoder_config, from_llama, llama_config, to_llama
from picolm.store import Run
from picolm.train.sample import load_model

WITHOUT_PICOLM = (
    HIDE
    + """
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
place, prompt = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(place)
tokenizer = AutoTokenizer.from_pretrained(place)
tokens = load_file(prompt)["tokens"]
written = model.generate(tokens, max_new_tokens=40, do_sample=False)
print(json.dumps({
    "class": type(model).__name__, "dtype": str(model.dtype), "picolm": "picolm" in sys.modules,
    "theta": model.config.rope_parameters["rope_theta"], "ends": [model.config.bos_token_id, model.config.eos_token_id],
    "text": tokenizer.decode(written[0]), "tokens": tokenizer("The lazy fox doesn't")["input_ids"],
}))
save_file({"logits": model(tokens).logits.detach(), "written": written}, place + "/found.safetensors")
"""
)


@pytest.mark.slow
def test_transformers_without_picolm_gives_the_same_logits_and_the_same_text(
    fox: Run, prompt: torch.Tensor, tmp_path: Path
) -> None:
    assert export(fox, None, "llama", tmp_path / "out") == STEP
    save_file({"tokens": prompt}, tmp_path / "prompt.safetensors")
    done = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_PICOLM, f"{tmp_path}/out", f"{tmp_path}/prompt.safetensors"],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    from picolm.data.tokenizer import load_tokenizer

    model, found = load_model(fox), load_file(tmp_path / "out" / "found.safetensors")
    written = model.generate(prompt, 40, eos=0)
    assert written.shape[1] > prompt.shape[1] + 5
    assert torch.equal(found["written"], written)
    logits = model(prompt).detach()
    assert (logits.max() - logits.min()) > 5  # it is no uniform model
    torch.testing.assert_close(found["logits"], logits, rtol=0, atol=1e-5)
    assert json.loads(done.stdout) == {
        "class": "LlamaForCausalLM", "dtype": "torch.float32", "picolm": False, "theta": 5000.0, "ends": [0, 0],
        "text": load_tokenizer(fox.step_path(STEP)).decode(written[0].tolist(), skip_special_tokens=False),
        "tokens": prompt[0].tolist(),
    }  # fmt: skip


def test_an_export_is_a_folder_of_transformers_and_nothing_else(fox: Run, tmp_path: Path) -> None:
    export(fox, STEP, "llama", tmp_path / "out")
    assert folder_of(tmp_path / "out") == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "pico.json",
    }  # fmt: skip
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5000.0  # for transformers 4 and 5
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert (config["head_dim"], config["tie_word_embeddings"], config["attention_bias"]) == (16, False, False)
    assert not list(tmp_path.glob(".*"))


def test_names_are_those_of_the_model_in_order() -> None:
    from picolm.models.llama import names

    config = DecoderConfig(n_layers=2)
    with torch.device("meta"):
        assert list(names(config)) == [name for name, _ in Decoder(config).named_parameters()]


@given(heads=st.sampled_from([1, 2, 3, 6]), groups=st.sampled_from([1, 2, 3]), half=st.integers(1, 5))
def test_there_and_back_is_the_identity_and_scores_are_the_same(heads: int, groups: int, half: int) -> None:
    config = DecoderConfig(d_model=2 * half * heads * groups, attention_n_heads=heads * groups, attention_n_kv_heads=heads,
                           n_layers=1, vocab_size=5, activation_hidden_dim=3, max_seq_len=9)  # fmt: skip
    model = Decoder(config)
    model.init_parameters(torch.Generator().manual_seed(heads))
    weights = dict(model.state_dict())
    there = to_llama(weights, config)
    back = from_llama(there, config)
    assert list(back) == list(weights)
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())
    q, k = (there[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qk")
    assert sorted(q.flatten().tolist()) == sorted(weights["layers.0.attention.q_proj.weight"].flatten().tolist())
    own = weights["layers.0.attention.k_proj.weight"].unflatten(0, (heads, half, 2))  # N F 2 H
    assert torch.equal(k.unflatten(0, (heads, 2, half)), own.transpose(1, 2))


@given(config=st.builds(
    lambda heads, groups, half, layers, theta: DecoderConfig(
        d_model=2 * half * heads * groups, attention_n_heads=heads * groups, attention_n_kv_heads=heads, n_layers=layers,
        position_emb_theta=theta, norm_eps=theta / 1e10),
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 9), st.integers(1, 3), st.floats(1.0, 1e6)))  # fmt: skip
def test_a_shape_survives_its_config_json(config: DecoderConfig) -> None:
    assert decoder_config(json.loads(json.dumps(llama_config(config, "float32", {})))) == config


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_round_trip_keeps_every_bit(make_run: Callable[..., Run], tmp_path: Path, dtype: torch.dtype) -> None:
    run = make_run(dtype)
    for name in ("llama", "torch"):
        export(run, STEP, name, tmp_path / name)
        again, step = import_model(str(tmp_path / name), tmp_path / f"{name}-run", None)
        assert (step, again.steps) == (STEP, [STEP])
        assert same(run, again)
        assert again.problems(STEP) == []
        assert again[STEP].read("config.json") == run[STEP].read("config.json")
        assert again[STEP].read("tokenizer.json") == run[STEP].read("tokenizer.json")
        assert again.environment["imported"] == {"imported_from": str(tmp_path / name), "run": "fox", "step": STEP}


@pytest.mark.slow
def test_an_imported_run_is_a_run(fox: Run, prompt: torch.Tensor, tmp_path: Path) -> None:
    from picolm.train.fork import fork
    from picolm.train.sample import sample

    export(fox, STEP, "torch", tmp_path / "out")
    run, _ = import_model(str(tmp_path / "out"), tmp_path / "again", 12)
    assert run.steps == [12]
    assert torch.equal(load_model(run)(prompt), load_model(fox)(prompt))
    options: dict[str, Any] = {"max_new_tokens": 20, "seed": 5, "temperature": 0.7}
    assert sample(str(run.path), None, "The", **options) == sample(str(fox.path), None, "The", **options)
    with pytest.raises(PicoError, match="has no whole checkpoint with optimizer state up to step 12"):
        fork(run, 12, "new", [])


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_that_transformers_made_becomes_a_run(tied: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 50, "max_position_embeddings": 40, "initializer_range": 0.3}  # fmt: skip
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, tie_word_embeddings=tied)).eval()
    theirs.save_pretrained(tmp_path / "llama", max_shard_size="10KB")  # in several files
    assert (tmp_path / "llama" / "model.safetensors.index.json").exists()
    run, step = import_model(str(tmp_path / "llama"), tmp_path / "run", None)
    assert step == 0
    ours, tokens = load_model(run), torch.arange(40)[None]
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-5)


GOOD = llama_config(DecoderConfig(d_model=32, attention_n_heads=4, attention_n_kv_heads=2, n_layers=1), "float32", {})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral', not 'llama'"),
        ({"attention_bias": True}, "attention_bias is True: there are no biases in attention"),
        ({"mlp_bias": True}, "mlp_bias is True: there are no biases in the MLP"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', not 'silu'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "rope_parameters": None}, "(rope_type 'llama3')"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
            "rotary positions are scaled (rope_type 'yarn')",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}, "(rope_type 'linear')"),
        ({"head_dim": 16}, "head_dim is 16, and 4 heads of it are not hidden_size = 32"),
        ({"quantization_config": {"bits": 4}}, "its weights are quantized"),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3 key-value heads evenly; use one of 1, 2, 4"),
    ],
)
def test_a_model_that_computes_something_else_is_refused_with_the_reason(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(PicoError) as refusal:
        decoder_config(GOOD | changes)
    assert words in str(refusal.value)
    assert str(refusal.value).startswith("a Pico decoder cannot compute what this model computes: ")


def test_all_reasons_are_told_at_once() -> None:
    with pytest.raises(PicoError, match=r"attention_bias.*; hidden_act"):
        decoder_config(GOOD | {"attention_bias": True, "hidden_act": "relu"})


def test_the_base_of_old_and_new_files_is_read() -> None:
    old = {key: value for key, value in GOOD.items() if key not in ("rope_parameters", "head_dim")}
    assert decoder_config(old | {"rope_theta": 500.0}).position_emb_theta == 500.0
    assert decoder_config(GOOD | {"rope_theta": None}).position_emb_theta == 10000.0
    without = {key: value for key, value in old.items() if key not in ("rope_theta", "num_key_value_heads")}
    assert decoder_config(without).position_emb_theta == 10000.0
    assert decoder_config(without).attention_n_kv_heads == 4


def damaged(place: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> str:
    tensors = load_file(place / "model.safetensors")
    change(tensors)
    save_file(tensors, place / "model.safetensors")
    return str(place)


def test_tensors_without_a_place_and_places_without_a_tensor_are_named(fox: Run, tmp_path: Path) -> None:
    bias = "model.layers.0.self_attn.q_proj.bias"
    for number, (change, words) in enumerate([
        (lambda t: t.update({bias: torch.zeros(64)}), rf"holds {bias}, for which .* \(Pico decoders have no biases\)"),
        (lambda t: t.pop("model.norm.weight"), "does not hold model.norm.weight; is a file of it missing"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), r"output_norm.weight has shape \(3,\); .* says \(64,\)"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(64).int()}), "output_norm.weight holds torch.int32"),
        (lambda t: t["model.norm.weight"].fill_(torch.nan), r"output_norm.weight holds NaN or infinities \(64 of 64 numbers"),
    ]):  # fmt: skip
        export(fox, STEP, "llama", tmp_path / f"out{number}")
        with pytest.raises(PicoError, match=words):
            import_model(damaged(tmp_path / f"out{number}", change), tmp_path / "run", None)
        assert not (tmp_path / "run").exists()


def test_what_is_no_model_is_told(fox: Run, tmp_path: Path) -> None:
    with pytest.raises(PicoError, match=r"is no folder, and not the form OWNER/NAME\[@REVISION\]"):
        import_model(str(tmp_path / "nothing"), tmp_path / "run", None)
    with pytest.raises(PicoError, match=r"holds neither config\.json"):
        import_model(str(tmp_path), tmp_path / "run", None)
    with pytest.raises(PicoError, match="is a checkpoint of a run already"):
        import_model(str(fox.step_path(STEP)), tmp_path / "run", None)
    with pytest.raises(PicoError, match="holds a run already"):
        import_model(str(tmp_path), fox.path, None)


def test_an_export_overwrites_nothing_and_leaves_nothing_half_done(fox: Run, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(PicoError, match="is there already"):
        export(fox, STEP, "llama", tmp_path / "full")
    with pytest.raises(PicoError, match=r"unknown format 'lama'; did you mean 'llama'\? \(there are: "):
        export(fox, STEP, "lama", tmp_path / "out")
    assert folder_of(tmp_path) == {"full/mine.txt"}


def test_a_model_without_a_llama_equivalent_is_refused(fox: Run) -> None:
    from picolm.models.llama import check_equivalent

    class Bidirectional(Decoder):
        pass

    with pytest.raises(
        PicoError, match=r"Bidirectional has no Llama equivalent: only pico_decoder .* use --format torch"
    ):
        check_equivalent(Bidirectional)


def test_the_commands_say_what_they_did(fox: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from picolm.cli import app

    def pico(*words: str) -> str:
        app(list(words), standalone_mode=False)
        return capsys.readouterr().out

    out = pico("export", str(fox.path), "--out", f"{tmp_path}/out")
    assert out == f"Step 7 of {fox.path} is in {tmp_path}/out, in the format llama.\n"
    out = pico("import", f"{tmp_path}/out", "--out", f"{tmp_path}/run", "--step", "3")
    assert out == f"{tmp_path}/run holds it as step 3.  See:  pico list {tmp_path}/run\n"
    assert Run.open(tmp_path / "run").steps == [3]


@pytest.mark.slow
def test_a_model_on_the_hub_becomes_a_run(fox: Run, tmp_path: Path) -> None:
    export(fox, STEP, "llama", tmp_path / "out")
    with FakeHub({"models/lab/fox": Folder(tmp_path / "out")}).serving() as server:
        settings = {
            "HF_ENDPOINT": server.url,
            "HF_HOME": f"{tmp_path}/home",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }
        for place, words in (("lab/fox@main", ""), ("lab/nothing", "lab/nothing")):
            done = subprocess.run(
                [sys.executable, "-m", "picolm", "import", place, "--out", f"{tmp_path}/{place[:7]}"],
                env=os.environ | settings, capture_output=True, text=True, timeout=100,
            )  # fmt: skip
            assert (done.returncode == 0) == (not words), done.stderr
            assert words in done.stderr
            assert "Traceback" not in done.stderr
    run = Run.open(tmp_path / "lab" / "fox")
    assert same(run, fox)
    assert run[STEP].read("tokenizer.json") == fox[STEP].read("tokenizer.json")
    assert not (tmp_path / "lab" / "not").exists()


NUMBERS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings rms_norm_eps rope_theta"
)


@pytest.mark.parametrize("key", NUMBERS.split())
@pytest.mark.parametrize("value", [{"k": "x"}, [], "many", True, {"head_dim": 8}])
def test_a_number_that_is_none_is_named(key: str, value: Any) -> None:
    with pytest.raises(PicoError, match=rf"config.json of the model: {key}: should be a valid"):
        decoder_config(GOOD | {"head_dim": 8} | {key: value})
