"""Read token files of other tools, which are one long sequence of token ids, without converting them.

    datatrove:PATH    .ds files of datatrove's DocumentTokenizer: token ids of 2 or 4 bytes (see .ds.metadata)

Others are in `megatron.py`, `olmo.py` and `nanogpt.py`. PATH is a file, a folder or a glob. A row is the next
`row_length` tokens of a file; the rest at the end of a file is in no row. Row i is found by arithmetic, and only its
bytes are read. Rows are in the order of the files; `data.dataset.shuffle: true` permutes them from the first pass on.

The fingerprint is a digest of the name, the size and the first and last 64 KiB of each file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from picolm import trusted
from picolm.data import SOURCES
from picolm.data.manifest import NoSplit, canonical, digest_of, matching, split_of
from picolm.data.parquet import edges
from picolm.errors import DataError


class TokenFile(NamedTuple):
    """A file of consecutive token ids, starting at byte `offset`.

    overlap: number of tokens at the end of a row that are also at the beginning of the next row.
    """

    path: Path
    dtype: np.dtype[Any]
    offset: int
    tokens: int
    overlap: int = 0


class FlatRows:
    """A `Source` over files of token ids."""

    eos: int | None = None
    max_token: int | None = None
    max_token_file: str | None = None
    tokenizer_sha256: str | None = None

    def __init__(self, files: Sequence[TokenFile], row_length: int, name: str):
        self._files, self.row_length = list(files), row_length
        counts = (max(0, file.tokens - file.overlap) // (row_length - file.overlap) for file in files)
        self._starts = np.cumsum([0, *counts])
        self.fingerprint = digest_of(
            [file.path.name, edges(file.path), str(file.dtype), file.offset, *([file.overlap] if file.overlap else [])]
            for file in files
        )
        self.tokenizer_file = tokenizer_beside(files[0].path)
        if len(self) == 0:
            raise DataError(
                f"{name}: its {sum(file.tokens for file in files)} tokens are too few for a row of {row_length}"
            )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Return the rows with these numbers, int32 [R, row_length].

        Raises DataError for a number that does not exist, a truncated file or ids that do not fit into int32.
        """
        tokens_RT = np.empty((len(indices), self.row_length), dtype=np.int32)
        for place, index in enumerate(indices.tolist()):
            if not 0 <= index < len(self):
                raise DataError(f"row {index} of a data set of {len(self)} rows")
            read = self._read(index)
            if len(read) < self.row_length or not _fits_int32(read):
                raise DataError(
                    f"{self.locate(index)}: is cut off, or holds ids beyond 32 bits; was the file exchanged?"
                )
            tokens_RT[place] = read
        return tokens_RT

    def labels(self, indices: np.ndarray) -> list[str] | None:
        """Return None: these files have no labels."""
        return None

    def locate(self, index: int) -> str:
        """Return `FILE row J`."""
        file, row = self._place(index)
        return f"{file.path} row {row}"

    def _read(self, index: int) -> np.ndarray:
        file, row = self._place(index)
        first = file.offset + row * (self.row_length - file.overlap) * file.dtype.itemsize
        return np.fromfile(file.path, file.dtype, self.row_length, offset=first)

    def _place(self, index: int) -> tuple[TokenFile, int]:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._files[number], index - int(self._starts[number])


def open_flat(
    place: str, ending: str, read: Callable[[Path], TokenFile], split: str, row_length: int | None
) -> FlatRows:
    """Return the rows of one split of the files at `place` whose names end in `ending`.

    read: describes the content of a file. Raises DataError if there are no such files, if none is of the split, or if
    `row_length` is None.
    """
    given = Path(place).expanduser()
    if given.is_dir():
        base, files = (
            given,
            sorted(path for path in given.rglob(f"*{ending}") if not _is_hidden(path.relative_to(given))),
        )
    else:
        base, files = (given.parent, [given]) if given.is_file() else matching(str(given))
    if not files:
        raise DataError(f"{place}: there are no {ending} files")
    for file in files:
        real = file.resolve() if given == file else file
        trusted.require_regular(real, None if given == file else base)
        trusted.refuse_lfs_pointer(real)
    splits = {file: split_of(file.relative_to(base).as_posix()) or "train" for file in files}
    own = [file for file in files if splits[file] == canonical(split)]
    if not own:
        raise NoSplit(
            f"{place}: has no {ending} files of the split {split!r} (there are: {', '.join(sorted(set(splits.values())))})"
        )
    if row_length is None:
        raise DataError(f"{place}: {ending} files have no rows of their own; say how many tokens a row has")
    return FlatRows([read(file) for file in own], row_length, place)


def whole_tokens(path: Path, width: int, offset: int = 0) -> int:
    """Return how many token ids of `width` bytes a file holds behind byte `offset`. Raises DataError if not whole."""
    size = path.stat().st_size - offset
    if size < 0 or size % width:
        raise DataError(f"{path}: has {size} bytes, which are no whole tokens of {width} bytes; is it cut off?")
    return size // width


def tokenizer_beside(file: Path) -> Path | None:
    """Return the tokenizer.json in the folder of a file or the one above (`out` of `out/train`), None if there is none."""
    beside = (folder / "tokenizer.json" for folder in list(file.parents)[:2])
    return next((tokenizer for tokenizer in beside if tokenizer.is_file()), None)


def _fits_int32(tokens: np.ndarray) -> bool:
    limits = np.iinfo(np.int32)
    return np.can_cast(tokens.dtype, np.int32) or bool(limits.min <= tokens.min() and tokens.max() <= limits.max)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


@SOURCES.add("datatrove")
def open_datatrove(place: str, *, split: str = "train", row_length: int | None = None, **_: Any) -> FlatRows:
    """Open the .ds files of datatrove at `place`."""
    return open_flat(place, ".ds", _ds_file, split, row_length)


def _ds_file(path: Path) -> TokenFile:
    metadata = path.with_name(path.name + ".metadata")
    width = 2
    if os.path.lexists(metadata):
        first = trusted.read_text(metadata, most_bytes=1 << 20).partition("\n")[0]
        word = first.rpartition("|")[2].strip()
        if word not in ("2", "4"):
            raise DataError(f"{metadata}: its first line should end in |2 or |4, the bytes of a token")
        width = int(word)
    return TokenFile(path, np.dtype(f"<u{width}"), 0, whole_tokens(path, width))
