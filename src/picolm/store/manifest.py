"""The manifest of a step: what it holds, a digest of every file and tensor, and a digest of the manifest itself."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from picolm.address import Address
from picolm.errors import StoreError
from picolm.store.files import FileRecord
from picolm.store.forms import About, ManifestForm
from picolm.store.layout import MANIFEST, check_name
from picolm.store.tensors import DTYPES
from picolm.trusted import check_form, parse_json

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
