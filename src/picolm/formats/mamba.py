"""Export a Mamba2ForCausalLM: a folder that transformers and compatible tools load without Pico's code."""

from pathlib import Path

from picolm.formats import FORMATS, Exported, write_for_transformers
from picolm.models import MODELS
from picolm.models.mamba2 import check_equivalent, mamba2_config, to_mamba2


@FORMATS.add("mamba2")
def mamba2(exported: Exported, folder: Path) -> None:
    """Write config.json, model.safetensors, generation_config.json and the tokenizer's files.

    Raises PicoError if the model is not a Pico state space model.
    """
    check_equivalent(MODELS.get(exported.config.model_type))
    config = mamba2_config(exported.config, exported.dtype, exported.generation)
    write_for_transformers(exported, folder, config, to_mamba2(exported.weights, exported.config))
