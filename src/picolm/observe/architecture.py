"""The model of a run, without and with the weights of a step: Pico's own, or one of transformers.

A model is built once; the weights of each further step are copied into it, so that one checkpoint is in memory at a time.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from picolm.address import Address
from picolm.capture.taps import matching
from picolm.errors import PicoError, StoreError
from picolm.models import Anatomy, NextToken, anatomy_of, find_model
from picolm.readers.checkpoint import CONFIG, SeriesCheckpoint
from picolm.store import Checkpoint, Run
from picolm.store.checkpoint import SealedCheckpoint
from picolm.train.sample import config_of
from picolm.train.state import State, bounded, check_sizes, outline, weight_address

# Numbers in a config.json that a mistake may make so large that the model is never built.
_COUNT = re.compile(r"(?:num|n)_\w*(?:layer|head|expert|block)\w*")
_LARGEST_COUNT = 10_000


class Architecture(ABC):
    """The model of a run.

    outline: the model on the meta device, without weights. context: the most positions that it reads. noise_seed: what its
    random numbers are derived from.
    """

    outline: Any
    anatomy: Anatomy
    context: int
    noise_seed = 0

    @abstractmethod
    def identity(self, step: int) -> str:
        """Return what else than its weights the model of a step is made of, as text."""

    @abstractmethod
    def build(self) -> Any:
        """Return the model, in evaluation mode, with any weights."""

    @abstractmethod
    def fill(self, model: Any, checkpoint: Checkpoint) -> None:
        """Copy the weights of a checkpoint into the model: in float32, or float64 where they are stored so."""

    def body(self, model: Any) -> nn.Module:
        """Return the module in which the names of addresses are those of modules."""
        found: nn.Module = model
        return found

    def unembedding(self, model: Any) -> nn.Module:
        """Return the module that reads logits from the normed residual stream."""
        return self.body(model).get_submodule(self.anatomy.module("unembedding"))

    def holder(self, module: str) -> tuple[str, str | None]:
        """Return the module that computes `module`, and its role where it is a part of a matrix of three."""
        return module, None

    def part(self, module: str, output_BTH: Tensor) -> Tensor:
        """Return the share of `module` in what its holder computes."""
        return output_BTH

    def gradient_part(self, module: str, gradient: Tensor) -> Tensor:
        """Return the share of `module` in the gradient of a parameter of its holder, shaped as the weight in a checkpoint."""
        return gradient

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The modules that can be observed, by name, in the order of the model; parts of a matrix of three at the end."""
        whole = {name: module for name, module in self.body(self.outline).named_modules() if name}
        return whole | {name: whole[self.holder(name)[0]] for name in self.parts()}

    def parts(self) -> list[str]:
        """Return the modules that are parts of another one, which holds queries, keys and values in one matrix."""
        return []

    def addresses(
        self,
        split: str,
        kinds: Sequence[str],
        suffixes: Sequence[str] | None,
        layers: Literal["all"] | Sequence[int],
    ) -> list[Address]:
        """Return the addresses of activations and gradients of the modules that roles or parts of names mean.

        suffixes: None for those that are captured in training. Raises PicoError for a suffix that no module has.
        """
        suffixes = self.anatomy.captured() if suffixes is None else suffixes
        if not suffixes:
            raise PicoError("modules: it is not known what the parts of this model are called; name modules")
        found = matching(self.modules, list(map(self.anatomy.module, suffixes)), layers, "modules")
        own = [name if key == "weight" else f"{name}.{key}" for name in found for key in self._parameters(name)]
        chosen = {"activations": found, "gradients": own}
        return [Address(kind, split, name) for kind in kinds if kind in chosen for name in chosen[kind]]

    def _parameters(self, module: str) -> list[str]:
        holder, role = self.holder(module)
        keys = [key for key, _ in self.modules[holder].named_parameters(recurse=False)]
        return keys if role is None else [key for key in keys if key == "weight"]

    def parameter(self, name: str) -> tuple[str, str]:
        """Return the module and the parameter in it that a name of an address means, the inverse of what `addresses` does."""
        if name in self.modules and "weight" in self._parameters(name):
            return name, "weight"
        module, _, parameter = name.rpartition(".")
        return module, parameter

    def width(self, checkpoint: Checkpoint, module: str) -> int:
        """Return the width of what a module computes. Nothing is computed."""
        weight = Address("weights", "", module)
        if weight not in checkpoint or len(shape := checkpoint.shape(weight)) < 2:
            return self.anatomy.width or 0
        return shape[-1 if isinstance(self.modules[self.holder(module)[0]], nn.Embedding) else 0]


