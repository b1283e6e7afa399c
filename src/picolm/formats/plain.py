"""A state dict of torch, for code of one's own: the names and shapes of the parameters as the model has them."""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from picolm.formats import FORMATS, Exported, write_tokenizer

STATE_DICT = "state_dict.pt"
CONFIG = "model_config.json"


@FORMATS.add("torch")
def plain(exported: Exported, folder: Path) -> None:
    """state_dict.pt (`torch.load(…, weights_only=True)`), model_config.json (the model section), the tokenizer's files."""
    torch.save(exported.weights, folder / STATE_DICT)
    (folder / CONFIG).write_text(json.dumps(asdict(exported.config), indent=2) + "\n")
    write_tokenizer(exported, folder)
