"""One checkpoint of transformers: the weights in its files by address, and what its configuration says of its parts.

Weights are named as in their files, with the names of transformers 5. Where one matrix holds queries, keys and values, the three
are addresses of their own beside it.
"""

import hashlib
import os
import re
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel

from picolm.address import Address
from picolm.errors import FileError, StoreError
from picolm.models.anatomy import Anatomy
from picolm.network import in_cache
from picolm.readers.families import FAMILIES, QKV, Family, anatomy_of
from picolm.registry import did_you_mean
from picolm.store.checkpoint import Checkpoint, Missing, absence
from picolm.store.files import digest_file
from picolm.store.foreign import PickledTensors, SafeTensors
from picolm.store.legacy import StepFiles
from picolm.store.manifest import check_name, kind_of_file, natural
from picolm.trusted import parse_json, read_bytes

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

ANATOMY, CONFIG, INDEXED = "anatomy.json", "config.json", ".index.json"
WEIGHTS = ("model.safetensors", f"model.safetensors{INDEXED}", "pytorch_model.bin", f"pytorch_model.bin{INDEXED}")
_SHA256 = re.compile("[0-9a-f]{64}")
# Buffers: causal masks and frequencies, which are computed and not trained.
_BUFFER = re.compile(r"(?:\.(?:attn|attention)\.(?:bias|masked_bias)|rotary_emb\.inv_freq)$")


class _Index(BaseModel):
    weight_map: dict[str, str]