class OwnArchitecture(Architecture):
    """The model of a run of Pico, or of pico-train."""

    def __init__(self, run: Run, checkpoint: Checkpoint):
        config = config_of(run)
        check_sizes(config.model, checkpoint)
        self._config = config.model
        self.noise_seed, self.context = config.training.seeds.noise, config.model.max_seq_len
        self.outline = outline(config.model, len(checkpoint.select(kind="weights")), str(checkpoint.path))
        self.anatomy = anatomy_of(self.outline)

    def identity(self, step: int) -> str:
        return f"{self._config!r}, noise {self.noise_seed} of step {step}"

    def build(self) -> Any:
        return find_model(self._config.model_type)(self._config).eval()

    def fill(self, model: Any, checkpoint: Checkpoint) -> None:
        exact = checkpoint[checkpoint.select(kind="weights")[0]].dtype == torch.float64
        model.to(torch.float64 if exact else torch.float32)
        State(model, []).restore_weights(checkpoint)


class TransformersModel(NextToken, nn.Module):
    """A causal language model of transformers, with the objective of the models of Pico."""

    def __init__(self, inner: Any):
        super().__init__()
        self.inner = inner
        vocabulary = inner.get_input_embeddings().num_embeddings
        self.config = SimpleNamespace(max_seq_len=_context(inner.config), vocab_size=vocabulary)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        logits: Tensor = self.inner(input_ids=tokens_BT, use_cache=False).logits
        return logits

    def with_patterns(self, tokens_BT: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the logits, and the attention weights of each layer, [B, heads, T, T].

        Raises PicoError for a model some of whose layers have none.
        """
        found = self.inner(input_ids=tokens_BT, use_cache=False, output_attentions=True)
        weights = list(getattr(found, "attentions", None) or [])
        if not weights or any(each is None for each in weights):
            raise PicoError(f"{type(self.inner).__name__} does not give the weights of an attention in each layer")
        return found.logits, weights


class TransformersArchitecture(Architecture):
    """The model of a series of checkpoints of transformers, computed by transformers with its plain attention (`eager`)."""

    def __init__(self, checkpoint: SeriesCheckpoint):
        self._where, self._checkpoint = str(checkpoint.path / "config.json"), checkpoint
        self._config = _config(checkpoint.config, len(checkpoint), self._where)
        self.outline = TransformersModel(self._on_meta())
        self.anatomy, self.context = checkpoint.anatomy, self.outline.config.max_seq_len

    def identity(self, step: int) -> str:
        from transformers import __version__

        return f"transformers {__version__}: {json.dumps(self._checkpoint.config, sort_keys=True)}"

    def build(self) -> Any:
        from transformers.initialization import no_init_weights

        with no_init_weights():  # all weights are replaced
            return TransformersModel(self._new()).eval()

    def fill(self, model: Any, checkpoint: Checkpoint) -> None:
        """Copy the weights of a checkpoint into the model. Raises StoreError unless it holds exactly those of the model."""
        found = _of_transformers(checkpoint)
        if found is None:
            raise StoreError(f"{checkpoint.path}: holds no {CONFIG}, so it is no checkpoint of transformers")
        checkpoint = found
        exact = checkpoint[checkpoint.select(kind="weights")[0]].dtype == torch.float64
        model.to(torch.float64 if exact else torch.float32)
        entries = model.inner.state_dict(keep_vars=True)
        with torch.no_grad():
            for name in _expected(entries, checkpoint):
                address = weight_address(name)
                stored = checkpoint[address]
                entries[name].copy_(stored.T if checkpoint.is_transposed(address.module) else stored)

    def body(self, model: Any) -> nn.Module:
        found: nn.Module = model.inner
        return found

    def unembedding(self, model: Any) -> nn.Module:
        found: nn.Module = (
            model.inner.get_output_embeddings()
        )  # its own module where the matrix is tied to the embedding
        return found

    def holder(self, module: str) -> tuple[str, str | None]:
        return self._checkpoint.holder(module)

    def part(self, module: str, output_BTH: Tensor) -> Tensor:
        role = self.holder(module)[1]
        if role is None:
            return output_BTH
        return self._checkpoint.part(output_BTH.movedim(-1, 0), role).movedim(0, -1)

    def gradient_part(self, module: str, gradient: Tensor) -> Tensor:
        holder, role = self.holder(module)
        if gradient.ndim == 2 and self._checkpoint.is_transposed(holder):
            gradient = gradient.T.contiguous()
        return gradient if role is None else self._checkpoint.part(gradient, role)

    def parts(self) -> list[str]:
        return [address.module for address in self._checkpoint if self.holder(address.module)[1] is not None]

    def _new(self) -> Any:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(self._config, attn_implementation="eager", dtype=torch.float32)
        model.tie_weights()  # which is left out where the weights are not initialized
        return model

    def _on_meta(self) -> Any:
        """Return the model on the meta device, where its sizes take no memory, compared with the shapes in the files."""
        checkpoint = self._checkpoint
        try:
            with torch.device("meta"), bounded(len(checkpoint), self._where):
                model = self._new()
        except PicoError:
            raise
        except Exception as error:  # a configuration of others may be wrong in any way
            raise PicoError(f"{self._where}: transformers cannot build this model ({_shortly(error)})") from error
        entries = model.state_dict(keep_vars=True)
        for name in _expected(entries, checkpoint):
            address, expected = weight_address(name), tuple(entries[name].shape)
            shape = checkpoint.shape(address)
            if (shape[::-1] if checkpoint.is_transposed(address.module) else shape) != expected:
                raise StoreError(f"{self._where}: describes {name} as {list(expected)}; the file holds {list(shape)}")
        return model


def architecture_of(run: Run, checkpoint: Checkpoint) -> Architecture:
    """Return the model that the weights of a checkpoint belong to. Raises PicoError where it cannot be run."""
    found = _of_transformers(checkpoint)
    return TransformersArchitecture(found) if found is not None else OwnArchitecture(run, checkpoint)


def _of_transformers(checkpoint: Checkpoint) -> SeriesCheckpoint | None:
    """Return a step as a checkpoint of transformers, None if it is none. What a Recorder left of such a model is one too."""
    if isinstance(checkpoint, SeriesCheckpoint):
        return checkpoint
    if isinstance(checkpoint, SealedCheckpoint) and checkpoint.meta.get("recorded") and CONFIG in checkpoint.files:
        return SeriesCheckpoint(checkpoint.step, SealedFiles(checkpoint))
    return None


class SealedFiles:
    """The files of a step of a Pico run; each is compared with its digest when it is found."""

    knows_digests: ClassVar[bool] = True

    def __init__(self, checkpoint: SealedCheckpoint):
        self.where, self._checkpoint = checkpoint.path, checkpoint

    def has(self, name: str) -> bool:
        return name in self._checkpoint.files

    def find(self, name: str) -> Path | None:
        if not self.has(name):
            return None
        self._checkpoint.read(name)
        return self._checkpoint.locate(name)

    def identity(self, name: str) -> str:
        return self._checkpoint.files[name].sha256

    def sizes(self) -> dict[str, int]:
        return {name: record.bytes for name, record in self._checkpoint.files.items()}


def _config(stated: Mapping[str, Any], tensors: int, where: str) -> Any:
    """Return the content of a config.json as an object of transformers. Raises PicoError for what it does not know."""
    for key, value in stated.items():
        if _COUNT.fullmatch(key) and isinstance(value, int) and value > max(_LARGEST_COUNT, tensors):
            raise StoreError(f"{where}: {key} is {value}, and there are {tensors} tensors")
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise PicoError(f"{where}: a model of transformers runs with: pip install 'picolm[hf]' ({error})") from error
    own = {key: value for key, value in stated.items() if key not in ("model_type", "auto_map", "quantization_config")}
    try:
        return AutoConfig.for_model(str(stated.get("model_type")), **own)
    except Exception as error:  # a configuration of others may be wrong in any way
        raise PicoError(
            f"{where}: transformers does not know this model ({_shortly(error)}); its weights can be analyzed, but it cannot "
            "be run"
        ) from error


def _expected(entries: Mapping[str, Tensor], checkpoint: SeriesCheckpoint) -> Iterator[str]:
    """Yield the entries of a state_dict (of parameters) that are in the files. Raises StoreError for those that are on one side
    only; of tied entries, which are one parameter, one is enough.
    """
    there = [name for name in entries if weight_address(name) in checkpoint]
    filled = {id(entries[name]) for name in there}
    lacking = [name for name, parameter in entries.items() if id(parameter) not in filled]
    stored = {address.module for address in checkpoint if checkpoint.holder(address.module)[1] is None}
    unknown = sorted(stored - {weight_address(name).module for name in entries})
    if lacking or unknown:
        what = (
            f"lacks {', '.join(lacking[:3])}" if lacking else f"holds {', '.join(unknown[:3])}, which the model has not"
        )
        raise StoreError(
            f"{checkpoint.path}: its weights are not those of the model that its config.json describes: it {what}"
        )
    yield from there


def _context(config: Any) -> int:
    stated = (getattr(config, key, None) for key in ("max_position_embeddings", "n_positions"))
    return next((number for number in stated if isinstance(number, int)), 2**31)


def _shortly(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
