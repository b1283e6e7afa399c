"""Token ids of nanoGPT and llm.c, read as they lie: .bin files with ids of 2 bytes.

    nanogpt:PATH      .bin files: bare ids (nanoGPT's prepare.py), or behind the header of llm.c (FineWeb of modded-nanogpt)

A row is the next `row_length` tokens of a file. (nanoGPT itself begins its rows anywhere, at random.) The header of llm.c is 256
numbers of 4 bytes: 20240520, version 1, the count of ids; or 20240801, version 7, for ids of 4 bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from picolm.data import SOURCES
from picolm.data.flat import FlatRows, TokenFile, open_flat, whole_tokens
from picolm.errors import DataError

_HEADER_BYTES = 1024
_WIDTHS = {(20240520, 1): 2, (20240801, 7): 4}


@SOURCES.add("nanogpt")
def open_nanogpt(place: str, *, split: str = "train", row_length: int | None = None, **_: Any) -> FlatRows:
    """Return the rows of .bin files."""
    return open_flat(place, ".bin", _bin_file, split, row_length)


def _bin_file(path: Path) -> TokenFile:
    if path.with_suffix(".idx").exists():
        raise DataError(f"{path}: has an index beside it, as Megatron and GPT-NeoX write it; read it as megatron:PATH")
    header = np.fromfile(path, "<i4", 3)
    magic, version, count = header.tolist() if len(header) == 3 else (0, 0, 0)
    if magic not in {known for known, _ in _WIDTHS}:
        return TokenFile(path, np.dtype("<u2"), 0, whole_tokens(path, 2))
    if (magic, version) not in _WIDTHS:
        raise DataError(f"{path}: has the header of llm.c in version {version}, which is not known; is it cut off?")
    width = _WIDTHS[magic, version]
    if whole_tokens(path, width, _HEADER_BYTES) != count:
        raise DataError(
            f"{path}: its header tells of {count} tokens, and {path.stat().st_size - _HEADER_BYTES} bytes follow; fetch it again"
        )
    return TokenFile(path, np.dtype(f"<u{width}"), _HEADER_BYTES, count)
