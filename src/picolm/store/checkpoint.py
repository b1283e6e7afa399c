"""One step as a mapping from address to tensor, in any format: the interface that the rest of the package reads."""

import hashlib
from abc import abstractmethod
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from picolm.address import Address
from picolm.errors import StoreError
from picolm.registry import did_you_mean

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
