"""A series of checkpoints of transformers: a folder whose subfolders are its steps, as training scripts and the Trainer leave it.

    step100/ · checkpoint-500/ · step-0001000/ · ckpt_010/ · stage1-step100-tokens3B/
        config.json, model.safetensors (or shards with an index, or pytorch_model.bin), trainer_state.json of the Trainer

Where the names of folders do not say the steps, `series.yaml` does: `steps: {start: 0, later/model: 100}`. Weights are named as
in their files. Where one matrix holds queries, keys and values, the three are addresses of their own beside it.
"""

import hashlib
import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, Field

from picolm.address import Address
from picolm.document import parse_yaml
from picolm.errors import FileError, StoreError
from picolm.models.anatomy import Anatomy
from picolm.readers.families import FAMILIES, Family, anatomy_of
from picolm.registry import did_you_mean
from picolm.store.checkpoint import Checkpoint, Missing, absence
from picolm.store.foreign import PickledTensors, SafeTensors
from picolm.store.legacy import LocalFiles, StepFiles
from picolm.store.manifest import Directories, check_name, inside, kind_of_file, natural
from picolm.store.run import Run
from picolm.trusted import check_form, parse_json, read_bytes

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

log = logging.getLogger("picolm")

ANATOMY, CONFIG, INDEXED = "anatomy.json", "config.json", ".index.json"
WEIGHTS = ("model.safetensors", f"model.safetensors{INDEXED}", "pytorch_model.bin", f"pytorch_model.bin{INDEXED}")
SERIES = "series.yaml"
QKV = ("attention.query", "attention.key", "attention.value")
_STEP = re.compile(
    r"(?:^|[-_.])(?:global_?step|step|checkpoint|ckpt|iter)[-_]?(\d{1,15})([kK]?)(?=$|[-_.])|^(\d{1,15})$"
)
# Buffers: causal masks and frequencies, which are computed and not trained.
_BUFFER = re.compile(r"(?:\.(?:attn|attention)\.(?:bias|masked_bias)|rotary_emb\.inv_freq)$")


class _Index(BaseModel):
    weight_map: dict[str, str]


class _Logged(BaseModel, extra="allow"):
    step: int


class _TrainerState(BaseModel, extra="allow"):
    """trainer_state.json, as the Trainer of transformers writes it."""

    global_step: int
    log_history: list[_Logged] = []


class _Series(BaseModel, extra="forbid"):
    """series.yaml: the step that each folder holds."""

    steps: dict[str, Annotated[int, Field(ge=0)]]


class SeriesCheckpoint(Checkpoint):
    """One checkpoint of transformers: its weights, as named in its files, and what its configuration says of its parts.

    identities: digests of files that are known already, by name; those that are computed are added.
    """

    def __init__(self, step: int, files: StepFiles, identities: dict[str, str] | None = None):
        self.step, self.path, self._files = step, files.where, files
        self._opened: dict[str, PickledTensors | SafeTensors] = {}
        self._identities = {} if identities is None else identities

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
        """What is known of its architecture, None for one that is not known."""
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
            held = dict.fromkeys(self._open(name).keys, name)
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
        return [address for address in every if _matches(address, split, module)]

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
        if self._is_transposed(holder):
            tensor = tensor.T.contiguous()
        return tensor if role is None else self._part(tensor, role)

    def shape(self, address: Address) -> tuple[int, ...]:
        holder, role = self._place(address)
        file, key = self._keys[holder]
        shape = self._open(file).shape(key)
        shape = shape[::-1] if self._is_transposed(holder) else shape
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

    def _is_transposed(self, module: str) -> bool:
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
        return {"attention.query": heads * size, "attention.key": kv_heads * size, "attention.value": kv_heads * size}

    def _part(self, tensor: "Tensor", role: str) -> "Tensor":
        """Return the rows of one role of a matrix of three, sorted by head."""
        rows, number = self._rows(tensor.shape[0]), QKV.index(role)
        if self.family is not None and self.family.order == "by head":
            heads = self.anatomy.heads or 0
            return tensor.unflatten(0, (heads, 3, -1))[:, number].flatten(0, 1).clone()
        return tensor.split([rows[each] for each in QKV])[number].clone()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}  # open files are not sent to another process


