"""Models of transformers with random weights, saved as a training leaves them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40, "vocab_size": 61,
         "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": GROUPED | {"head_dim": 8},
    "olmo": GROUPED,
    "olmo2": GROUPED,
    "gemma": GROUPED | {"head_dim": 10},
    "gemma2": GROUPED | {"head_dim": 10},
    "qwen2": GROUPED,
    "qwen3": GROUPED | {"head_dim": 10},
    "smollm3": GROUPED,
    "phi": SMALL | {"hidden_size": 32},  # half of a head is turned, in pairs
    "phi3": GROUPED,
    "gpt_neox": SMALL,
    "gpt2": {"n_embd": 24, "n_layer": 2, "n_head": 4, "vocab_size": 61, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0},
}  # fmt: skip


def make(family: str, seed: int = 0, **changes: Any) -> Any:
    """A model of a family with random weights, biases too, in evaluation mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **CONFIGS[family] | changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    return model


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """A function that saves a model as a step of the series in `tmp_path / "series"`, and returns the series."""

    def save(model: Any, folder: str, **options: Any) -> Path:
        model.save_pretrained(tmp_path / "series" / folder, **options)
        return tmp_path / "series"

    return save
