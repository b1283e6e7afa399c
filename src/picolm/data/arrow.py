"""Folders that `save_to_disk` of the library datasets wrote, read as they lie: rows of equal length in a column `input_ids`.

    datasets:FOLDER       a Dataset, or a DatasetDict, whose folders are the splits

Row i is in record batch `searchsorted(starts, i)`, and is read from the memory-mapped file alone. A Dataset is of the split that
its state.json names, else of train. The fingerprint is a digest of the name, the rows, the size and the first and last 64 KiB
of each file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from picolm import trusted
from picolm.data import SOURCES
from picolm.data.decode import named
from picolm.data.flat import FlatRows, tokenizer_beside
from picolm.data.manifest import NoSplit, canonical, digest_of, split_of
from picolm.data.parquet import check_length, edges
from picolm.errors import DataError

_END = b"\xff\xff\xff\xff\0\0\0\0"  # of a complete Arrow stream


class ArrowRows(FlatRows):
    """A `Source` over record batches in memory-mapped files."""

    def __init__(self, files: list[Path], row_length: int | None, name: str):
        """`row_length`: tokens needed in a row, longer rows are cut; None takes the rows as they are."""
        self._batches = [(file, rows_RT) for file in files for rows_RT in _read_batches(file) if len(rows_RT)]
        if not self._batches:
            raise DataError(f"{name}: has no rows")
        self._starts = np.cumsum([0, *(len(rows_RT) for _, rows_RT in self._batches)])
        lengths = {rows_RT.shape[1]: file for file, rows_RT in self._batches}
        if len(lengths) > 1:
            raise DataError(f"{' and '.join(map(str, lengths.values()))}: {_unequal(*list(lengths)[:2])}")
        length, file = next(iter(lengths.items()))
        self.row_length = length if row_length is None else row_length
        check_length(length, self.row_length, str(file))
        self.fingerprint = digest_of([len(self), *([file.name, edges(file)] for file in files)])
        self.tokenizer_file = tokenizer_beside(files[0])

    def locate(self, index: int) -> str:
        """Return `FILE row J`."""
        file = self._batches[self._batch_of(index)][0]
        first = next(number for number, (other, _) in enumerate(self._batches) if other == file)
        return f"{file} row {index - int(self._starts[first])}"

    def _read(self, index: int) -> np.ndarray:
        batch = self._batch_of(index)
        rows_RT = self._batches[batch][1]
        return rows_RT[index - int(self._starts[batch]), : self.row_length]

    def _batch_of(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1


@SOURCES.add("datasets")
def open_datasets(place: str, *, split: str = "train", row_length: int | None = None, **_: Any) -> ArrowRows:
    """Return the rows of a split of a folder. Raises DataError."""
    folder = given = Path(place).expanduser()
    if (given / "dataset_dict.json").is_file():
        names = trusted.read_json(given / "dataset_dict.json", dict[str, list[str]], given).get("splits", [])
        own = [name for name in names if canonical(name) == canonical(split)]
        if not own:
            raise NoSplit(f"{place}: has no split {split!r} (there are: {', '.join(names)})")
        folder = _inside(given, own[0])
    if not (folder / "state.json").is_file():
        raise DataError(
            f"{folder}: is no folder that save_to_disk of the library datasets wrote: it has no state.json; parquet files "
            "are read without `datasets:`"
        )
    state = trusted.read_json(folder / "state.json", dict[str, Any], given)
    own_split = canonical(split) if folder != given else split_of(str(state.get("_split") or "")) or "train"
    if own_split != canonical(split):
        raise NoSplit(f"{place}: has no split {split!r} (there are: {own_split})")
    if any(value for key, value in state.items() if key.startswith("_indices")):
        raise DataError(f"{folder}: keeps the order of its rows in a file of its own; save it again with datasets 2")
    trusted.check_form(state.get("_data_files"), list[dict[str, Any]], f"{folder / 'state.json'}: _data_files")
    files = [_inside(folder, str(entry.get("filename"))) for entry in state["_data_files"]]
    for file in files:
        trusted.require_regular(file, given)
    return ArrowRows(files, row_length, place)


def _inside(folder: Path, name: str) -> Path:
    if Path(name).name != name or "\0" in name:
        raise DataError(f"{folder}: names {name!r}, which is not the name of something in it")
    return folder / name


def _read_batches(file: Path) -> Iterator[np.ndarray]:
    """Yield the rows [R, T] of each record batch, where they lie in the memory-mapped file."""
    import pyarrow as pa

    with named(str(file), file, "Arrow"):
        with trusted.open_regular(file) as opened:
            opened.seek(max(0, file.stat().st_size - len(_END)))
            if opened.read() != _END:
                raise pa.ArrowInvalid("its end is not that of an Arrow stream")
        with pa.memory_map(str(file)) as mapped, pa.ipc.open_stream(mapped) as stream:
            schema = stream.schema
        number = schema.get_field_index("input_ids")
        if number < 0:
            raise DataError(f"{file}: has no column input_ids (it has: {', '.join(schema.names)}); tokenize the texts")
        kind = schema.field(number).type
        lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        if not lists or not pa.types.is_integer(kind.value_type):
            raise DataError(f"{file}: column input_ids is of type {kind}; rows of integers (a list) are needed")
        options = pa.ipc.IpcReadOptions(included_fields=[number], use_threads=False)
        with pa.memory_map(str(file)) as mapped, pa.ipc.open_stream(mapped, options=options) as stream:
            for batch in stream:
                yield _as_rows(batch.column(0), file)


def _as_rows(column: Any, file: Path) -> np.ndarray:
    """Return lists of equal length as [R, T], without copying them. Raises DataError where they are not equally long."""
    import pyarrow as pa

    column.validate()  # the sizes of the buffers
    if column.null_count or column.values.null_count:
        raise DataError(f"{file}: input_ids holds nulls; leave such rows out, and save it again")
    if pa.types.is_fixed_size_list(column.type):
        ends_R = (np.arange(len(column) + 1, dtype=np.int64) + column.offset) * column.type.list_size
    else:
        ends_R = column.offsets.to_numpy().astype(np.int64)
    tokens = column.values.to_numpy(zero_copy_only=True)
    lengths_R = np.diff(ends_R)
    if (lengths_R != lengths_R[:1]).any():
        raise DataError(f"{file}: {_unequal(int(lengths_R[0]), int(lengths_R[lengths_R != lengths_R[0]][0]))}")
    length = int(lengths_R[0]) if len(column) else 0
    if len(column) and not (length > 0 and 0 <= ends_R[0] <= ends_R[-1] <= len(tokens)):
        raise DataError(f"{file}: has rows of {length} tokens, or rows outside of the file; save it again")
    return tokens[ends_R[0] : ends_R[0] + len(column) * length].reshape(len(column), length)


def _unequal(first: int, other: int) -> str:
    return (
        f"rows of {first} and of {other} tokens; rows must be equally long: join the documents, cut them into rows, and "
        "save them again, or let `pico data prepare` cut the texts"
    )