class SeriesCheckpoint(Checkpoint):
    """One checkpoint of transformers: its weights, as named in its files, and what its configuration says of its parts.

    identities: digests of files that are known already, by name; those that are computed are added. headers: the shapes in files
    that are known already, by their digests; likewise. family: what is said of its architecture; None for what is known of it.
    """

    def __init__(
        self,
        step: int,
        files: StepFiles,
        identities: dict[str, str] | None = None,
        headers: MutableMapping[str, dict[str, tuple[int, ...]]] | None = None,
        family: Family | None = None,
    ):
        self.step, self.path, self._files = step, files.where, files
        self._opened: dict[str, PickledTensors | SafeTensors] = {}
        self._identities = {} if identities is None else identities
        self._headers = {} if headers is None else headers
        self._said = family

    @property
    def meta(self) -> Mapping[str, Any]:
        return {"step": self.step}

    @property
    def files(self) -> list[str]:
        return [*self._files.sizes(), ANATOMY]

    @property
    def minimum_bytes(self) -> int:
        return 0  # would need opening every file

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json. Raises Missing without one."""
        found: dict[str, Any] = parse_json(self.read(CONFIG), str(self.path / CONFIG), dict[str, Any])
        return found

    @cached_property
    def family(self) -> Family | None:
        """What is said or known of its architecture, None for one that is not known."""
        known = self._known_family()
        if self._said is None or self._said.block or known is None:
            return self._said or known
        return replace(known, numbers=self._said.numbers)

    def _known_family(self) -> Family | None:
        return FAMILIES.get(str(self.config.get("model_type")))

    @cached_property
    def anatomy(self) -> Anatomy:
        try:
            return anatomy_of(self.config, self.family)
        except ValueError as error:
            raise StoreError(f"{self.path / CONFIG}: {error}") from error

    @cached_property
    def _keys(self) -> dict[str, tuple[str, str]]:
        """The file and the key in it of each module, layers in order; buffers are left out."""
        name = self._weights()
        held: dict[str, str] = {}
        if name.endswith(INDEXED):
            held = parse_json(self.read(name), str(self.path / name), _Index).weight_map
            for file in set(held.values()):
                check_name(file, str(self.path / name))
        else:
            held = dict.fromkeys(self._header(name), name)
        trained = (key for key in sorted(held, key=natural) if not _BUFFER.search(key))
        names = self.family.renamed if self.family is not None else {}
        modules = {key.removesuffix(".weight"): (held[key], key) for key in trained}
        return {names.get(module, module): place for module, place in modules.items()}

    def _weights(self) -> str:
        """Return the file of the weights, or their index. Raises StoreError without one."""
        name = next((name for name in WEIGHTS if self._files.has(name)), None)
        if name is None:
            raise StoreError(
                f"{self.path}: holds no weights (looked for {', '.join(WEIGHTS)}); it is half a checkpoint"
            )
        return name

    @cached_property
    def _modules(self) -> dict[str, tuple[str, str | None]]:
        """For each module the one that holds its weight, and its role where that is a part of a matrix of three."""
        found: dict[str, tuple[str, str | None]] = {}
        family = self.family
        for module in self._keys:
            found[module] = (module, None)
            block = module.removesuffix(f".{family.fused}") if family and family.fused else module
            if family and block != module:
                found |= {f"{block}.{family.parts[role].module}": (module, role) for role in QKV}
        return found

    def select(self, *, kind: str = "*", split: str = "*", module: str = "*") -> list[Address]:
        every = [Address("weights", "", name) for name in self._modules] if kind in ("*", "weights") else []
        return [
            address for address in every if fnmatchcase(address.split, split) and fnmatchcase(address.module, module)
        ]

    def __iter__(self) -> Iterator[Address]:
        return iter(self.select())

    def __len__(self) -> int:
        return len(self._modules)

    def __contains__(self, address: object) -> bool:
        return (
            isinstance(address, tuple)
            and len(address) == 3
            and address[:2] == ("weights", "")
            and address[2] in self._modules
        )

    def __getitem__(self, address: Address) -> "Tensor":
        holder, role = self._place(address)
        file, key = self._keys[holder]
        tensor = self._open(file)[key]
        if self.is_transposed(holder):
            tensor = tensor.T.contiguous()
        return tensor if role is None else self.part(tensor, role)

    def shape(self, address: Address) -> tuple[int, ...]:
        holder, role = self._place(address)
        file, key = self._keys[holder]
        shape = self._header(file)[key]
        shape = shape[::-1] if self.is_transposed(holder) else shape
        return shape if role is None else (self._rows(shape[0])[role], *shape[1:])

    def digest(self, address: Address) -> str:
        """Return a digest of the file's digest, the key in it, and which part of the tensor it is."""
        holder, role = self._place(address)
        file, key = self._keys[holder]
        text = "\n".join((self._identity(file), key, role or ""))
        return hashlib.sha256(text.encode()).hexdigest()

    def location(self, address: Address) -> str:
        return str(self.path / self._keys[self._place(address)[0]][0])

    def read(self, name: str) -> bytes:
        if name == ANATOMY:
            return self.anatomy.to_json().encode()
        path = self._files.find(name)
        if path is None:
            raise Missing(f"{self.path} has no file {name!r}{did_you_mean(name, self.files)}")
        return read_bytes(path)

    def rows(self, split: str) -> "pa.Table":
        raise Missing(f"{self.path} has no rows of {split!r}: a checkpoint of transformers keeps weights only")

    def bytes_by_kind(self) -> dict[str, int]:
        kinds: dict[str, int] = {}
        for name, size in self._files.sizes().items():
            weights = name.endswith((".safetensors", ".bin")) and name.startswith(("model", "pytorch_model"))
            kind = "optimizer" if name.startswith("optimizer.") else kind_of_file(name, "weights" if weights else None)
            kinds[kind] = kinds.get(kind, 0) + size
        return kinds

    def identities(self) -> dict[str, str]:
        """Return the digest of each file that holds weights, by name. On the Hub, where digests are kept, none is downloaded."""
        name = self._weights()
        stem, _, ending = name.removesuffix(INDEXED).rpartition(".")
        shard = re.compile(rf"{stem}-\d+-of-\d+\.{ending}")
        files = [file for file in self._files.sizes() if shard.fullmatch(file)] if name.endswith(INDEXED) else [name]
        return {file: self._identity(file) for file in sorted(files)}

    def _identity(self, file: str) -> str:
        if file not in self._identities:
            self._identities[file] = self._files.identity(file)
        return self._identities[file]

    def fetch(self, addresses: Collection[Address], rows: Collection[str] = ()) -> None:
        found = {a for kind, split, module in addresses for a in self.select(kind=kind, split=split, module=module)}
        for file in sorted({self._keys[self._modules[address.module][0]][0] for address in found}):
            self._files.find(file)

    def verify(self) -> list[str]:
        """Return what is wrong with the files of the weights; these formats keep no digests, so only damage that breaks them."""
        try:
            for file, key in self._keys.values():
                self._open(file).check()
                self._open(file).shape(key)
            _ = self.anatomy
        except (StoreError, FileError) as error:
            return [str(error)]
        except KeyError as error:
            return [f"{self.path}: the index names {error.args[0]!r}, which its file does not hold"]
        return []

    def _place(self, address: Address) -> tuple[str, str | None]:
        address = Address(*address)
        if address not in self:
            raise absence(str(self.path), address, list(self))
        return self._modules[address.module]

    def _header(self, file: str) -> dict[str, tuple[int, ...]]:
        """Return the shapes in a file by key. A file whose digest is known is not opened again, nor one with the same digest."""
        digest = self._identity(file) if self._files.knows_digests else self._identities.get(file, "")
        if digest and digest in self._headers:
            return self._headers[digest]
        opened = self._open(file)
        shapes = {key: opened.shape(key) for key in opened.keys}
        if digest:
            self._headers[digest] = shapes
        return shapes

    def _open(self, file: str) -> PickledTensors | SafeTensors:
        if file not in self._opened:
            path = self._files.find(file)
            if path is None:
                raise Missing(f"{self.path} has no file {file!r}; it is half a checkpoint")
            name = str(self.path / file)
            self._opened[file] = (
                SafeTensors(path, name) if file.endswith(".safetensors") else PickledTensors(path, name)
            )
        return self._opened[file]

    def holder(self, module: str) -> tuple[str, str | None]:
        """Return the module that holds the weight of `module`, and its role where that is a part of a matrix of three."""
        return self._modules.get(module, (module, None))

    def is_transposed(self, module: str) -> bool:
        """Return whether the weight of a module is stored as inputs x outputs."""
        return self.family is not None and module.endswith(tuple(f".{name}" for name in self.family.transposed))

    def _rows(self, rows: int) -> dict[str, int]:
        """Return how many of the rows of a matrix of three belong to each. Raises StoreError where that cannot be."""
        anatomy = self.anatomy
        heads, kv_heads = anatomy.heads or 0, anatomy.kv_heads or 0
        if not heads or rows % (heads + 2 * kv_heads):
            raise StoreError(
                f"{self.path}: {rows} rows of queries, keys and values cannot be those of {heads} heads and {kv_heads} "
                f"key-value heads ({anatomy.key('heads')}, {anatomy.key('kv_heads')})"
            )
        size = rows // (heads + 2 * kv_heads)
        return dict(zip(QKV, (heads * size, kv_heads * size, kv_heads * size)))

    def part(self, tensor: "Tensor", role: str) -> "Tensor":
        """Return the rows of one role of a matrix of three (or of its gradient, or of what it computes), sorted by head."""
        rows, number = self._rows(tensor.shape[0]), QKV.index(role)
        if self.family is not None and self.family.order == "by head":
            heads = self.anatomy.heads or 0
            return tensor.unflatten(0, (heads, 3, -1))[:, number].flatten(0, 1).clone()
        return tensor.split([rows[each] for each in QKV])[number].clone()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}  # open files are not sent to another process


class CachedFiles:
    """The files of a step in the cache of huggingface_hub, where each is a link to a blob named by its digest."""

    knows_digests: ClassVar[bool] = False  # of small files it does not

    def __init__(self, where: Path, root: Path):
        self.where, self._root = where, root

    def has(self, name: str) -> bool:
        return os.path.lexists(self.where / name)

    def find(self, name: str) -> Path | None:
        """Return the blob of a file, None without one. Raises FileError where the link leads out of the cache."""
        check_name(name, str(self.where))
        return in_cache(self.where / name, self._root) if self.has(name) else None

    def identity(self, name: str) -> str:
        path = self.find(name)
        if path is None:
            raise Missing(f"{self.where} has no file {name!r}")
        return path.name if _SHA256.fullmatch(path.name) else digest_file(path).sha256

    def sizes(self) -> dict[str, int]:
        names = sorted(path.relative_to(self.where).as_posix() for path in self.where.rglob("*") if not path.is_dir())
        found = {name: self.find(name) for name in names}
        return {name: path.stat().st_size for name, path in found.items() if path is not None}
