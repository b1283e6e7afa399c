"""Tensors in safetensors files, with a digest of each tensor and one of the file, computed while writing.

Files are not written by the safetensors library: a digest would need reading the file again, and it reports a full disk
only as text. The library reads headers, without torch. A tensor is read as its bytes only, into its own memory: if a
file is cut or deleted later, the process does not crash, as it could with the library's memory map. The tests compare
both directions with the library.
"""

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from picolm.errors import FileMissing, StoreError
from picolm.store.files import DigestingFile, FileRecord
from picolm.trusted import open_regular, require_regular

if TYPE_CHECKING:
    from torch import Tensor

# Element type: name in torch -> (name in safetensors, bytes of one element).
DTYPES = {
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}
_TORCH_NAME = {code: name for name, (code, _) in DTYPES.items()}


def dtype_name(tensor: "Tensor") -> str:
    return str(tensor.dtype).removeprefix("torch.")


def tensor_bytes(tensor: "Tensor") -> memoryview:
    """Return the elements in row-major order. Copies only a tensor that is not contiguous or not in main memory."""
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_tensors(path: Path, tensors: Mapping[str, "Tensor"]) -> tuple[FileRecord, dict[str, str]]:
    """Write a safetensors file; return its record and the sha-256 of each tensor's bytes by key.

    The same tensors give the same bytes, in whatever order they are passed: sorted by element size, largest first (so
    that each tensor is aligned), then by name.
    """
    keys = sorted(tensors, key=lambda key: (-DTYPES[dtype_name(tensors[key])][1], key))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key in keys:
        code, width = DTYPES[dtype_name(tensors[key])]
        end = offset + tensors[key].numel() * width
        header[key] = {"dtype": code, "shape": list(tensors[key].shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digests = {}
    with DigestingFile(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key in keys:
            data = tensor_bytes(tensors[key])
            digests[key] = hashlib.sha256(data).hexdigest()
            file.write(data)
    return file.record, digests


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor is in its file: bytes [start, stop)."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> dict[str, TensorPlace]:
    """Return the places of the tensors in a safetensors file, by key.

    The library reads and checks the header. The format allows no gaps: each tensor begins where the one before it ends.
    Raises FileMissing, and StoreError for a file that is damaged, cut, or of another format.
    """
    from safetensors import SafetensorError, safe_open

    start = require_regular(path).st_size
    try:
        with safe_open(path, framework="numpy") as file:
            entries = [(key, file.get_slice(key)) for key in file.offset_keys()]
            forms = [(key, _TORCH_NAME[entry.get_dtype()], tuple(entry.get_shape())) for key, entry in entries]
    except FileNotFoundError:
        raise FileMissing(f"{path}: there is no such file") from None
    except (SafetensorError, KeyError, OSError, MemoryError) as error:
        raise StoreError(f"{path}: damaged, or not a safetensors file ({error})") from error
    places = {}
    for key, dtype, shape in reversed(forms):
        stop, start = start, start - math.prod(shape) * DTYPES[dtype][1]
        places[key] = TensorPlace(dtype, shape, start, stop)
    return dict(reversed(places.items()))


def read_tensor(path: Path, place: TensorPlace) -> "Tensor":
    """Return one tensor on the CPU; reads only its bytes. Raises StoreError when the file was cut."""
    import torch

    raw = torch.empty(place.stop - place.start, dtype=torch.uint8)
    with open_regular(path) as file:
        file.seek(place.start)
        if file.readinto(raw.numpy().data) != len(raw):
            raise StoreError(f"{path}: ends before byte {place.stop}; the file was cut")
    return raw.view(getattr(torch, place.dtype)).reshape(place.shape)
