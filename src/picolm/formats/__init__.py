"""Convert models to and from the file formats of other tools: `export` from a run, `importing` into a run.

A format is a function that writes an `Exported` model into an empty folder, registered by name in `FORMATS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from picolm.errors import PicoError
from picolm.registry import Registry
from picolm.store.folders import new_folder
from picolm.train.sample import checkpoint_at, config_of, generation_config
from picolm.train.state import check_sizes, weight_address

if TYPE_CHECKING:
    from picolm.store import Checkpoint, Run

ORIGIN = "pico.json"  # written with each export: its run and step, for `pico import`
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


class Exported(NamedTuple):
    """A model to export. weights: by the names of the model's `named_parameters`, as they were stored.

    generation: the content of generation_config.json, with bos_token_id, eos_token_id (one or several) and
    pad_token_id, None for a token that does not exist; empty without a tokenizer. tokenizer: its files, name to
    content. origin: run, step and model_type.
    """

    config: Any
    weights: dict[str, Tensor]
    generation: dict[str, Any]
    tokenizer: dict[str, bytes]
    origin: dict[str, Any]

    @property
    def dtype(self) -> str:
        """The element type of the weights, as written in config.json. Raises PicoError if there are several."""
        found = {str(tensor.dtype).removeprefix("torch.") for tensor in self.weights.values()}
        if len(found) != 1:
            raise PicoError(
                f"the weights of {self.origin['run']} have several element types: {', '.join(sorted(found))}"
            )
        return found.pop()


Format = Callable[[Exported, Path], None]
FORMATS: Registry[Format] = Registry("format")


def export(run: Run, step: int | None, name: str, out: Path) -> int:
    """Write the model of `step` (default: the latest) to the folder `out` in the format `name`. Returns the step.

    Raises PicoError if the format cannot represent the model, or if the folder is not empty.
    """
    from picolm.formats import llama, llamacpp, mamba, plain  # noqa: F401  (each adds its format)

    write = FORMATS.get(name)
    exported = collect(run, checkpoint_at(run, step))
    with new_folder(out, "the export") as partial:
        write(exported, partial)
        (partial / ORIGIN).write_text(json.dumps(exported.origin, indent=2) + "\n")
    return int(exported.origin["step"])


def collect(run: Run, checkpoint: Checkpoint) -> Exported:
    """Return the model of a checkpoint, with its tensors as they are stored."""
    config = config_of(run).model
    weights = {name: checkpoint[weight_address(name)] for name in check_sizes(config, checkpoint)}
    files = {name: checkpoint.read(name) for name in TOKENIZER_FILES if name in checkpoint.files}
    generation = generation_config(checkpoint)
    if "eos_token_id" in generation:
        generation.setdefault("bos_token_id", generation["eos_token_id"])  # in training a text begins after an end
    origin = {"run": run.name, "step": checkpoint.step, "model_type": config.model_type}
    return Exported(config, weights, generation, files, origin)


def write_for_transformers(
    exported: Exported, folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> None:
    """Write config.json, model.safetensors, generation_config.json and the tokenizer's files."""
    from safetensors.torch import save_file

    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(exported, folder)


def write_tokenizer(exported: Exported, folder: Path) -> None:
    """Write the tokenizer's files and generation_config.json (the tokens that begin, end and pad a text)."""
    for name, content in exported.tokenizer.items():
        (folder / name).write_bytes(content)
    if exported.generation:
        (folder / "generation_config.json").write_text(json.dumps(exported.generation, indent=2) + "\n")
