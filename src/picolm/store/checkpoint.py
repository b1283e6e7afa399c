"""One step as a mapping from address to tensor: the interface that the rest of the package reads, and Pico's own format.

A step in Pico's format is complete: its manifest holds a digest of every tensor and file.
"""

import hashlib
import io
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from picolm.address import Address
from picolm.errors import FileMissing, StoreError
from picolm.registry import did_you_mean
from picolm.store.files import GONE, FileRecord, digest_file, load_json
from picolm.store.forms import ResumableState, TrainerState
from picolm.store.manifest import MANIFEST, STATE, Manifest, TensorRecord, inside, kind_of_file
from picolm.store.tensors import TensorPlace, read_header, read_tensor, tensor_bytes
from picolm.trusted import check_form, read_bytes

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor


class Missing(StoreError, KeyError):
    """The error for a step, tensor, file or table that does not exist. Its message names those that do."""

    __str__ = Exception.__str__  # a KeyError would print its message in quotes


class Checkpoint(Mapping[Address, "Tensor"]):
    """The state at one step. `checkpoint[address]` reads one tensor, and checks it, only when it is accessed.

    path: where it is stored, for messages; a directory when it is on this machine. step: the number of updates before
    it.
    """

    path: Path
    step: int

    @property
    @abstractmethod
    def meta(self) -> Mapping[str, Any]:
        """Values recorded beside the tensors: `step`; `capture` (token positions of the activations); counters, …"""

    @property
    def about(self) -> Mapping[str, Any]:
        """Provenance that is not part of the state: `replayed`, `thinned`, `renewed`, …"""
        return {}

    @property
    def dropped(self) -> set[str]:
        """Names of the files that were deleted after the step was written, see `Run.thin`."""
        return {
            name for key in ("thinned", "renewed") for entry in self.about.get(key, []) for name in entry["without"]
        }

    @property
    @abstractmethod
    def files(self) -> Collection[str]:
        """Names of the files of the step, relative to its directory."""

    @abstractmethod
    def __getitem__(self, address: Address) -> "Tensor":
        """Return the tensor, on the CPU, as stored. Raises Missing, or StoreError when its file is damaged."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return the content of a file of the step. Raises Missing, or StoreError when it cannot be read."""

    @abstractmethod
    def rows(self, split: str) -> "pa.Table":
        """Return the rows that the activations and gradients of `split` were computed from, in order, as stored.

        Raises Missing when the step does not keep them.
        """

    @abstractmethod
    def digest(self, address: Address) -> str:
        """Return a hexadecimal digest that identifies the content of a tensor, without reading it. Raises Missing."""

    def shape(self, address: Address) -> tuple[int, ...]:
        """Return the shape of a tensor, without reading the tensor where the format allows. Raises Missing."""
        return tuple(self[address].shape)

    @abstractmethod
    def location(self, address: Address) -> str:
        """Return the file that holds a tensor, for messages. Raises Missing."""

    @abstractmethod
    def bytes_by_kind(self) -> dict[str, int]:
        """Return the bytes stored, by kind: weights, optimizer, activations, gradients, data, tokenizer, other."""

    @property
    @abstractmethod
    def minimum_bytes(self) -> int:
        """Elements x element size, summed over all tensors; 0 when that is not known without reading them."""

    @abstractmethod
    def verify(self) -> list[str]:
        """Read everything and return what is wrong with the step, one sentence each; empty when all is well."""

    def fetch(self, addresses: Collection[Address], rows: Collection[str] = ()) -> None:
        """Download the files that hold `addresses` (parts may be shell patterns) and the rows of the splits `rows`.

        Does nothing on disk, and ignores what the step does not have. Raises StoreError.
        """

    def select(self, *, kind: str = "*", split: str = "*", module: str = "*") -> list[Address]:
        """Return the addresses whose parts match the shell patterns, layers in order; empty when none matches."""
        patterns = (kind, split, module)
        return [address for address in self if all(map(fnmatchcase, address, patterns))]

    def rows_digest(self, split: str) -> str | None:
        """Return the sha-256 of the token ids of `rows(split)`, in order, as little-endian int64; None when not stored.

        It is the same for the same rows in any format, so it tells whether two captures were computed from the same
        inputs.
        """
        try:
            return digest_of_rows(self.rows(split), str(self.path))
        except Missing:
            return None

    __eq__ = object.__eq__  # a Mapping would compare by reading every tensor
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    def _missing(self, address: Address) -> Missing:
        return absence(str(self.path), address, list(self))


def absence(where: str, address: Address, there: list[Address]) -> Missing:
    """Return the error `… has no …; did you mean …` for an address.

    It lists the modules with its kind and split, or else the kinds that exist.
    """
    nearest = did_you_mean(str(address), [str(other) for other in there if other.module])
    modules = [other.module for other in there if other[:2] == address[:2]]
    if modules:
        shown = ", ".join(modules[:12]) + (f", … {len(modules)} in all" if len(modules) > 12 else "")
        return Missing(f"{where} has no {address}{nearest} ({'/'.join(address[:2])} is there for: {shown})")
    kinds = sorted({"/".join(other[:2]).rstrip("/") for other in there})
    return Missing(f"{where} has no {address}{nearest} (it holds: {', '.join(kinds) or 'no tensors'})")


