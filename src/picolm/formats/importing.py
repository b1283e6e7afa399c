"""Into a run: a LlamaForCausalLM from a folder or the Hub, or a plain state dict, becomes one step with weights.

What it computes must be what a Pico decoder computes; anything else is refused, with the reasons.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from picolm.errors import PicoError
from picolm.formats import ORIGIN, TOKENIZER_FILES
from picolm.formats.plain import CONFIG, STATE_DICT
from picolm.models import MODELS, Decoder
from picolm.models.llama import check_names, decoder_config, from_llama
from picolm.network import fetch, persist
from picolm.schema import plain
from picolm.store import Run
from picolm.store.foreign import PickledTensors, SafeTensors
from picolm.train.config import schema_for
from picolm.train.state import weight_address
from picolm.train.text import Text, checkpoint_files

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger("picolm")

_INDEX = "model.safetensors.index.json"
_WEIGHTS = ("model.safetensors", _INDEX, "pytorch_model.bin")


class Imported(NamedTuple):
    """A model as a run holds it: the model section of its configuration, and the weights by the names of its parameters."""

    section: dict[str, Any]
    weights: dict[str, Tensor]


def import_model(place: str, out: Path, step: int | None) -> tuple[Run, int]:
    """Make a run at `out` whose one step holds the model at `place`; returns both.

    place: a folder, or OWNER/NAME[@REVISION] on the Hub. step: default, that of the run it was exported from, else 0.
    Raises PicoError where a Pico decoder computes something else, and where files are missing or damaged.
    """
    if (out / "run.json").exists():
        raise PicoError(f"{out} holds a run already; choose another folder with --out")
    find = _finder(place)
    imported = _read(find, place)
    origin = _json(find(ORIGIN)) if find(ORIGIN) else dict[str, Any]()
    step = int(origin.get("step", 0)) if step is None else step
    config = _run_config(imported.section, out, step)
    model = MODELS.get(config.model.model_type)(config.model)
    text = Text(_tokenizer(find), config.model.vocab_size)
    about: dict[str, Any] = {"imported_from": place} | {key: origin[key] for key in ("run", "step") if key in origin}
    tensors = {weight_address(name): tensor for name, tensor in imported.weights.items()}
    run = Run.create(out, plain(config), {"imported": about})
    run.commit(
        step,
        tensors,
        meta={"step": step, "resumable": False},
        texts=checkpoint_files(model.to(next(iter(tensors.values())).dtype), text),
        weight_prefix=model.state_prefix,
        parameters=list(imported.weights),
        about=about,
    )
    return run, step


def _read(find: Callable[[str], Path | None], place: str) -> Imported:
    """The model in whichever of the two forms is there."""
    own, config = find(CONFIG), find("config.json")
    if own is not None:
        return _plain(_json(own), find, place)
    if config is None:
        raise PicoError(
            f"{place}: holds neither config.json (a model of transformers) nor {CONFIG} (a plain state dict)"
        )
    llama = _json(config)
    if str(llama.get("model_type")) in MODELS:
        raise PicoError(f"{place}: is a checkpoint of a run already; give the run itself to the other commands")
    shape = decoder_config(llama)
    weights = _transformers_weights(find, place)
    if "lm_head.weight" not in weights and llama.get("tie_word_embeddings"):
        log.info("Its embeddings are tied; in the run they are two matrices of the same values.")
        weights["lm_head.weight"] = weights.get("model.embed_tokens.weight", next(iter(weights.values()))).clone()
    return _fitting(asdict(shape), from_llama(weights, shape), place)


def _plain(section: dict[str, Any], find: Callable[[str], Path | None], place: str) -> Imported:
    file = find(STATE_DICT)
    if file is None:
        raise PicoError(f"{place}: holds {CONFIG} and no {STATE_DICT}")
    return _fitting(section, _all(PickledTensors(file)), place)


def _fitting(section: dict[str, Any], weights: dict[str, Tensor], place: str) -> Imported:
    """Raises PicoError where names, shapes or element types are not those of one model of this shape."""
    import torch

    config = schema_for({"model": section}).model_validate({"model": section, **_small_vocabulary(section)}).model
    with torch.device("meta"):
        shapes = MODELS.get(config.model_type)(config).state_dict()
    check_names(weights, shapes)
    for name, expected in shapes.items():
        if weights[name].shape != expected.shape:
            raise PicoError(
                f"{place}: {name} has shape {tuple(weights[name].shape)}; its configuration says {tuple(expected.shape)}"
            )
        if not weights[name].is_floating_point():
            raise PicoError(f"{place}: {name} holds {weights[name].dtype}, not floating-point numbers")
    return Imported(section, {name: weights[name] for name in shapes})


def _run_config(section: Mapping[str, Any], out: Path, step: int) -> Any:
    """The configuration of a run that was not trained here: what is known of it is the model."""
    raw = {
        "model": dict(section),
        "training": {"max_steps": step},
        "checkpointing": {"run_name": out.resolve().name, "runs_dir": str(out.parent)},
        **_small_vocabulary(section),
    }
    return schema_for(raw).model_validate(raw)


def _small_vocabulary(section: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer may not have more entries than the model, and the default is large."""
    return {"data": {"tokenizer": {"vocab_size": section.get("vocab_size", Decoder.Config().vocab_size)}}}


def _transformers_weights(find: Callable[[str], Path | None], place: str) -> dict[str, Tensor]:
    """All tensors of a saved model, of one file or several."""
    for name in _WEIGHTS:
        file = find(name)
        if file is None:
            continue
        if name == _INDEX:
            parts = [(part, find(part)) for part in sorted(set(_json(file)["weight_map"].values()))]
            gone = [part for part, path in parts if path is None]
            if gone:
                raise PicoError(f"{place}: {_INDEX} names {gone[0]}, which is not there")
            return {key: tensor for _, path in parts if path for key, tensor in _all(SafeTensors(path)).items()}
        return _all(PickledTensors(file) if name.endswith(".bin") else SafeTensors(file))
    raise PicoError(f"{place}: holds no weights (looked for: {', '.join(_WEIGHTS)})")


def _all(file: PickledTensors | SafeTensors) -> dict[str, Tensor]:
    return {key: file[key] for key in file.keys}


def _finder(place: str) -> Callable[[str], Path | None]:
    """A function from the name of a file to its path here, None where there is no such file."""
    folder = Path(place).expanduser()
    if folder.is_dir():
        return lambda name: folder / name if (folder / name).is_file() else None
    repository, _, revision = place.removeprefix("hub:").partition("@")
    if repository.count("/") != 1 or folder.exists():
        raise PicoError(f"{place}: is no folder, and not the form OWNER/NAME[@REVISION] of a Hub repository")
    return _repository(repository, revision or None)


def _repository(name: str, revision: str | None) -> Callable[[str], Path | None]:
    """The same for a repository on the Hub; files are fetched when they are asked for."""
    from huggingface_hub import list_repo_files

    there = set(persist(lambda: list_repo_files(name, revision=revision), name, PicoError, deed="looked up on"))
    return lambda file: fetch(name, file, revision, PicoError) if file in there else None


def _tokenizer(find: Callable[[str], Path | None]) -> Path | None:
    """tokenizer.json, with what belongs to it beside it."""
    file, *_ = [find(name) for name in TOKENIZER_FILES]  # all are fetched
    return file


def _json(path: Path | None) -> dict[str, Any]:
    assert path is not None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise PicoError(f"{path}: cannot be read ({error})") from error
