"""Import a LlamaForCausalLM or a Mamba2ForCausalLM from a folder or the Hub, or a plain state dict, into a new run with one step.

The model must compute the same function as a Pico model; any other model is refused, with the reasons.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import BaseModel, Field
from torch import Tensor

from picolm.errors import PicoError
from picolm.formats import ORIGIN, TOKENIZER_FILES
from picolm.formats.plain import CONFIG, STATE_DICT
from picolm.models import MODELS, Decoder, llama, mamba2
from picolm.models.llama import check_names
from picolm.network import fetch, file_list, in_cache
from picolm.schema import mark_untrusted, plain
from picolm.store import Run
from picolm.store.folders import new_folder, refuse_content
from picolm.store.foreign import PickledTensors, SafeTensors
from picolm.store.manifest import check_name
from picolm.train.config import stored_config
from picolm.train.sample import GenerationConfig
from picolm.train.state import outline, weight_address
from picolm.train.text import Text, checkpoint_files
from picolm.trusted import check_form, parse_json, read_bytes, require_regular

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger("picolm")

_INDEX = "model.safetensors.index.json"
_WEIGHTS = ("model.safetensors", _INDEX, "pytorch_model.bin")


class Imported(NamedTuple):
    """A model to store in a run: the model section of its configuration, and the weights by parameter name."""

    section: dict[str, Any]
    weights: dict[str, Tensor]


class _Conversion(NamedTuple):
    """How a model of transformers becomes one of Pico: its configuration and weights, and the ids of its special tokens."""

    config: Callable[[Mapping[str, Any]], Any]
    weights: Callable[[Mapping[str, Tensor], Any], dict[str, Tensor]]
    with_output_layer: Callable[[Mapping[str, Tensor], Mapping[str, Any]], dict[str, Tensor]]
    special_tokens: Callable[[Mapping[str, Any]], dict[str, Any]]


_LLAMA = _Conversion(llama.decoder_config, llama.from_llama, llama.with_output_layer, llama.special_tokens)
_MAMBA2 = _Conversion(mamba2.statespace_config, mamba2.from_mamba2, mamba2.with_output_layer, mamba2.special_tokens)


def _conversion(stated: Mapping[str, Any]) -> _Conversion:
    """Return the conversion for a config.json; for an unknown model that of a Llama, which refuses it with the reasons."""
    return _MAMBA2 if stated.get("model_type") == "mamba2" else _LLAMA


def import_model(place: str, out: Path, step: int | None) -> tuple[Run, int]:
    """Create a run at `out` with one step that contains the model at `place`. Returns the run and the step.

    place: a folder, or OWNER/NAME[@REVISION] on the Hub. step: None for the step it was exported from, else 0.
    Raises PicoError if no model of Pico computes the same function, or if files are missing or damaged.
    """
    refuse_content(out)
    find = _finder(place)
    imported = _read(find, place)
    origin = _origin(find(ORIGIN))
    step = origin.get("step", 0) if step is None else step
    config = _run_config(imported.section, out, step)
    model = MODELS.get(config.model.model_type)(config.model)
    about: dict[str, Any] = {"imported_from": place} | {key: origin[key] for key in ("run", "step") if key in origin}
    tensors = {weight_address(name): tensor for name, tensor in imported.weights.items()}
    with new_folder(out, "the run") as partial, TemporaryDirectory() as copies:
        text = Text(_tokenizer(find, Path(copies)), config.model.vocab_size)
        run = Run.create(partial, plain(config), {"imported": about}, name=out.resolve().name)
        run.commit(
            step,
            tensors,
            meta={"step": step, "resumable": False},
            texts=checkpoint_files(model.to(next(iter(tensors.values())).dtype), text) | _special_tokens(find),
            weight_prefix=model.state_prefix,
            parameters=list(imported.weights),
            about=about,
        )
    return Run.open(out), step


def _read(find: Callable[[str], Path | None], place: str) -> Imported:
    """Return the model, from a plain state dict if there is one, else from the files of transformers."""
    own, config = find(CONFIG), find("config.json")
    if own is not None:
        section = mark_untrusted({"model": _json(own)}, f"{place}/{CONFIG}")["model"]
        return _plain(section, find, place)
    if config is None:
        raise PicoError(
            f"{place}: holds neither config.json (a model of transformers) nor {CONFIG} (a plain state dict)"
        )
    stated = _json(config)
    if str(stated.get("model_type")) in MODELS:
        raise PicoError(f"{place}: is a checkpoint of a run already; give the run itself to the other commands")
    conversion = _conversion(stated)
    shape = conversion.config(stated)
    stored = _transformers_weights(find, place)
    weights = conversion.with_output_layer(stored, stated)
    if len(weights) > len(stored):
        log.info("Its embeddings are tied; in the run they are two matrices of the same values.")
    return _fitting(asdict(shape), conversion.weights(weights, shape), place, "config.json")


def _plain(section: dict[str, Any], find: Callable[[str], Path | None], place: str) -> Imported:
    file = find(STATE_DICT)
    if file is None:
        raise PicoError(f"{place}: holds {CONFIG} and no {STATE_DICT}")
    return _fitting(section, _all(PickledTensors(file)), place, CONFIG)


def _fitting(section: dict[str, Any], weights: dict[str, Tensor], place: str, file: str) -> Imported:
    """Return the model after checking the weights.

    Raises PicoError if names or shapes do not match the configuration, or weights are not finite floating-point
    numbers.
    """
    config = stored_config({"model": section, **_small_vocabulary(section)}, f"{place}/{file}").model
    shapes = {name: entry.shape for name, entry in outline(config, len(weights), place).state_dict().items()}
    check_names(weights, shapes)
    for name, expected in shapes.items():
        if weights[name].shape != expected:
            raise PicoError(
                f"{place}: {name} has shape {tuple(weights[name].shape)}; its configuration says {tuple(expected)}"
            )
        if not weights[name].is_floating_point():
            raise PicoError(f"{place}: {name} holds {weights[name].dtype}, not floating-point numbers")
        if wrong := int((~weights[name].isfinite()).sum()):
            raise PicoError(f"{place}: {name} holds NaN or infinities ({wrong} of {weights[name].numel()} numbers)")
    return Imported(section, {name: weights[name] for name in shapes})


def _special_tokens(find: Callable[[str], Path | None]) -> dict[str, str]:
    """Return the model's generation_config.json (name to text), completed with the special tokens of config.json."""
    config, generation = find("config.json"), find("generation_config.json")
    found = {} if config is None else _conversion(_json(config)).special_tokens(_json(config))
    found |= _json(generation) if generation is not None else {}
    text = json.dumps(found, indent=2) + "\n"
    parse_json(text.encode(), str(generation or config), GenerationConfig)
    return {"generation_config.json": text} if found else {}


