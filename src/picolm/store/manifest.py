"""The manifest of a step: what it holds, a digest of every file and tensor, and a digest of the manifest itself.

Beside it the layout: the names of the directories and files of a run, and the file and the key in a step for each address.
"""

import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from picolm.address import Address
from picolm.errors import StoreError
from picolm.store.files import FileRecord
from picolm.store.forms import About, ManifestForm
from picolm.store.tensors import DTYPES
from picolm.trusted import check_form, parse_json, refuse_links

FORMAT = "pico-checkpoint"
VERSION = 1


@dataclass(frozen=True)
class TensorRecord:
    """Where a tensor is stored, its shape and its type. sha256 is the digest of its elements in row-major order."""

    file: str
    key: str
    shape: tuple[int, ...]
    dtype: str
    sha256: str

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][1]


@dataclass(frozen=True)
class Manifest:
    """The content of a step.

    created: UTC, ISO 8601; for information, nothing depends on it.
    parent: step and manifest digest of the checkpoint before this one, None for the first.
    about: further provenance (replayed, forked from …).
    """

    step: int
    created: str
    parent: Mapping[str, Any] | None
    files: Mapping[str, FileRecord]
    tensors: Mapping[Address, TensorRecord]
    about: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """sha-256 of the canonical JSON of the manifest without this digest."""
        return hashlib.sha256(_canonical(self._content())).hexdigest()

    def to_bytes(self) -> bytes:
        return _canonical({**self._content(), "digest": self.digest})

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "Manifest":
        """Return the manifest in `data`. Raises StoreError unless `data` is, byte for byte, what `to_bytes` writes."""
        damaged = f"{where}: damaged"
        content = parse_json(data, damaged, dict[str, Any])
        found = content.get("format"), content.get("version")
        if found != (FORMAT, VERSION) and None not in found:
            raise StoreError(
                f"{where}: format {found[0]!r} version {found[1]!r}; this version of picolm reads {FORMAT!r} version {VERSION}"
            )
        check_form(content, ManifestForm, damaged)
        check_form(content["about"], About, f"{damaged}: about")
        try:
            manifest = cls._parsed(content, where)
            intact = manifest.to_bytes() == data
        except ValueError as error:  # a malformed address, or text that is not Unicode
            raise StoreError(f"{where}: damaged ({error})") from error
        if not intact:
            raise StoreError(f"{where}: damaged: its content does not match its own digest")
        return manifest

    @classmethod
    def _parsed(cls, content: Mapping[str, Any], where: str) -> "Manifest":
        files = {check_name(name, where): FileRecord(**entry) for name, entry in content["files"].items()}
        tensors = {}
        for name in sorted(content["tensors"], key=natural):
            entry = content["tensors"][name]
            record = TensorRecord(**{**entry, "shape": tuple(entry["shape"])})
            if record.file not in files or record.dtype not in DTYPES:
                raise ValueError(f"{name}: unknown file {record.file!r} or element type {record.dtype!r}")
            tensors[Address.parse(name)] = record
        if MANIFEST in files:
            raise ValueError("a manifest does not list itself")
        return cls(content["step"], content["created"], content["parent"], files, tensors, content["about"])

    def _content(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "created": self.created,
            "parent": self.parent,
            "about": self.about,
            "files": {name: vars(record) for name, record in self.files.items()},
            "tensors": {str(address): vars(record) for address, record in self.tensors.items()},
        }


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def natural(text: str) -> list[tuple[bool, int, str]]:
    """Return a sort key that puts layers.2 before layers.10. Numbers may have any length."""
    parts = re.split(r"([0-9]+)", text)  # numbers are at the odd indices
    return [(i % 2 == 1, len(part.lstrip("0")) if i % 2 else 0, part) for i, part in enumerate(parts)]


WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "trainer_state.json"
MANIFEST = "manifest.json"
RUN = "run.json"
CONFIG = "training_config.yaml"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
LATEST = "latest"
TOKENIZER = {
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
}
_STEP = re.compile(r"step_(0|[1-9][0-9]{0,17})")
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Directories:
    """Names of the directories in a run; the configuration may change them."""

    checkpoints_dir: str = "checkpoints"
    learning_dynamics_dir: str = "learning_dynamics"
    eval_results_dir: str = "eval_results"
    logs_dir: str = "logs"

    def __post_init__(self) -> None:
        for place in fields(self):
            if "/" in check_name(getattr(self, place.name), place.name):
                raise StoreError(
                    f"{place.name}: {getattr(self, place.name)!r} has a slash; it is one name inside of the run"
                )


def step_directory(step: int) -> str:
    return f"step_{step}"


def step_of(name: str) -> int | None:
    """Return the step number in the name of a directory; None for any other name."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def check_name(name: str, where: str) -> str:
    """Return `name`. Raises StoreError when it could lead out of the directory it is relative to."""
    if not isinstance(name, str):
        raise StoreError(f"{where}: {name!r} is no name")
    parts = PurePosixPath(name).parts
    odd = not name or name.startswith("/") or "\\" in name or "\0" in name
    if odd or ".." in parts or str(PurePosixPath(name)) != name or name == ".":
        raise StoreError(f"{where}: {name!r} is not a plain relative path; it could lead out of the run directory")
    return name


def inside(root: Path, name: str) -> Path:
    """Return `root/name`. Raises StoreError when it leads out of `root`, or a part of it below `root` is a link."""
    path = root / check_name(name, str(root))
    refuse_links(path, root)
    return path


def place(address: Address, prefix: str, parameters: Collection[str], dynamics: str) -> tuple[str, str]:
    """Return the file of a step that holds a tensor, and the key in it. Raises StoreError for an impossible address.

    prefix: put before a parameter's name in `model.safetensors`.
    parameters: full names of parameters, needed for those that end in neither `.weight` nor `.bias`.
    """
    kind, split, module = address
    if kind == "weights" and not split:
        return WEIGHTS, prefix + parameter_name(module, parameters)
    if not split and kind not in ("gradients", "activations"):
        return OPTIMIZER, f"{kind}.{parameter_name(module, parameters)}"
    if kind == "weights" or not (_WORD.fullmatch(kind) and _WORD.fullmatch(split)):
        raise StoreError(
            f"{address}: not an address that a step can hold (kind and split are words; weights have no split)"
        )
    return f"{dynamics}/{split}_{kind}.safetensors", module


def parameter_name(module: str, parameters: Collection[str]) -> str:
    """Return the name of the parameter at an address: `x.weight` unless `x` itself is a parameter."""
    return module if module in parameters or module.endswith(".bias") else module + ".weight"


def table_file(split: str, dynamics: str) -> str:
    if not _WORD.fullmatch(split):
        raise StoreError(f"{split!r} is not the name of a split (one word such as 'train')")
    return f"{dynamics}/{split}_data.parquet"


def kind_of_file(name: str, tensor_kind: str | None) -> str:
    """Return the kind that a file of a step is counted as.

    tensor_kind: the address kind of the tensors in it, None when it has none.
    """
    if name == OPTIMIZER:
        return "optimizer"
    if tensor_kind is not None:
        return tensor_kind
    if name.endswith("_data.parquet"):
        return "data"
    return "tokenizer" if name in TOKENIZER else "other"
