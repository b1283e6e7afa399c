"""Export a LlamaForCausalLM: a folder that transformers and compatible tools load without Pico's code."""

from pathlib import Path

from picolm.formats import FORMATS, Exported, write_for_transformers
from picolm.models import MODELS
from picolm.models.llama import check_equivalent, llama_config, to_llama


@FORMATS.add("llama")
def llama(exported: Exported, folder: Path) -> None:
    """Write config.json, model.safetensors, generation_config.json and the tokenizer's files.

    Raises PicoError if the model is not a Pico decoder.
    """
    check_equivalent(MODELS.get(exported.config.model_type))
    config = llama_config(exported.config, exported.dtype, exported.generation)
    write_for_transformers(exported, folder, config, to_llama(exported.weights, exported.config))