def digest_of_rows(table: "pa.Table", where: str) -> str | None:
    """Return the sha-256 of the column `input_ids` as little-endian int64, row after row; None without such a column.

    Raises StoreError when the column holds anything but lists of token ids.
    """
    import pyarrow as pa

    if "input_ids" not in table.column_names:
        return None
    column = table.column("input_ids")
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(test(column.type) for test in lists) or not pa.types.is_integer(column.type.value_type):
        raise StoreError(f"{where}: the column input_ids of its rows holds {column.type}; expected lists of token ids")
    digest = hashlib.sha256()
    for chunk in column.chunks:
        ids = chunk.flatten()
        if chunk.null_count or ids.null_count:
            raise StoreError(f"{where}: the column input_ids of its rows has gaps; expected lists of token ids")
        digest.update(ids.to_numpy(zero_copy_only=False).astype("<i8"))
    return digest.hexdigest()


def weights_digest(tensors: Mapping[Address, "Tensor"]) -> str:
    """Return the sha-256 over the name and sha-256 of each tensor, sorted by name."""
    return _joint({address: hashlib.sha256(tensor_bytes(tensor)).hexdigest() for address, tensor in tensors.items()})


def stored_weights_digest(checkpoint: Checkpoint) -> str | None:
    """Return `weights_digest` of the weights in a checkpoint, from its records; None when it holds none."""
    addresses = checkpoint.select(kind="weights")
    return _joint({address: checkpoint.digest(address) for address in addresses}) if addresses else None


