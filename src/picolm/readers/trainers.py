"""Checkpoints of other trainers: nanoGPT, LitGPT and torchtitan. Weights only; no code in a pickle runs.

    nanoGPT      ckpt.pt, or ckpt_1000.pt, …: {model, model_args, iter_num, …}; the file knows its step
    LitGPT       step-00000100/lit_model.pth, {model, …} or the weights alone, and model_config.yaml
    torchtitan   step-1000/.metadata and *.distcp: shards of torch.distributed.checkpoint (DCP)

Sources of the layouts: nanoGPT train.py and model.py; LitGPT litgpt/pretrain.py and model.py (of the versions whose `attn.qkv`
holds queries, keys and values one after the other); torchtitan components/checkpoint.py; torch.distributed.checkpoint.metadata.
"""

import hashlib
import io
import math
import pickle
import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from picolm.document import parse_yaml
from picolm.errors import StoreError
from picolm.models.anatomy import Part
from picolm.readers.checkpoint import SeriesCheckpoint
from picolm.readers.families import BIASES, NORM_AFTER, NORMED, Family
from picolm.store.foreign import PickledTensors, first_line
from picolm.store.legacy import LocalFiles, StepFiles
from picolm.store.manifest import check_name
from picolm.trusted import open_regular, read_bytes

if TYPE_CHECKING:
    from torch import Tensor

_NANOGPT = re.compile(r"ckpt[\w.-]*\.pt")
_QKV = {
    "attention.query": Part("attn.query", "heads"),
    "attention.key": Part("attn.key", "kv_heads"),
    "attention.value": Part("attn.value", "kv_heads"),
}
_OUTSIDE = {"embedding": Part("transformer.wte"), "unembedding": Part("lm_head")}
NANOGPT = Family(
    "transformer.h.{}",
    {
        **_OUTSIDE,
        **_QKV,
        "attention.output": Part("attn.c_proj", "heads", by="columns"),
        "mlp.output": Part("mlp.c_proj"),
    },
    fused="attn.c_attn",
)
LITGPT = Family(
    "transformer.h.{}",
    {**_OUTSIDE, **_QKV, "attention.output": Part("attn.proj", "heads", by="columns"), "mlp.output": Part("mlp.proj")},
    fused="attn.qkv",
)


def _torchtitan(attention: str, unembedding: str) -> Family:
    parts = {
        "embedding": Part("tok_embeddings"),
        "unembedding": Part(unembedding),
        "attention.query": Part(f"{attention}.wq", "heads"),
        "attention.key": Part(f"{attention}.wk", "kv_heads"),
        "attention.value": Part(f"{attention}.wv", "kv_heads"),
        "attention.output": Part("attention.wo", "heads", by="columns"),
        "mlp.output": Part("feed_forward.w2"),
    }
    return Family("layers.{}", parts)


class ForeignCheckpoint(SeriesCheckpoint):
    """A step that another trainer wrote. `file` holds its weights, or says where they are."""

    file: str

    def __init__(self, *args: Any, file: str = "", **options: Any):
        super().__init__(*args, **options)
        self.file = file or self.file

    @classmethod
    def is_at(cls, files: StepFiles) -> bool:
        """Return whether a step is in this format."""
        return files.has(cls.file)

    @abstractmethod
    def _known_family(self) -> Family: ...

    @cached_property
    def _keys(self) -> dict[str, tuple[str, str]]:
        return {name.removeprefix("_orig_mod."): place for name, place in super()._keys.items()}  # of torch.compile

    def _weights(self) -> str:
        return self.file

    def identities(self) -> dict[str, str]:
        return {self.file: self._identity(self.file)}

    def _open(self, file: str) -> Any:
        if file not in self._opened:
            path = self._files.find(file)
            if path is None:
                raise StoreError(f"{self.path}: holds no weights (looked for {file}); it is half a checkpoint")
            self._opened[file] = self._tensors(
                path, str(self.path / file) if self.path.name != file else str(self.path)
            )
        return self._opened[file]

    def _tensors(self, path: Path, name: str) -> Any:
        return PickledTensors(path, name, inside="model")


