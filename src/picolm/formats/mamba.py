"""Export a Mamba2ForCausalLM: a folder that transformers and compatible tools load without Pico's code."""

import json
from pathlib import Path

from picolm.formats import FORMATS, Exported, write_tokenizer
from picolm.models import MODELS
from picolm.models.mamba2 import check_equivalent, mamba2_config, to_mamba2


@FORMATS.add("mamba2")
def mamba2(exported: Exported, folder: Path) -> None:
    """Write config.json, model.safetensors, generation_config.json and the tokenizer's files.

    Raises PicoError if the model is not a Pico state space model.
    """
    from safetensors.torch import save_file

    check_equivalent(MODELS.get(exported.config.model_type))
    config = mamba2_config(exported.config, exported.dtype, exported.generation)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: tensor.contiguous() for name, tensor in to_mamba2(exported.weights, exported.config).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(exported, folder)