def _joint(digests: Mapping[Address, str]) -> str:
    lines = sorted(f"{address} {digest}\n" for address, digest in digests.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


class SealedCheckpoint(Checkpoint):
    """A step with a manifest. Raises StoreError when its directory has no manifest, or a damaged one."""

    def __init__(self, path: Path):
        self.path = path
        self.manifest = Manifest.from_bytes(self._manifest_bytes(), str(path / MANIFEST))
        self.step = self.manifest.step
        self._headers: dict[str, dict[str, TensorPlace]] = {}

    def locate(self, name: str) -> Path:
        """Return the path of a file of the step on this machine."""
        return inside(self.path, name)

    @property
    def files(self) -> Mapping[str, FileRecord]:
        """Size and digest of each file, by its name in the step; without the manifest."""
        return self.manifest.files

    @property
    def about(self) -> Mapping[str, Any]:
        return self.manifest.about

    @cached_property
    def meta(self) -> dict[str, Any]:
        """Values that the trainer recorded beside the tensors: counters, random states, position in the schedule."""
        where = str(self.path / STATE)
        meta: dict[str, Any] = load_json(self.read(STATE), where, TrainerState)
        if meta.get("resumable"):
            check_form(meta, ResumableState, where)
        return meta

    def record(self, address: Address) -> TensorRecord:
        """Return shape, element type and digest of a tensor, without reading it. Raises Missing."""
        if address in self.manifest.tensors:
            return self.manifest.tensors[address]
        raise self._missing(Address(*address))

    def shape(self, address: Address) -> tuple[int, ...]:
        return tuple(self.record(address).shape)

    def digest(self, address: Address) -> str:
        """Return the recorded sha-256 of the tensor's elements in row-major order."""
        return self.record(address).sha256

    def location(self, address: Address) -> str:
        return str(self.path / self.record(address).file)

    def files_by_kind(self) -> dict[str, list[str]]:
        """Return the names of the files by what they hold.

        Kinds: `weights`, `optimizer`, `activations`, `gradients`, `data` (the rows behind the captures), `tokenizer`,
        and `other` (code and metadata, including the manifest).
        """
        kinds = {record.file: address.kind for address, record in self.manifest.tensors.items()}
        files: dict[str, list[str]] = {"other": [MANIFEST]}
        for name in self.files:
            files.setdefault(kind_of_file(name, kinds.get(name)), []).append(name)
        return files

    def bytes_by_kind(self) -> dict[str, int]:
        """Return the bytes on disk, by the kinds of `files_by_kind`."""
        sizes = {name: record.bytes for name, record in self.files.items()}
        sizes[MANIFEST] = len(self.manifest.to_bytes())
        return {kind: sum(sizes[name] for name in names) for kind, names in self.files_by_kind().items()}

    @property
    def minimum_bytes(self) -> int:
        return sum(record.bytes for record in self.manifest.tensors.values())

    def __getitem__(self, address: Address) -> "Tensor":
        record = self.record(address)
        path = self.locate(record.file)
        try:
            if record.file not in self._headers:
                self._headers[record.file] = read_header(path)
            tensor = read_tensor(path, self._place(record))
        except FileMissing:  # the writer of the run thinned or removed the step meanwhile
            raise Missing(f"{self.path / record.file}: there is no such file any more; {address} was in it") from None
        except OSError as error:
            raise StoreError(f"{path}: cannot be read ({error.strerror}); {address} was in it") from error
        if hashlib.sha256(tensor_bytes(tensor)).hexdigest() != record.sha256:
            raise StoreError(
                f"{self.path / record.file}: the bytes of {address} are not those that were written; run `pico verify`"
            )
        return tensor

    def __iter__(self) -> Iterator[Address]:
        return iter(self.manifest.tensors)

    def __len__(self) -> int:
        return len(self.manifest.tensors)

    def __contains__(self, address: object) -> bool:
        return address in self.manifest.tensors

    def read(self, name: str) -> bytes:
        if name not in self.files:
            raise Missing(f"{self.path} has no file {name!r}{did_you_mean(name, self.files)}")
        path = self.locate(name)
        data = read_bytes(path, most_bytes=self.files[name].bytes)
        if hashlib.sha256(data).hexdigest() != self.files[name].sha256:
            raise StoreError(f"{path}: not the bytes that were written; run `pico verify`")
        return data

    def rows(self, split: str) -> "pa.Table":
        import pyarrow as pa
        import pyarrow.parquet as pq

        name = self.rows_file(split)
        if name is None:
            there = [name for name in self.files if name.endswith("_data.parquet")]
            raise Missing(f"{self.path} has no rows of {split!r} (there are: {', '.join(there) or 'none'})")
        try:
            table = pq.read_table(io.BytesIO(self.read(name)))
            table.validate(full=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise StoreError(f"{self.path / name}: is no table of rows ({str(error).splitlines()[0]})") from error
        return table

    def rows_file(self, split: str) -> str | None:
        """Return the file that holds the rows of a split, None when the step does not keep them."""
        return next((name for name in self.files if ("/" + name).endswith(f"/{split}_data.parquet")), None)

    def verify(self) -> list[str]:
        """Recompute every digest.

        Return one sentence per file that is damaged, missing or not in the manifest; empty when all is well.
        """
        try:
            if self._manifest_bytes() != self.manifest.to_bytes():
                return [f"{self.path / MANIFEST}: changed since it was opened"]
            damaged = [self._file_problem(name, record) for name, record in self.files.items()]
            return [problem for problem in damaged if problem] + self._unknown() + self._misplaced(damaged)
        except StoreError as error:
            return [str(error)]
        except OSError as error:  # its writer replaced the step between the digests and the headers
            return [f"{error.filename}: cannot be read ({error.strerror})"]

    def _place(self, record: TensorRecord) -> TensorPlace:
        place = self._headers[record.file].get(record.key)
        if place is None or (place.shape, place.dtype) != (record.shape, record.dtype):
            raise StoreError(
                f"{self.path / record.file}: {record.key!r} is not as the manifest says; run `pico verify`"
            )
        return place

    def _unknown(self) -> list[str]:
        """Return a problem for each file or link on disk that the manifest does not name.

        Also for each directory that holds none of its files.
        """
        expected = {MANIFEST, *self.files}
        expected |= {str(parent) for name in self.files for parent in Path(name).parents}
        found = (str(path.relative_to(self.path)) for path in sorted(self.path.rglob("*")))
        return [f"{self.path / name}: not in the manifest" for name in found if name not in expected]

    def _misplaced(self, damaged: list[str]) -> list[str]:
        """Return a problem for each otherwise intact file whose header does not agree with the manifest."""
        broken = {name for name, problem in zip(self.files, damaged) if problem}
        problems = []
        for name in sorted({record.file for record in self.manifest.tensors.values()} - broken):
            header = read_header(self.locate(name))
            stored = {
                record.key: (record.shape, record.dtype)
                for record in self.manifest.tensors.values()
                if record.file == name
            }
            if stored != {key: (place.shape, place.dtype) for key, place in header.items()}:
                problems.append(f"{self.path / name}: its tensors are not those of the manifest")
        return problems

    def _manifest_bytes(self) -> bytes:
        try:
            return read_bytes(self.locate(MANIFEST))
        except FileMissing:
            if not self.path.is_dir():
                raise StoreError(f"{self.path} {GONE}") from None
            why = "cannot be read (there is no such file); not a whole checkpoint"
            raise StoreError(f"{self.path / MANIFEST}: {why}") from None

    def _file_problem(self, name: str, record: FileRecord) -> str:
        path = self.path / name
        try:
            found = digest_file(self.locate(name))
        except FileMissing:
            return f"{path}: missing"
        except OSError as error:
            return f"{path}: cannot be read ({error.strerror})"
        except StoreError as error:
            return str(error)
        if found.bytes != record.bytes:
            return f"{path}: {found.bytes} bytes where {record.bytes} were written"
        if found.sha256 != record.sha256:
            return f"{path}: damaged; its sha-256 is {found.sha256[:12]}…, not {record.sha256[:12]}… as written"
        return ""
