"""A small run, and what one of its steps holds."""

from pathlib import Path
from typing import Any

import pytest
import torch

from picolm.address import Address
from picolm.store import Run


def step_content(seed: int = 0) -> dict[str, Any]:
    """Arguments of `Run.commit`: every kind of tensor, rows, texts."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {
        Address("weights", "", "layers.10.attention.o_proj"): random(6, 4),
        Address("weights", "", "layers.2.attention.o_proj"): random(6, 4),
        Address("weights", "", "layers.2.attention.o_proj.bias"): random(6),
        Address("weights", "", "layers.2.mixer.A_log"): random(3),
        Address("exp_avg", "", "layers.2.attention.o_proj"): random(6, 4),
        Address("exp_avg_sq", "", "layers.2.attention.o_proj"): random(6, 4).square(),
        Address("gradients", "train", "layers.2.attention.o_proj"): random(6, 4),
        Address("activations", "train", "layers.2.attention.o_proj"): random(5, 6).bfloat16(),
        Address("activations", "val", "layers.2.attention.o_proj"): random(2, 6),
    }
    rows = {"input_ids": torch.arange(20).reshape(5, 4), "text": ["a", "b", "ü", "", "e"], "row": [7, 8, 9, 10, 11]}
    return {
        "tensors": tensors,
        "meta": {"step": seed, "loss": 2.5, "rng": "00ff"},
        "texts": {"config.json": '{"model_type": "x"}\n', "modeling_x.py": "x = 1\n", "tokenizer.json": b"{}"},
        "tables": {"train": rows},
        "weight_prefix": "pico_decoder.",
        "parameters": ["layers.2.mixer.A_log"],
    }


@pytest.fixture
def content() -> dict[str, Any]:
    return step_content()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "demo", {"model": {"d_model": 96}}, {"torch": "2"})
