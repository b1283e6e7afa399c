"""One step as a mapping from address to tensor, whoever wrote it: what the rest of the package reads."""

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
    """A step, tensor, file or table that was asked for and is not there. The message names what is."""

    __str__ = Exception.__str__  # a KeyError would print its message in quotes


class Checkpoint(Mapping[Address, "Tensor"]):
    """The state at one step. `checkpoint[address]` reads a tensor, and checks it, when it is asked for.

    path: where it is, for people; a directory when it is on this machine. step: the number of updates before it.
    """

    path: Path
    step: int

    @property
    @abstractmethod
    def meta(self) -> Mapping[str, Any]:
        """What was recorded beside the tensors: `step`; `capture` (the positions of the activations); counters, …"""

    @property
    def about(self) -> Mapping[str, Any]:
        """What is known of its origin and is no part of its state: `replayed`, `thinned`, `renewed`, …"""
        return {}

    @property
    def dropped(self) -> set[str]:
        """Names of the files that were deleted since it was written, see `Run.thin`."""
        return {
            name for key in ("thinned", "renewed") for entry in self.about.get(key, []) for name in entry["without"]
        }

    @property
    @abstractmethod
    def files(self) -> Collection[str]:
        """Names of the files of the step, relative to it."""

    @abstractmethod
    def __getitem__(self, address: Address) -> "Tensor":
        """The tensor, on the CPU, as stored. Raises Missing, or StoreError when its file is damaged."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The content of a file of the step. Raises Missing, or StoreError."""

    @abstractmethod
    def rows(self, split: str) -> "pa.Table":
        """The rows that the activations and gradients of `split` belong to, in their order; columns as stored.

        Raises Missing when the step does not keep them.
        """

    @abstractmethod
    def digest(self, address: Address) -> str:
        """Hexadecimal identity of a tensor's content, without reading the tensor. Raises Missing."""

    def shape(self, address: Address) -> tuple[int, ...]:
        """The shape of a tensor, where the format allows without reading it. Raises Missing."""
        return tuple(self[address].shape)

    @abstractmethod
    def location(self, address: Address) -> str:
        """The file that holds a tensor, for people. Raises Missing."""

    @abstractmethod
    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes stored, by kind: weights, optimizer, activations, gradients, data, tokenizer, other."""

    @property
    @abstractmethod
    def minimum_bytes(self) -> int:
        """Elements x element size of every tensor; 0 when that is not known without reading them."""

    @abstractmethod
    def verify(self) -> list[str]:
        """What is wrong with it, one sentence each, having read everything; empty: all is well."""

    def fetch(self, addresses: Collection[Address], rows: Collection[str] = ()) -> None:
        """Bring the files close that hold `addresses` (their parts may be shell patterns) and the rows of the splits `rows`.

        Nothing to do on disk; what the step does not have is passed over. Raises StoreError.
        """

    def select(self, *, kind: str = "*", split: str = "*", module: str = "*") -> list[Address]:
        """The addresses whose parts match shell patterns, layers in order; empty when none does."""
        patterns = (kind, split, module)
        return [address for address in self if all(map(fnmatchcase, address, patterns))]

    def rows_digest(self, split: str) -> str | None:
        """sha-256 of the token ids of `rows(split)`, in order, as little-endian int64; None where they are not stored.

        The same for the same rows in any format, so it tells whether two captures belong to the same inputs.
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
    """`… has no …; did you mean …`, then the modules with its kind and split, or else the kinds that are there."""
    nearest = did_you_mean(str(address), [str(other) for other in there if other.module])
    modules = [other.module for other in there if other[:2] == address[:2]]
    if modules:
        shown = ", ".join(modules[:12]) + (f", … {len(modules)} in all" if len(modules) > 12 else "")
        return Missing(f"{where} has no {address}{nearest} ({'/'.join(address[:2])} is there for: {shown})")
    kinds = sorted({"/".join(other[:2]).rstrip("/") for other in there})
    return Missing(f"{where} has no {address}{nearest} (it holds: {', '.join(kinds) or 'no tensors'})")


def digest_of_rows(table: "pa.Table", where: str) -> str | None:
    """sha-256 of the column `input_ids` as little-endian int64, row after row; None without such a column."""
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
