"""Models in the files of other people's tools: out of a run (`export`), and into a run (`importing`).

A format is a function that writes an `Exported` model into an empty folder; `FORMATS` finds it by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable
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

ORIGIN = "pico.json"  # beside what is exported: of which run and step it is, for `pico import`
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


class Exported(NamedTuple):
    """What a format writes. weights: by the names of `Decoder.named_parameters`, as they were stored.

    generation: the content of generation_config.json, with bos_token_id, eos_token_id (one or several) and pad_token_id,
    None for what there is not; empty without a tokenizer. tokenizer: its files, name to content. origin: run, step and
    model_type.
    """

    config: Any
    weights: dict[str, Tensor]
    generation: dict[str, Any]
    tokenizer: dict[str, bytes]
    origin: dict[str, Any]

    @property
    def dtype(self) -> str:
        """The element type of the weights, as config.json spells it. Raises PicoError where there are several."""
        found = {str(tensor.dtype).removeprefix("torch.") for tensor in self.weights.values()}
        if len(found) != 1:
            raise PicoError(
                f"the weights of {self.origin['run']} have several element types: {', '.join(sorted(found))}"
            )
        return found.pop()


Format = Callable[[Exported, Path], None]
FORMATS: Registry[Format] = Registry("format")


def export(run: Run, step: int | None, name: str, out: Path) -> int:
    """Write the model of `step` (default: the latest) to the folder `out` in the format `name`; returns the step.

    Raises PicoError for a model that the format cannot hold, and for a folder that holds something already.
    """
    from picolm.formats import llama, llamacpp, plain  # noqa: F401  (each adds its format)

    write = FORMATS.get(name)
    exported = collect(run, checkpoint_at(run, step))
    with new_folder(out, "the export") as partial:
        write(exported, partial)
        (partial / ORIGIN).write_text(json.dumps(exported.origin, indent=2) + "\n")
    return int(exported.origin["step"])


def collect(run: Run, checkpoint: Checkpoint) -> Exported:
    """The model of a checkpoint, its tensors as they are stored."""
    config = config_of(run).model
    weights = {name: checkpoint[weight_address(name)] for name in check_sizes(config, checkpoint)}
    files = {name: checkpoint.read(name) for name in TOKENIZER_FILES if name in checkpoint.files}
    generation = generation_config(checkpoint)
    if "eos_token_id" in generation:
        generation.setdefault("bos_token_id", generation["eos_token_id"])  # in training a text begins after an end
    origin = {"run": run.name, "step": checkpoint.step, "model_type": config.model_type}
    return Exported(config, weights, generation, files, origin)


def write_tokenizer(exported: Exported, folder: Path) -> None:
    """Write the tokenizer of the run, and what begins, ends and pads a text, for tools that read transformers' files."""
    for name, content in exported.tokenizer.items():
        (folder / name).write_bytes(content)
    if exported.generation:
        (folder / "generation_config.json").write_text(json.dumps(exported.generation, indent=2) + "\n")
