"""Export a LlamaForCausalLM: a folder that transformers and compatible tools load without Pico's code."""

import json
from pathlib import Path

from picolm.formats import FORMATS, Exported, write_tokenizer
from picolm.models import MODELS
from picolm.models.llama import check_equivalent, llama_config, to_llama


@FORMATS.add("llama")
def llama(exported: Exported, folder: Path) -> None:
    """Write config.json, model.safetensors, generation_config.json and the tokenizer's files.

    Raises PicoError if the model is not a Pico decoder.
    """
    from safetensors.torch import save_file

    check_equivalent(MODELS.get(exported.config.model_type))
    config = llama_config(exported.config, exported.dtype, exported.generation)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = to_llama(exported.weights, exported.config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(exported, folder)
