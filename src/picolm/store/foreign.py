"""Read files that other tools wrote: pickled tensors (without running code in the pickle), safetensors, Arrow.

`torch.save` writes zip archives. Their names and shapes are read first, through a memory map. Before the first tensor
is returned, the whole file is compared with its checksums (torch itself does not check them).
"""

import lzma
import pickle
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from picolm.errors import StoreError
from picolm.store.tensors import TensorPlace, read_header, read_tensor
from picolm.trusted import check_columns, open_regular, require_regular

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
# What zipfile raises for damaged archives; for encrypted parts and unknown methods it is a RuntimeError.
_DAMAGED_ZIP = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, RuntimeError, EOFError, ValueError)


class PickledTensors:
    """The tensors of a `torch.save` file, by key. Raises StoreError for any other content, and for a damaged file."""

    def __init__(self, path: Path, name: str = "", inside: str = ""):
        """Open the file. name: its name in messages; its path by default.

        inside: the entry that holds the tensors where the file holds more; `others` has the rest. A file without it holds them.
        """
        self.path, self.name = path, name or str(path)
        self._is_zip = _is_zip(path)  # torch up to 1.5 wrote another format, which has no checksums
        self._tensors, self.others = _load(path, self._is_zip, self.name, inside)
        self._checked = not self._is_zip

    @property
    def keys(self) -> list[str]:
        return list(self._tensors)

    def __getitem__(self, key: str) -> "Tensor":
        """Return the tensor, in its own memory. Raises StoreError when a checksum of the file is wrong."""
        self.check()
        return self._tensors[key].detach().clone()

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].shape)

    def check(self) -> None:
        """Raise StoreError when a checksum of the file is wrong. Reads the file once."""
        if not self._checked:
            _check(self.path, self.name)
            self._checked = True


class SafeTensors:
    """The tensors of a safetensors file, by key."""

    def __init__(self, path: Path, name: str = ""):
        """Open the file. name: its name in messages; its path by default."""
        self.path, self.name = path, name or str(path)
        self._places = _header(path)

    @property
    def keys(self) -> list[str]:
        return list(self._places)

    def __getitem__(self, key: str) -> "Tensor":
        try:
            return read_tensor(self.path, self._places[key])
        except OSError as error:
            raise StoreError(f"{self.name}: cannot be read ({error.strerror})") from error

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._places[key].shape)

    def check(self) -> None:
        """Do nothing: the format has no checksums, and the header was compared with the file size on opening."""


def _header(path: Path) -> dict[str, TensorPlace]:
    try:
        return read_header(path)
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror})") from error


def read_arrow(path: Path | None, where: str) -> "pa.Table":
    """Return a table in Arrow's stream format. Raises StoreError when it is missing, damaged or cut."""
    import pyarrow as pa

    if path is None:
        raise StoreError(f"{where}: missing, though the data set beside it lists it")
    try:
        with open_regular(path) as file:
            data = file.read()
        table = pa.ipc.open_stream(data).read_all()
        table.validate(full=True)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise StoreError(f"{where}: damaged, or not an Arrow stream ({str(error).splitlines()[0]})") from error
    if not data.endswith(_END_OF_STREAM):  # pyarrow accepts a file that was cut between two batches
        raise StoreError(f"{where}: ends too early; fetch or copy it again")
    check_columns(table.column_names, where)
    return table


def _load(path: Path, is_zip: bool, name: str, inside: str) -> tuple[Mapping[str, "Tensor"], Mapping[str, Any]]:
    """Return the tensors of a file, and what else it holds."""
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise StoreError(f"{name}: {_refusal(str(error))}") from error
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise StoreError(f"{name}: damaged, or not a file of torch.save ({first_line(error)})") from error
    others: Mapping[str, Any] = {}
    if inside and isinstance(content, dict) and isinstance(content.get(inside), dict):
        others = {key: value for key, value in content.items() if key != inside}
        content = content[inside]
    size = path.stat().st_size
    wrong = [key for key, value in content.items() if not _is_entry(key, value)] if isinstance(content, dict) else None
    if wrong is None or wrong:
        found = type(content).__name__ if wrong is None else f"{wrong[0]!r}"
        raise StoreError(f"{name}: holds {found}, where a mapping from names to tensors was expected")
    for key, tensor in content.items():  # with strides of 0, a few bytes make a tensor of any size
        if tensor.numel() * tensor.element_size() > size:
            raise StoreError(f"{name}: {key!r} has shape {list(tensor.shape)}, more than the file holds")
    return content, others


def _is_entry(key: Any, value: Any) -> bool:
    import torch

    return isinstance(key, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided


def _is_zip(path: Path) -> bool:
    require_regular(path)
    try:
        return zipfile.is_zipfile(path)
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror})") from error
    except _DAMAGED_ZIP as error:
        raise StoreError(f"{path}: damaged ({first_line(error)})") from error


def _check(path: Path, name: str) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, *_DAMAGED_ZIP) as error:
        raise StoreError(f"{name}: damaged ({first_line(error)})") from error
    if damaged is not None:
        raise StoreError(f"{name}: damaged: the checksum of its part {damaged!r} does not hold; fetch or copy it again")


def _refusal(message: str) -> str:
    """Return what the restricted unpickler refused, in our words: torch's own message advises to run the code."""
    objection = next((line for line in message.splitlines() if "nsupported" in line or "not allowed" in line), "")
    if "GLOBAL" in objection or "class" in objection or "REDUCE" in objection:
        return f"holds code, not only tensors ({objection.strip()[:120]}); it is not loaded, because that would run the code"
    return f"damaged, or holds more than tensors ({first_line(message)})"


def first_line(error: object) -> str:
    """Return the first line of what an error says, else what it is called."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
