"""Export a PyTorch state dict for your own code, with the model's parameter names and shapes."""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from picolm.formats import FORMATS, Exported, write_tokenizer

STATE_DICT = "state_dict.pt"
CONFIG = "model_config.json"


@FORMATS.add("torch")
def plain(exported: Exported, folder: Path) -> None:
    """Write state_dict.pt (`torch.load(…, weights_only=True)`), model_config.json (model section), tokenizer files."""
    torch.save(exported.weights, folder / STATE_DICT)
    (folder / CONFIG).write_text(json.dumps(asdict(exported.config), indent=2) + "\n")
    write_tokenizer(exported, folder)
