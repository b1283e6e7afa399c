"""Token ids in .npy files, read as they lie: OLMo's, which are bare memory-mapped ids, and those that numpy.save wrote.

    olmo:PATH             .npy files with numpy's header, which says the type of an id
    olmo:uint16:PATH      ids of 2 bytes without a header: Dolma up to 1.7, OLMo 1
    olmo:uint32:PATH      ids of 4 bytes without a header: OLMo 2 and later

A row is the next `row_length` tokens of a file. OLMo takes instances of its own sequence length, whose last token predicts
nothing: `model.max_seq_len` one less than that gives its instances. In an array of two dimensions each line has to be a row.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from picolm.data import SOURCES
from picolm.data.flat import FlatRows, TokenFile, open_flat, whole_tokens
from picolm.errors import DataError

_TYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_MAGIC = b"\x93NUMPY"


@SOURCES.add("olmo")
def open_olmo(place: str, *, split: str = "train", row_length: int | None = None, **_: Any) -> FlatRows:
    """Return the rows of .npy files."""
    word, _colon, rest = place.partition(":")
    read = partial(_npy_file, dtype=_TYPES.get(word), row_length=row_length)
    return open_flat(rest if word in _TYPES else place, ".npy", read, split, row_length)


def _npy_file(path: Path, dtype: np.dtype[Any] | None, row_length: int | None) -> TokenFile:
    with path.open("rb") as file:
        has_header = file.read(len(_MAGIC)) == _MAGIC
    if has_header:
        return _with_header(path, dtype, row_length)
    if dtype is None:
        raise DataError(
            f"{path}: has no header that says how long an id is; say it: olmo:uint16:PATH (Dolma up to 1.7) or "
            "olmo:uint32:PATH (OLMo 2 and later)"
        )
    return TokenFile(path, dtype, 0, whole_tokens(path, dtype.itemsize))


def _with_header(path: Path, dtype: np.dtype[Any] | None, row_length: int | None) -> TokenFile:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy parses the header as Python text: whatever comes of it, the header is none
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: cannot be read as an array of numpy ({reason}); write it again") from None
    if array.dtype.kind not in "iu" or (dtype is not None and array.dtype != dtype):
        raise DataError(f"{path}: holds {array.dtype}; {dtype or 'integers'} are needed")
    lines = array.ndim == 2 and array.shape[1] == row_length and array.flags.c_contiguous
    if array.ndim != 1 and not lines:
        raise DataError(f"{path}: is of shape {array.shape}; one line of ids, or lines of {row_length} ids are needed")
    offset = int(array.offset)
    if offset + array.nbytes != path.stat().st_size:
        raise DataError(f"{path}: holds more than the array of shape {array.shape} of its header; write it again")
    return TokenFile(path, array.dtype, offset, array.size)