def _run_config(section: Mapping[str, Any], out: Path, step: int) -> Any:
    """Return the configuration of an imported run: only its model section is known."""
    raw = {
        "model": dict(section),
        "training": {"max_steps": step},
        "checkpointing": {"run_name": out.resolve().name, "runs_dir": str(out.parent)},
        **_small_vocabulary(section),
    }
    return stored_config(raw, str(out))


def _small_vocabulary(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return a data section whose vocab_size is that of the model: the default may be larger, which is an error."""
    return {"data": {"tokenizer": {"vocab_size": section.get("vocab_size", Decoder.Config().vocab_size)}}}


def _transformers_weights(find: Callable[[str], Path | None], place: str) -> dict[str, Tensor]:
    """Return all tensors of a saved model, from one file or several. Raises PicoError if files are missing."""
    for name in _WEIGHTS:
        file = find(name)
        if file is None:
            continue
        if name == _INDEX:
            parts = [(part, find(part)) for part in sorted(set(_weight_map(file).values()))]
            gone = [part for part, path in parts if path is None]
            if gone:
                raise PicoError(f"{place}: {_INDEX} names {gone[0]}, which is not there")
            return {key: tensor for _, path in parts if path for key, tensor in _all(SafeTensors(path)).items()}
        return _all(PickledTensors(file) if name.endswith(".bin") else SafeTensors(file))
    raise PicoError(f"{place}: holds no weights (looked for: {', '.join(_WEIGHTS)})")


def _weight_map(path: Path) -> dict[str, str]:
    """Return the file name of each tensor, from the index of a saved model."""
    where = f"{path}: weight_map"
    files: dict[str, str] = _json(path).get("weight_map", {})
    check_form(files, dict[str, str], where)
    return {key: check_name(name, where) for key, name in files.items()}


def _all(file: PickledTensors | SafeTensors) -> dict[str, Tensor]:
    return {key: file[key] for key in file.keys}


def _finder(place: str) -> Callable[[str], Path | None]:
    """Return a function from a file name to its local path, or None if there is no such file."""
    folder = Path(place).expanduser()
    if folder.is_dir():
        return lambda name: _local(folder / name) if os.path.lexists(folder / name) else None
    repository, _, revision = place.removeprefix("hub:").partition("@")
    if repository.count("/") != 1 or folder.exists():
        raise PicoError(f"{place}: is no folder, and not the form OWNER/NAME[@REVISION] of a Hub repository")
    return _repository(repository, revision or None)


def _repository(name: str, revision: str | None) -> Callable[[str], Path | None]:
    """Return such a function for a repository on the Hub; it downloads a file when it is called."""
    there = file_list(name, revision or "main", "model", PicoError)
    return lambda file: in_cache(fetch(name, file, revision, PicoError)) if file in there else None


def _local(path: Path) -> Path:
    """Return the real path of a model file. Links are allowed only in the cache of the Hub, which consists of links."""
    if path.is_symlink():
        return in_cache(path)
    require_regular(path)
    return path


def _tokenizer(find: Callable[[str], Path | None], folder: Path) -> Path | None:
    """Copy the tokenizer files to a folder. Returns the path of tokenizer.json there, or None if there is none."""
    for name in TOKENIZER_FILES:
        if (path := find(name)) is not None:
            (folder / name).write_bytes(read_bytes(path))
    return folder / TOKENIZER_FILES[0] if (folder / TOKENIZER_FILES[0]).exists() else None


def _json(path: Path | None) -> dict[str, Any]:
    assert path is not None
    found: dict[str, Any] = parse_json(read_bytes(path), str(path), dict[str, Any])
    return found


class _Origin(BaseModel):
    """The content of pico.json, which `pico export` writes: the run and the step of a model."""

    run: str = ""
    step: Annotated[int, Field(ge=0, lt=10**18)] = 0


def _origin(path: Path | None) -> dict[str, Any]:
    found = {} if path is None else _json(path)
    check_form(found, _Origin, str(path))
    return found
