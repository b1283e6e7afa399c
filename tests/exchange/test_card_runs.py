"""What the card says about loading a step is run, in another process, by transformers alone."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.exchange.conftest import client_environment
from tests.hub_writing import WritableHub

from picolm.exchange.push import Sender, push
from picolm.store import Run

COMPARED = """
import sys, torch
assert "picolm" not in sys.modules
here = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokens = torch.arange(12)[None]
assert torch.equal(model(tokens).logits, here(tokens).logits)
print("the same logits")
"""


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 6])
def test_a_step_is_loaded_as_the_card_says(
    hub: WritableHub, train: Callable[..., Run], tmp_path: Path, step: int
) -> None:
    run = train()
    push(Sender(run, "lab/run"))
    card = (hub.repository("lab/run").commits("toy") or [])[0].files["README.md"].decode()
    snippet = card.split("```python\n")[1].split("```")[0]
    assert "step = 6\n" in snippet
    (tmp_path / "as_said.py").write_text(snippet.replace("step = 6\n", f"step = {step}\n") + COMPARED)
    done = subprocess.run(
        [sys.executable, "as_said.py", str(run.step_path(step))], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env=client_environment(hub, tmp_path / "client"),
    )  # fmt: skip
    assert done.stdout.endswith("the same logits\n"), done.stderr