class Series(Run):
    """A folder of checkpoints of transformers, read-only. folders: that of each step, relative to the folder."""

    def __init__(self, path: Path, folders: Mapping[int, str]):
        super().__init__(path, Directories())
        self.folders = dict(sorted(folders.items()))
        self._identities: dict[int, dict[str, str]] = {}

    @property
    def name(self) -> str:
        return self.path.name

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration of the last step's model, as its `model` section."""
        return {"model": self[self.steps[-1]].config}  # type: ignore[attr-defined]

    @cached_property
    def environment(self) -> dict[str, Any]:
        return {}

    @property
    def steps(self) -> list[int]:
        return list(self.folders)

    def step_directories(self) -> list[int]:
        return self.steps

    def step_path(self, step: int) -> Path:
        return inside(self.path, self.folders[step])

    def __getitem__(self, step: int) -> Checkpoint:
        if step not in self.folders:
            raise self._no_step(step)
        return SeriesCheckpoint(step, self._files(step), self._identities.setdefault(step, {}))

    def _files(self, step: int) -> StepFiles:
        return LocalFiles(self.step_path(step))

    def __contains__(self, step: object) -> bool:
        return step in self.folders

    def read_metrics(self, keys: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
        """Yield what the Trainer logged until its last checkpoint, under the names that Pico logs; nothing without it."""
        file = self._files(self.steps[-1]).find("trainer_state.json")
        if file is None:
            return
        names = {"loss": "train/loss", "grad_norm": "grad_norm", "learning_rate": "lr"}
        state = parse_json(read_bytes(file), str(file), _TrainerState)
        for logged in state.log_history:
            numbers = {key: value for key, value in (logged.model_extra or {}).items() if type(value) in (int, float)}
            entry = {names.get(key, f"trainer/{key}"): value for key, value in numbers.items()}
            if keys is None or any(key in entry for key in keys):
                yield {"step": logged.step} | {
                    key: value for key, value in entry.items() if keys is None or key in keys
                }

    def problems(self, step: int) -> list[str]:
        """Return what is wrong with a step, and which other steps hold the same weights, or some of the same files."""
        return [*self[step].verify(), *self.doubts.get(step, [])]

    @cached_property
    def doubts(self) -> dict[int, list[str]]:
        """For each step, what is doubtful of it: files of weights that are those of another step, by their digests.

        Of steps with the same file, the last step of the series counts as right, else the earliest one.
        """
        holders: dict[str, dict[int, str]] = {}  # digest -> step -> name of the file
        count: dict[int, int] = {}
        for step in self.steps:
            try:
                own = self[step].identities()  # type: ignore[attr-defined]
            except (StoreError, FileError):
                continue  # `verify` says why
            count[step] = len(own)
            for name, digest in own.items():
                holders.setdefault(digest, {})[step] = name
        copied: dict[int, dict[int, list[str]]] = {}  # step -> the step that it is like -> names of files
        for steps in holders.values():
            right = self.steps[-1] if self.steps[-1] in steps else min(steps)
            for step, name in steps.items():
                if step != right:
                    copied.setdefault(step, {}).setdefault(right, []).append(name)
        return {step: list(self._copies(step, count[step], others)) for step, others in copied.items()}

    def _copies(self, step: int, count: int, others: Mapping[int, Sequence[str]]) -> Iterator[str]:
        for other, names in others.items():
            last = " (the last one)" if other == self.steps[-1] else ""
            if len(names) == count:
                yield f"{self.step_path(step)}: holds the weights of step {other}{last}, to the byte"
            else:
                yield (
                    f"{self.step_path(step)}: mixes two steps: {', '.join(sorted(names))} of step {other}{last} with "
                    f"{count - len(names)} other file(s)"
                )

    def lock(self) -> AbstractContextManager[None]:
        raise StoreError(
            f"{self.path}: a series of checkpoints of transformers; it can be read and analyzed, not added to"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return Series, (self.path, self.folders)


def open_series(place: str) -> Run | None:
    """Return the series at `place` (its folder, its series.yaml, or one of its steps), None where there is none.

    Raises StoreError where two folders have the same step, and for what series.yaml says that is not so.
    """
    if place.startswith("hub:"):
        from picolm.readers.hub_series import open_hub_series

        return open_hub_series(place)
    path = Path(place).absolute()
    if path.name == SERIES:
        path = path.parent
    if not path.is_dir():
        return None
    if _is_checkpoint(path):  # one step of a series
        path = path.parent
    if os.path.lexists(path / SERIES):
        return Series(path, _described(path / SERIES))
    folders = sorted((entry.name for entry in path.iterdir() if _is_checkpoint(entry)), key=natural)
    numbered = {folder: step for folder in folders if (step := step_of(folder)) is not None}
    if not numbered:
        return None
    if others := [folder for folder in folders if folder not in numbered]:
        log.warning("%s: %s has no step in its name and is left out (see series.yaml).", path, ", ".join(others))
    return Series(path, _by_step(numbered, path / SERIES))


def step_of(name: str) -> int | None:
    """Return the step in the name of a folder (`stage1-step32-tokens17B` is 32, `step-480k` is 480000); None for none or two."""
    found = list(_STEP.finditer(name))
    if len(found) != 1:
        return None
    number, thousands, bare = found[0].groups()
    return int(bare) if bare is not None else int(number) * (1000 if thousands else 1)


def _described(file: Path) -> dict[int, str]:
    raw = parse_yaml(read_bytes(file).decode("utf-8", "replace"), str(file))
    check_form(raw, _Series, str(file))
    steps: dict[str, int] = raw["steps"]
    if gone := [name for name in steps if not _is_checkpoint(inside(file.parent, check_name(name, str(file))))]:
        raise StoreError(f"{file}: {gone[0]} holds no checkpoint of transformers (no {CONFIG} and no weights)")
    return _by_step(steps, file)


def _by_step(steps: Mapping[str, int], file: Path) -> dict[int, str]:
    """Return the folder of each step. Raises StoreError for two of one step. file: where the user says which is meant."""
    found: dict[int, str] = {}
    for folder, step in steps.items():
        if step in found:
            raise StoreError(
                f"{file.parent}: {found[step]} and {folder} are both step {step}; say in {file} which folder is which step, as "
                f"`steps: {{{found[step]}: {step}, …}}`"
            )
        found[step] = folder
    return found


def _is_checkpoint(path: Path) -> bool:
    if path.is_symlink() or not path.is_dir():
        return False
    return any(os.path.lexists(path / name) for name in WEIGHTS) or os.path.lexists(path / CONFIG)


def _matches(address: Address, split: str, module: str) -> bool:
    from fnmatch import fnmatchcase

    return fnmatchcase(address.split, split) and fnmatchcase(address.module, module)
