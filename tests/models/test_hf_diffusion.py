"""A checkpoint of masked diffusion opens in transformers as a masked language model, where this package does not exist."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.alone import HIDE
from tests.models.test_hf import write
from torch.nn.functional import cross_entropy, pad

from picolm.models import Diffusion, DiffusionConfig

pytestmark = pytest.mark.slow

WITHOUT_PICOLM = (
    HIDE
    + """
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForMaskedLM
place = sys.argv[1]
given = load_file(place + "/given.safetensors")
model = AutoModelForMaskedLM.from_pretrained(place, trust_remote_code=True).eval()
output = model(input_ids=given["masked"], labels=given["labels"], output_attentions=True)
found = {"logits": output.logits, "loss": output.loss, "attention": output.attentions[1]}
for side, sizes in (("right", (0, 4)), ("left", (4, 0))):
    padded = torch.nn.functional.pad(given["masked"], sizes)
    mask = torch.nn.functional.pad(torch.ones_like(given["masked"]), sizes)
    logits = model(padded, attention_mask=mask).logits
    found[side] = logits[:, 4:] if side == "left" else logits[:, :-4]
found["filled"] = model.infill(given["masked"])
found["written"] = model.generate(given["tokens"][:, :5], max_new_tokens=8, order="left_to_right")
model.save_pretrained(place + "/again")
found["again"] = AutoModelForMaskedLM.from_pretrained(place + "/again", trust_remote_code=True)(given["masked"]).logits
save_file({name: value.detach().contiguous() for name, value in found.items()}, place + "/found.safetensors")
config = AutoConfig.from_pretrained(place, trust_remote_code=True)
known_as = [config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.mask_token_id,
            config.max_position_embeddings]
print(json.dumps({"known_as": known_as, "picolm": "picolm" in sys.modules, "transformers": transformers.__version__}))
"""
)


@pytest.fixture
def small() -> Diffusion:
    config = DiffusionConfig(d_model=48, n_layers=2, vocab_size=101, max_seq_len=40, attention_n_heads=6,
                             attention_n_kv_heads=2, activation_hidden_dim=80)  # fmt: skip
    model = Diffusion(config)
    model.init_parameters(torch.Generator().manual_seed(1))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8.0)
    return model.eval()


@torch.no_grad()
def test_it_loads_and_agrees_where_picolm_is_not_installed(small: Diffusion, tmp_path: Path) -> None:
    place = tmp_path / "step_7"
    write(small, place)  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 101, (3, 21), generator=generator)
    hidden = torch.rand(tokens.shape, generator=generator) < 0.4
    hidden[:, 0] = False
    masked, labels = tokens.masked_fill(hidden, small.mask), tokens.masked_fill(~hidden, -100)
    save_file({"tokens": tokens, "masked": masked, "labels": labels}, place / "given.safetensors")
    found = run(place)
    expected = small(masked)
    for name in ("logits", "right", "left"):
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(found["again"], found["logits"])
    assert found["loss"].item() == pytest.approx(cross_entropy(expected[hidden], tokens[hidden]).item(), rel=1e-5)
    torch.testing.assert_close(found["attention"], small.with_patterns(masked)[1][1])
    torch.testing.assert_close(found["attention"].sum(-1), torch.ones(3, 6, 21))
    assert torch.equal(found["filled"], small.infill(masked))
    assert torch.equal(found["written"], small.generate(tokens[:, :5], 8, order="left_to_right"))


def run(place: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_PICOLM, str(place)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(place.parent / "home")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert not said["picolm"]
    assert said["known_as"] == [48, 2, 6, 101, 41]
    return load_file(place / "found.safetensors")


def test_what_it_does_not_take_is_said(small: Diffusion) -> None:
    from picolm.models.hf_diffusion import PicoDiffusionHF, PicoDiffusionHFConfig

    model = PicoDiffusionHF(PicoDiffusionHFConfig(**{**vars(small.config), "model_type": "pico_diffusion"})).eval()
    tokens = torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(TypeError, match="unexpected keyword argument 'past_key_values'; leave it out"):
        model(tokens, past_key_values=object())
    with pytest.raises(ValueError, match="attention_mask of shape"):
        model(tokens, attention_mask=torch.ones(2, 4))
    with torch.no_grad():
        nothing = model(pad(tokens, (0, 1)), attention_mask=torch.zeros(2, 6)).logits
    assert nothing.isfinite().all()
    assert len(model(tokens, return_dict=False)) == 1
