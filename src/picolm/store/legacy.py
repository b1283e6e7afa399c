"""Runs of pico-train, read like runs of Pico: same addresses, lazily, and without executing code in their pickles.

    runs/NAME/training_config.yaml
    runs/NAME/checkpoints/step_N/    model.safetensors (or pytorch_model.bin), config.json, tokenizer files
        fabric_state/                the state of its training; not read
        learning_dynamics/           {train,val}_{activations,weights,gradients}.pt, {train,val}_data/ (Arrow data set)

`StepFiles` hides where the files of a step are, so the same code reads a copy of such a run on the Hub.

Names of tensors may have the prefix of a wrapper (`_forward_module.`, `pico_decoder.`); an address starts at the module
of the model. Weights are read from the model file, or from the captured weights when a step has no model file.
"""

import hashlib
import os
import re
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from picolm.address import Address
from picolm.errors import StoreError
from picolm.registry import did_you_mean
from picolm.store.checkpoint import Checkpoint, Missing, absence
from picolm.store.files import digest_file
from picolm.store.foreign import PickledTensors, SafeTensors, read_arrow
from picolm.store.forms import DataSetState
from picolm.store.manifest import Directories, check_name, inside, kind_of_file, natural
from picolm.store.roworder import RowOrder, lookup
from picolm.trusted import parse_json, read_bytes, require_regular

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

SPLITS = ("train", "val")
MODEL_FILES = ("model.safetensors", "pytorch_model.bin")
STATE = "fabric_state"
DYNAMICS = Directories.learning_dynamics_dir
_PAIRS = [("weights", ""), *((kind, split) for split in SPLITS for kind in ("activations", "gradients"))]
_MODULE = re.compile(r"(?:^|\.)((?:layers\.\d+(?=\.|$)|embedding_proj|output_norm|de_embedding_proj).*)$")