class NanoGPT(ForeignCheckpoint):
    """A file of nanoGPT's training."""

    file = "ckpt.pt"

    @cached_property
    def config(self) -> dict[str, Any]:
        """The arguments of the model, and that its embeddings are tied."""
        found = self._open(self.file).others.get("model_args")
        if not isinstance(found, dict):
            raise StoreError(f"{self.path}: holds no model_args, so it is no checkpoint of nanoGPT")
        return {**found, "tie_word_embeddings": True}

    def _known_family(self) -> Family:
        return _with_notes(NANOGPT, BIASES if self.config.get("bias", True) else None)

    @property
    def stated_step(self) -> int | None:
        """The number of updates that the file says, None where it does not."""
        found = self._open(self.file).others.get("iter_num")
        return found if isinstance(found, int) and not isinstance(found, bool) and found >= 0 else None


class LitGPT(ForeignCheckpoint):
    """A folder of LitGPT."""

    file = "lit_model.pth"

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of model_config.yaml."""
        name = "model_config.yaml"
        path = self._files.find(name)
        found = parse_yaml(read_bytes(path).decode("utf-8", "replace"), str(self.path / name)) if path else {}
        if not isinstance(found, dict):
            raise StoreError(f"{self.path / name}: is no mapping")
        return {**found, "tie_word_embeddings": found.get("tie_embeddings", False)}

    def _known_family(self) -> Family:
        biases = self.config.get("attn_bias") or self.config.get("bias")
        after = self.config.get("post_attention_norm")
        notes = (
            BIASES if biases else None,
            NORMED if self.config.get("norm_qk") else None,
            NORM_AFTER if after else None,
        )
        return _with_notes(LITGPT, *notes)


class TorchTitan(ForeignCheckpoint):
    """A folder of torch.distributed.checkpoint, with the names of torchtitan's Llama. It says no numbers of the model."""

    file = ".metadata"

    @cached_property
    def config(self) -> dict[str, Any]:
        """Nothing: torchtitan keeps the configuration elsewhere. See `numbers` in series.yaml."""
        return {}

    def _known_family(self) -> Family:
        newer = any(".attention.qkv_linear." in key for key in self._open(self.file).keys)
        return _torchtitan("attention.qkv_linear", "lm_head") if newer else _torchtitan("attention", "output")

    def _tensors(self, path: Path, name: str) -> Any:
        return DistributedTensors(path, self._files)

    def _identity(self, file: str) -> str:
        """Return a digest over those of all files of the step: the weights are in the others."""
        if file not in self._identities:
            digests = [f"{name} {self._files.identity(name)}" for name in self._files.sizes()]
            self._identities[file] = hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()
        return self._identities[file]


FORMATS: tuple[type[ForeignCheckpoint], ...] = (LitGPT, TorchTitan, NanoGPT)


def foreign_format(files: StepFiles) -> type[ForeignCheckpoint] | None:
    """Return the format of a step that is none of transformers, None for an unknown one."""
    return next((kind for kind in FORMATS if kind.is_at(files)), None)


def is_file_of_nanogpt(path: Path) -> bool:
    """Return whether a name is that of a checkpoint in one file: `ckpt.pt`, `ckpt_1000.pt`."""
    return bool(_NANOGPT.fullmatch(path.name)) and path.is_file() and not path.is_symlink()


class OneFile(LocalFiles):
    """A step that is a single file; others beside it are not its own."""

    def __init__(self, file: Path):
        super().__init__(file.parent)
        self._file = file.name

    def has(self, name: str) -> bool:
        return name == self._file and super().has(name)

    def sizes(self) -> dict[str, int]:
        return {self._file: (self.where / self._file).lstat().st_size}


