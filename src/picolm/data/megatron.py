"""Tokens of Megatron-LM and GPT-NeoX, read as they lie: NAME.bin holds the ids, NAME.idx says where its sequences begin.

    megatron:PATH     .bin files, each with its .idx

Rows are cut as GPT-NeoX cuts them from documents in the order of the file: row i is tokens i*T to i*T + T of all sequences one
behind the other, T + 1 tokens, of which the last is the first of row i + 1; (tokens - 1) // T rows in all. Its own training
shuffles documents and samples besides. Where each sequence is T + 1 tokens long already (Pythia's preshuffled data), the
sequences are the rows.

NAME.idx, little-endian: "MMIDIDX" and two zero bytes, version 1 (8 bytes), code of the type of an id (1), numbers of sequences
and of document indices (8 each), then tokens of each sequence (4 each), its first byte in NAME.bin (8 each), document indices
(8 each). The document indices are not needed for the cut.
"""

from __future__ import annotations

import struct
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from picolm import trusted
from picolm.data import SOURCES
from picolm.data.flat import FlatRows, TokenFile, open_flat, whole_tokens
from picolm.errors import DataError, FileMissing

_MAGIC, _HEADER = b"MMIDIDX\x00\x00", struct.Struct("<9sQBQQ")
_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floating-point numbers
_CHUNK = 1 << 20  # sequences that are checked at once: memory stays flat for indices of gigabytes


@SOURCES.add("megatron")
def open_megatron(place: str, *, split: str = "train", row_length: int | None = None, **_: Any) -> FlatRows:
    """Return the rows of .bin files with their .idx."""
    return open_flat(place, ".bin", partial(_bin_file, row_length=row_length or 0), split, row_length)


def _bin_file(path: Path, row_length: int) -> TokenFile:
    index = path.with_suffix(".idx")
    try:
        with trusted.open_regular(index) as file:
            size, header = index.stat().st_size, file.read(_HEADER.size)
    except FileMissing:
        raise DataError(
            f"{path}: there is no {index.name} beside it, which says what it holds; shards of one file (-00000-of-…) have "
            "to be put together first (cat, in their order)"
        ) from None
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise DataError(f"{index}: is no index of Megatron or GPT-NeoX (--dataset-impl mmap); tokenize the text again")
    _, version, code, sequences, documents = _HEADER.unpack(header)
    if version != 1 or code not in _TYPES:
        raise DataError(f"{index}: is of version {version} with ids of type {code}; version 1 with integers is read")
    if size != _HEADER.size + 12 * sequences + 8 * documents:
        raise DataError(f"{index}: has {size} bytes, which its {sequences} sequences do not fill; is it cut off?")
    dtype = np.dtype(_TYPES[code])
    tokens, shortest, longest = _check_sequences(index, sequences, dtype.itemsize)
    if tokens != whole_tokens(path, dtype.itemsize):
        raise DataError(
            f"{path}: has {path.stat().st_size} bytes, and {index.name} tells of {tokens * dtype.itemsize}; is it cut off, or "
            "one of several shards, which have to be put together first (cat, in their order)?"
        )
    are_rows = shortest == longest == row_length or row_length == 1
    return TokenFile(path, dtype, 0, tokens, overlap=0 if are_rows else 1)


def _check_sequences(index: Path, sequences: int, width: int) -> tuple[int, int, int]:
    """Return the tokens of all sequences, and those of the shortest and of the longest one.

    Raises DataError where they do not lie one behind the other, as the cut takes them.
    """
    tokens, shortest, longest = 0, 1 << 31, 0
    for first in range(0, sequences, _CHUNK):
        count = min(_CHUNK, sequences - first)
        sizes = np.fromfile(index, "<i4", count, offset=_HEADER.size + 4 * first).astype(np.int64)
        begins = np.fromfile(index, "<i8", count, offset=_HEADER.size + 4 * sequences + 8 * first)
        expected = (tokens + np.cumsum(sizes) - sizes) * width
        if len(sizes) < count or len(begins) < count or sizes.min() < 0 or (begins != expected).any():
            raise DataError(f"{index}: its sequences do not lie one behind the other; write the files again")
        tokens += int(sizes.sum())
        shortest, longest = min(shortest, int(sizes.min())), max(longest, int(sizes.max()))
    return tokens, shortest, longest
