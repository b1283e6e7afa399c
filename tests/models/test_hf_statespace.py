"""A checkpoint of the state space model loads, generates and trains in transformers with nothing of this package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.alone import HIDE

from picolm.models import StateSpace, StateSpaceConfig

from .test_hf import write

WITHOUT_PICOLM = (
    HIDE
    + """
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
place = sys.argv[1]
tokens = load_file(place + "/tokens.safetensors")["tokens"]
model = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True)
options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
found = {
    "logits": model(tokens).logits,
    "loss": model(tokens, labels=tokens).loss,
    "cached": model.generate(tokens, use_cache=True, **options),
    "uncached": model.generate(tokens, use_cache=False, **options),
    "beams": model.generate(tokens, num_beams=3, num_return_sequences=2, **options),
    "beams_uncached": model.generate(tokens, num_beams=3, num_return_sequences=2, use_cache=False, **options),
}
padded = torch.nn.functional.pad(tokens, (4, 0))
mask = torch.nn.functional.pad(torch.ones_like(tokens), (4, 0))
found["padded"] = model.generate(padded, attention_mask=mask, **options)[:, 4:].contiguous()
right = torch.nn.functional.pad(tokens, (0, 4))
mask = torch.nn.functional.pad(torch.ones_like(tokens), (0, 4))
found["right"] = model(right, attention_mask=mask).logits[:, :9].contiguous()
positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]])
found["packed"] = model(tokens, position_ids=positions, use_cache=False).logits
found["packed_states"] = model(tokens, position_ids=positions, use_cache=False, output_hidden_states=True).hidden_states[1]
found["embedded"] = model(inputs_embeds=model.get_input_embeddings()(tokens), logits_to_keep=1).logits
first = model(tokens[:, :4], use_cache=True)
name = "cache" if "cache" in first else "past_key_values"
found["continued"] = model(tokens[:, 4:], **{name: first[name]}).logits
refusals = []
holes = torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1, 1]]).expand(3, -1)
for call in (
    lambda: model(tokens, attention_mask=holes),
    lambda: model(tokens, attention_mask=torch.ones(3, 8)),
    lambda: model(tokens, attention_mask=torch.ones(3, 1, 9, 9)),
    lambda: model(tokens, past_key_values=[]),
    lambda: model(tokens, output_attentions=True),
    lambda: model(tokens, position_ids=positions[0]),
    lambda: model(),
    lambda: model.generate(tokens[:1], prompt_lookup_num_tokens=3, **options),
):
    try:
        call()
        refusals.append("nothing was refused")
    except (TypeError, ValueError) as error:
        refusals.append(str(error))
gradients = []
for again in (False, True):
    model.train()
    if again:
        model.gradient_checkpointing_enable()
    model.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
found["gradients"], found["gradients_again"] = gradients
model.save_pretrained(place + "/again")
again = AutoModelForCausalLM.from_pretrained(place + "/again", trust_remote_code=True)
found["again"] = again(tokens).logits
save_file({name: value.detach().contiguous() for name, value in found.items()}, place + "/found.safetensors")
config = model.config
known_as = [config.hidden_size, config.num_hidden_layers, config.state_size, config.max_position_embeddings]
print(json.dumps({"known_as": known_as, "picolm": "picolm" in sys.modules, "refusals": refusals}))
"""
)
REFUSED = [
    "padding between the tokens of a row; put it before or after",
    "attention_mask is for 8 positions; there are 9",
    r"expected a tensor of [rows, positions]",
    "list keeps no states",
    "PicoStateSpaceHF.forward() got an unexpected keyword argument 'output_attentions'",
    "expected [rows, tokens]",
    "give either input_ids or inputs_embeds",
    "stateful models",
]


@pytest.fixture
def model() -> StateSpace:
    """With weights large enough that its predictions are far from uniform."""
    found = StateSpace(
        StateSpaceConfig(d_model=48, n_layers=3, vocab_size=101, max_seq_len=160, state_size=10, head_dim=8, n_groups=3)
    )
    found.init_parameters(torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if parameter.ndim == 2 and "conv" not in name:
                parameter.mul_(8.0)
    return found


@pytest.mark.slow
def test_it_loads_generates_and_agrees_where_picolm_is_not_installed(model: StateSpace, tmp_path: Path) -> None:
    place = tmp_path / "step_7"
    write(model, place)
    tokens = torch.randint(1, 101, (3, 9), generator=torch.Generator().manual_seed(2))
    save_file({"tokens": tokens}, place / "tokens.safetensors")
    done = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_PICOLM, str(place)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["known_as"] == [48, 3, 10, 160]
    assert not said["picolm"]
    for found, expected in zip(said["refusals"], REFUSED, strict=True):
        assert expected in found
    found = load_file(place / "found.safetensors")
    close = {"rtol": 1e-4, "atol": 1e-4}
    logits = model(tokens).detach()
    torch.testing.assert_close(found["logits"], logits, rtol=1e-6, atol=1e-6)
    assert torch.equal(found["again"], found["logits"])
    for how in ("cached", "uncached", "padded"):
        assert torch.equal(found[how], model.generate(tokens, 20)), how
    assert torch.equal(found["beams"], found["beams_uncached"])
    torch.testing.assert_close(found["right"], logits, **close)
    torch.testing.assert_close(found["embedded"], logits[:, -1:], **close)
    torch.testing.assert_close(found["continued"], logits[:, 4:], **close)
    documents = torch.cat([model(part) for part in tokens.split([4, 2, 3], 1)], 1).detach()
    torch.testing.assert_close(found["packed"], documents, **close)
    assert found["packed_states"].shape == (3, 9, 48)
    loss = model.loss(tokens)
    assert found["loss"].item() == pytest.approx(loss.nats.item() / loss.tokens, rel=1e-5)
    torch.testing.assert_close(found["gradients"], found["gradients_again"], rtol=1e-5, atol=1e-6)
    loss.nats.backward()
    ours = torch.cat([p.grad.flatten() for p in model.parameters()]) / loss.tokens
    torch.testing.assert_close(found["gradients"], ours, **close)


def test_the_files_that_travel_import_nothing_of_this_package(model: StateSpace) -> None:
    files = model.modelling_files()
    assert not [name for name, text in files.items() if "picolm" in text]
    importers = [name for name, text in files.items() if "import transformers" in text or "from transformers" in text]
    assert sorted(importers) == ["hf.py", "pico_statespace.py"]
    for name, text in files.items():  # whatever a file imports from beside it travels too
        for line in text.splitlines():
            if line.startswith("from ."):
                assert line.split()[1].removeprefix(".") + ".py" in files, (name, line)