class DistributedTensors:
    """The tensors of the model in a folder of torch.distributed.checkpoint, by name, put together from their shards.

    What belongs to the optimizer, the schedule and the data is left out; so is the prefix `model.` of older versions.
    Raises StoreError where `.metadata` is damaged or holds anything but the classes of that format.
    """

    def __init__(self, path: Path, files: StepFiles):
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        self.name, self._files = str(path), files
        try:
            found = _Metadata(io.BytesIO(read_bytes(path))).load()
            self._places: Mapping[Any, Any] = found.storage_data
            self._held = {
                key.removeprefix("model."): (key, value)
                for key, value in found.state_dict_metadata.items()
                if isinstance(value, TensorStorageMetadata) and key.split(".")[0] not in _NOT_WEIGHTS
            }
        except StoreError:
            raise
        except Exception as error:  # a pickle of others may be wrong in any way
            raise StoreError(
                f"{path}: damaged, or no metadata of torch.distributed.checkpoint ({first_line(error)})"
            ) from error

    @property
    def keys(self) -> list[str]:
        return list(self._held)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(int(size) for size in self._held[key][1].size)

    def check(self) -> None:
        """Do nothing: the format has no checksums."""

    def __getitem__(self, key: str) -> "Tensor":
        try:
            return self._whole(key)
        except StoreError:
            raise
        except Exception as error:  # see above
            raise StoreError(f"{self.name}: the shards of {key!r} do not fit ({first_line(error)})") from error

    def _whole(self, key: str) -> "Tensor":
        import torch
        from torch.distributed.checkpoint.metadata import MetadataIndex

        name, stated = self._held[key]
        places = (self._places.get(MetadataIndex(name, chunk.offsets)) for chunk in stated.chunks)
        pieces = [self._piece(place, key) for place in places]
        shape = self.shape(key)
        if sum(piece.numel() for piece in pieces) != math.prod(shape):
            raise StoreError(f"{self.name}: the shards of {key!r} do not make a tensor of shape {list(shape)}")
        whole = torch.empty(shape, dtype=pieces[0].dtype)
        for chunk, piece in zip(stated.chunks, pieces):
            target = whole
            for dimension, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes)):
                target = target.narrow(dimension, offset, size)
            target.copy_(piece)
        return whole

    def _piece(self, place: Any, key: str) -> "Tensor":
        import torch

        if place is None or getattr(place, "transform_descriptors", None):
            raise StoreError(f"{self.name}: a shard of {key!r} is {'missing' if place is None else 'compressed'}")
        file = self._files.find(check_name(str(place.relative_path), self.name))
        if file is None:
            raise StoreError(f"{self.name}: {place.relative_path} is not there; it is half a checkpoint")
        with open_regular(file) as opened:
            opened.seek(place.offset)
            data = opened.read(place.length)
        try:
            found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # see above
            raise StoreError(f"{file}: the shard of {key!r} is damaged ({first_line(error)})") from error
        if not isinstance(found, torch.Tensor) or found.numel() * found.element_size() > len(data):
            raise StoreError(f"{file}: the shard of {key!r} is no tensor, or one that is larger than the shard")
        return found.detach()


_NOT_WEIGHTS = {"optimizer", "optim", "lr_scheduler", "dataloader", "train_state"}
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "_MEM_FORMAT_ENCODING", "StorageMeta",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch": {"Size", "float16", "bfloat16", "float32", "float64", "int64", "int32", "uint8", "bool"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath", "Path"},
    "pathlib._local": {"PosixPath", "PurePosixPath", "Path"},
}  # fmt: skip


class _Metadata(pickle.Unpickler):
    """Reads `.metadata` and makes objects of that format's own classes only."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise StoreError(f".metadata holds code, not only places of tensors ({module}.{name}); it is not loaded")
        return super().find_class(module, name)


def _with_notes(family: Family, *notes: str | None) -> Family:
    return replace(family, notes=tuple(note for note in notes if note))