class StepFiles(Protocol):
    """The files of one step, by their names relative to it.

    where: the step, for messages. knows_digests: whether `identity` reads no file.
    """

    where: Path
    knows_digests: ClassVar[bool]

    def has(self, name: str) -> bool:
        """Return whether the step has a file, as far as that is known without downloading it."""
        ...

    def find(self, name: str) -> Path | None:
        """Return the path of a file on this machine, downloaded if needed; None when the step has no such file."""
        ...

    def identity(self, name: str) -> str:
        """Return a digest of the content of a file that the step has."""
        ...

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of every file of the step, by name."""
        ...


class LocalFiles:
    """The files of a step in a directory."""

    knows_digests: ClassVar[bool] = False

    def __init__(self, where: Path):
        self.where = where

    def has(self, name: str) -> bool:
        return os.path.lexists(self.where / name)

    def find(self, name: str) -> Path | None:
        """Return the path of a file, None without one. Raises StoreError for a link, a folder, a pipe or a device."""
        if not self.has(name):
            return None
        require_regular(inside(self.where, name))
        return self.where / name

    def identity(self, name: str) -> str:
        try:
            return digest_file(inside(self.where, name)).sha256
        except OSError as error:
            raise StoreError(f"{self.where / name}: cannot be read ({error.strerror})") from error

    def sizes(self) -> dict[str, int]:
        files = ((path, path.lstat()) for path in sorted(self.where.rglob("*")))
        return {
            str(path.relative_to(self.where)): found.st_size for path, found in files if stat.S_ISREG(found.st_mode)
        }


class LegacyCheckpoint(Checkpoint):
    """A step in the format of pico-train. dynamics: the folder of the captures.

    known: {file: {module: key}} as found in other steps of the run. It is used, and extended, where opening a file
    would download it. None: open each file.
    """

    def __init__(
        self, step: int, files: StepFiles, order: RowOrder, dynamics: str = DYNAMICS,
        meta: Mapping[str, Any] | None = None, known: dict[str, dict[str, str]] | None = None,
    ):  # fmt: skip
        self.step, self.path = step, files.where
        self._files, self._order, self._dynamics, self._known = files, order, dynamics, known
        self._meta = {"step": step, **(meta or {})}
        self._opened: dict[str, tuple[PickledTensors | SafeTensors, dict[str, str]]] = {}
        self._identities: dict[str, str] = {}

    @property
    def meta(self) -> Mapping[str, Any]:
        return self._meta

    @property
    def files(self) -> list[str]:
        return list(self._files.sizes())

    @property
    def minimum_bytes(self) -> int:
        return 0  # would need reading every file

    def bytes_by_kind(self) -> dict[str, int]:
        kinds: dict[str, int] = {}
        for name, size in self._files.sizes().items():
            kind = self._kind(name)
            kinds[kind] = kinds.get(kind, 0) + size
        return kinds

    def file_of(self, kind: str, split: str) -> str | None:
        """Return the file that holds the tensors of a kind and split, None when the step has none."""
        return next((name for name in self._candidates(kind, split) if self._files.has(name)), None)

    def select(self, *, kind: str = "*", split: str = "*", module: str = "*") -> list[Address]:
        """Return the matching addresses, as for any checkpoint; opens only files that can hold them."""
        pairs = [pair for pair in _PAIRS if fnmatchcase(pair[0], kind) and fnmatchcase(pair[1], split)]
        return [Address(*pair, name) for pair in pairs for name in self._modules(*pair) if fnmatchcase(name, module)]

    def __getitem__(self, address: Address) -> "Tensor":
        address = Address(*address)
        file = self._holding(address)
        tensors, keys = self._open(file)
        if address.module not in keys:
            raise self._missing(address)
        tensor = tensors[keys[address.module]]
        return self._order.restore(tensor) if address.kind == "activations" else tensor

    def __iter__(self) -> Iterator[Address]:
        return iter(self.select())

    def __len__(self) -> int:
        return len(self.select())

    def __contains__(self, address: object) -> bool:
        return isinstance(address, tuple) and len(address) == 3 and address[2] in self._modules(*address[:2])

    def shape(self, address: Address) -> tuple[int, ...]:
        address = Address(*address)
        tensors, keys = self._open(self._holding(address))
        return tensors.shape(keys[address.module])

    def digest(self, address: Address) -> str:
        """Return a digest of the file's digest, the key in it and, for activations, the order of the rows."""
        address = Address(*address)
        file = self._holding(address)
        if file not in self._identities:
            self._identities[file] = self._files.identity(file)
        order = self._order.tag if address.kind == "activations" else ""
        key = self._modules(address.kind, address.split)[address.module]
        return hashlib.sha256("\n".join((self._identities[file], key, order)).encode()).hexdigest()

    def location(self, address: Address) -> str:
        return str(self.path / self._holding(Address(*address)))

    def read(self, name: str) -> bytes:
        path = self._files.find(name)
        if path is None:
            raise Missing(f"{self.path} has no file {name!r}{did_you_mean(name, self.files)}")
        return read_bytes(path)

    def rows(self, split: str) -> "pa.Table":
        import pyarrow as pa

        paths = [(name, self._files.find(name)) for name in self.row_files(split)]
        if not paths:
            raise Missing(f"{self.path} has no rows of {split!r} ({self._dynamics}/{split}_data)")
        return pa.concat_tables([read_arrow(path, str(self.path / name)) for name, path in paths])

    def row_files(self, split: str) -> list[str]:
        """Return the Arrow files with the rows of a split, in order; none when the step does not keep them."""
        folder = f"{self._dynamics}/{split}_data"
        try:
            data = self.read(f"{folder}/state.json")
        except Missing:
            return [name for name in self.files if name.startswith(f"{folder}/") and name.endswith(".arrow")]
        where = f"{self.path / folder}/state.json"
        listed = parse_json(data, where, DataSetState).data_files
        return [check_name(f"{folder}/{entry.filename}", where) for entry in listed]

    def fetch(self, addresses: Collection[Address], rows: Collection[str] = ()) -> None:
        for pair in _PAIRS:
            if any(all(map(fnmatchcase, pair, pattern[:2])) for pattern in addresses):
                next((path for name in self._candidates(*pair) if (path := self._files.find(name))), None)
        for split in rows:
            for name in self.row_files(split):
                self._files.find(name)

    def verify(self) -> list[str]:
        """Return what is wrong with the files that Pico reads, one sentence each.

        pico-train keeps no digests: only damage that breaks a format, or a checksum of a zip archive, is found.
        """
        problems = []
        for check in [self._check_tensors(*pair) for pair in _PAIRS] + [self._check_rows(split) for split in SPLITS]:
            try:
                check()
            except Missing:
                pass
            except StoreError as error:
                problems.append(str(error))
        return problems

    def _check_tensors(self, kind: str, split: str) -> Callable[[], object]:
        return lambda: (file := self.file_of(kind, split)) and self._open(file)[0].check()

    def _check_rows(self, split: str) -> Callable[[], object]:
        return lambda: self.rows(split)

    def _candidates(self, kind: str, split: str) -> list[str]:
        """Return the files that may hold a kind and split; the first one that exists is used."""
        if (kind, split) == ("weights", ""):
            return [*MODEL_FILES, *(f"{self._dynamics}/{other}_weights.pt" for other in SPLITS)]
        return [f"{self._dynamics}/{split}_{kind}.pt"] if (kind, split) in _PAIRS else []

    def _holding(self, address: Address) -> str:
        file = self.file_of(address.kind, address.split)
        if file is None or address.module not in self._modules(address.kind, address.split):
            raise self._missing(address)
        return file

    def _modules(self, kind: str, split: str) -> Mapping[str, str]:
        """Return the key in the file for each module that has a tensor of this kind and split."""
        file = self.file_of(kind, split)
        if file is None:
            return {}
        if self._known is not None and file in self._known and file not in self._opened:
            return self._known[file]
        return self._open(file)[1]

    def _open(self, file: str) -> tuple[PickledTensors | SafeTensors, dict[str, str]]:
        """Return a file, opened once, and the key of each module in it."""
        if file not in self._opened:
            path = self._files.find(file)
            if path is None:
                raise Missing(f"{self.path} has no file {file!r}")
            name = str(self.path / file)  # a path in the cache of the Hub does not name the step
            tensors = SafeTensors(path, name) if file.endswith(".safetensors") else PickledTensors(path, name)
            self._opened[file] = tensors, _by_module(tensors.keys, name)
        if self._known is not None:
            self._known.setdefault(file, self._opened[file][1])
        return self._opened[file]

    def _missing(self, address: Address) -> Missing:
        """Return the error for an address that is absent; opens only the file that could hold it."""
        there = [Address(*pair, name) for pair in [address[:2]] for name in self._modules(*pair)]
        return absence(str(self.path), address, there or [Address(*pair, "") for pair in _PAIRS if self.file_of(*pair)])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}  # open files are not sent to another process

    def _kind(self, name: str) -> str:
        if name.startswith(STATE):
            return "optimizer"
        if name.startswith(f"{self._dynamics}/") and not name.endswith(".pt"):
            return "data"
        kinds = [kind for kind, split in _PAIRS if name in self._candidates(kind, split)]
        return kind_of_file(name, kinds[0] if kinds else None)


def _by_module(keys: list[str], where: str) -> dict[str, str]:
    """Return the key of each module, layers in order; a wrapper's prefix and the suffix `.weight` are removed.

    Raises StoreError when two keys give the same module.
    """
    modules: dict[str, str] = {}
    for key in sorted(keys, key=natural):
        match = _MODULE.search(key)
        module = (match[1] if match else key).removesuffix(".weight")
        if module in modules:
            raise StoreError(f"{where}: {modules[module]!r} and {key!r} are both {module}; which is meant is not known")
        modules[module] = key
    return modules


def capture_meta(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the token positions of the activations, in the form of Pico's own steps.

    The configuration names one position, counted from either end.
    """
    positions = [lookup(config, "checkpointing.learning_dynamics.sequence_idx", -1)]
    return {"capture": {"positions": positions, "val_positions": positions}}
