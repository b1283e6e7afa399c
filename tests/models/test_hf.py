"""A checkpoint directory opens in transformers where this package does not exist."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.alone import HIDE
from tests.fox import STEP

from picolm.formats import export
from picolm.models import Decoder
from picolm.store import Run

SCRIPT = Path(__file__).with_name("beside_llama.py")

WITHOUT_PICOLM = (
    HIDE
    + """
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
place = sys.argv[1]
tokens = load_file(place + "/tokens.safetensors")["tokens"]
model = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True)
found = {
    "logits": model(tokens).logits,
    "loss": model(tokens, labels=tokens).loss,
    "cached": model.generate(tokens, max_new_tokens=20, do_sample=False, use_cache=True),
    "uncached": model.generate(tokens, max_new_tokens=20, do_sample=False, use_cache=False),
}
padded = torch.nn.functional.pad(tokens, (4, 0))
mask = torch.nn.functional.pad(torch.ones_like(tokens), (4, 0))
found["padded"] = model.generate(padded, attention_mask=mask, max_new_tokens=20, do_sample=False)[:, 4:].contiguous()
model.save_pretrained(place + "/again")
again = AutoModelForCausalLM.from_pretrained(place + "/again", trust_remote_code=True)
found["again"] = again(tokens).logits
save_file({name: value.detach() for name, value in found.items()}, place + "/found.safetensors")
config = model.config
known_as = [config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads]
print(json.dumps({"known_as": known_as, "dtype": str(model.dtype), "picolm": "picolm" in sys.modules}))
"""
)


def write(model: Decoder, place: Path) -> None:
    """As the trainer does, by the model's own account of itself."""
    place.mkdir()
    state = {model.state_prefix + name: value for name, value in model.state_dict().items()}
    save_file(state, place / "model.safetensors", metadata={"format": "pt"})
    (place / "config.json").write_text(json.dumps(model.hf_config()))
    for name, text in model.modelling_files().items():
        (place / name).write_text(text)


@pytest.mark.slow
def test_it_loads_generates_and_agrees_where_picolm_is_not_installed(model, tokens, tmp_path):
    place = tmp_path / "step_7"
    write(model, place)
    prompt = tokens[:, :9].contiguous()
    save_file({"tokens": prompt}, place / "tokens.safetensors")
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_PICOLM, str(place)],
        env=offline,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"known_as": [48, 3, 6, 2], "dtype": "torch.float32", "picolm": False}
    found = load_file(place / "found.safetensors")
    torch.testing.assert_close(found["logits"], model(prompt).detach(), rtol=1e-6, atol=1e-6)
    assert torch.equal(found["again"], found["logits"])
    expected = model.generate(prompt, 20)
    for how in ("cached", "uncached", "padded"):
        assert torch.equal(found[how], expected), how
    loss = model.loss(prompt)
    assert found["loss"].item() == pytest.approx(loss.nats.item() / loss.tokens, rel=1e-5)


@pytest.mark.slow
def test_every_use_by_transformers_gives_what_the_llama_export_gives(fox: Run, tmp_path: Path) -> None:
    """See `beside_llama.py`, which runs in the installed version of transformers, without this package."""
    export(fox, STEP, "llama", tmp_path / "llama")
    script = (
        HIDE
        + f"import runpy\nsys.argv = sys.argv[:1] + sys.argv[2:]\nrunpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", script, "-", str(fox.step_path(STEP)), f"{tmp_path}/llama"],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"transformers {found['transformers']}, torch {found['torch']}: {len(found['differences'])} uses compared")
    assert max(found["differences"].values()) < 2e-4


def test_the_files_that_travel_import_nothing_of_this_package(model):
    files = model.modelling_files()
    assert not [name for name, text in files.items() if "picolm" in text]
    assert [name for name, text in files.items() if "import transformers" in text or "from transformers" in text] == [
        "pico_decoder.py"
    ]


@pytest.mark.slow
def test_a_checkpoint_as_published_loads_without_its_own_code(model, tokens, tmp_path):
    """Published config.json files have no `init`; published modelling code does not run with transformers 5."""
    from picolm.models.hf import PicoDecoderHF, PicoDecoderHFConfig

    write(model, tmp_path / "published")
    config = model.hf_config()
    for later in ("init", "use_cache", "tie_word_embeddings", "dtype"):
        del config[later]
    (tmp_path / "published" / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    loaded = PicoDecoderHF.from_pretrained(
        tmp_path / "published", config=PicoDecoderHFConfig.from_pretrained(tmp_path / "published")
    )
    torch.testing.assert_close(loaded(tokens).logits, model(tokens), rtol=1e-6, atol=1e-6)
    assert loaded.config.tie_word_embeddings is False
