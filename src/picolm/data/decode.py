"""Read one parquet shard: its footer, and the token ids of one row group.

Any problem with the file raises a DataError that names the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from picolm import trusted
from picolm.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq


_MOST_VALUES = 1 << 29  # in one row group: 2 GiB of int32


class Footer(NamedTuple):
    """The parts of a parquet footer that Pico needs, for G row groups.

    ends_G: number of rows up to the end of each row group. lengths_G: mean tokens per row of each row group, from its
    count of values. has_labels: whether there is a column `source`.
    """

    ends_G: np.ndarray
    lengths_G: np.ndarray
    has_labels: bool

    @property
    def rows(self) -> int:
        """The number of rows in the shard."""
        return int(self.ends_G[-1]) if self.ends_G.size else 0


def read_footer(file: Path | Any, name: str) -> Footer:
    """Return the footer of a shard, from its path or an open file (local or remote). `name`: the shard in messages."""
    import pyarrow.parquet as pq

    with named(name, file):
        metadata = pq.read_metadata(_regular(file))
        paths = [metadata.schema.column(column).path for column in range(metadata.num_columns)]
    columns = [column for column, path in enumerate(paths) if path.split(".")[0] == "input_ids"]
    if not columns:
        names = ", ".join(dict.fromkeys(path.split(".")[0] for path in paths))
        raise DataError(
            f"{name}: has no column input_ids (it has: {names}); `pico data prepare` makes token rows out of text"
        )
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    groups_rows = np.array([group.num_rows for group in groups], dtype=np.int64)
    values = np.array([group.column(columns[0]).num_values for group in groups], dtype=np.int64)
    return Footer(np.cumsum(groups_rows), values / np.maximum(groups_rows, 1), "source" in paths)


def read_tokens(path: Path, name: str, group: int) -> np.ndarray:
    """Return the token ids of one row group, int32 [rows, tokens].

    Raises DataError for rows of unequal length or without tokens, negative ids, nulls and other types.
    """
    with opened(path, name) as shard:
        return _tokens(shard, name, group)


def read_groups(path: Path, name: str, with_labels: bool = False) -> Iterator[tuple[np.ndarray, list[str] | None]]:
    """Yield the tokens and the labels of each row group, in order, from a file that is opened once: a footer of many groups takes
    as long to read as they do. Raises like `read_tokens`.
    """
    with opened(path, name) as shard:
        for group in range(shard.num_row_groups):
            yield _tokens(shard, name, group), _labels(shard, name, group) if with_labels else None


def _tokens(shard: pq.ParquetFile, name: str, group: int) -> np.ndarray:
    import pyarrow as pa

    column = _read_column(shard, name, group, "input_ids")
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise DataError(f"{name}: column input_ids is of type {kind}; rows of integers (a list) are needed")
    if not pa.types.is_integer(kind.value_type):
        raise DataError(f"{name}: column input_ids holds {kind.value_type}; token ids are integers")
    if len(column) == 0:
        return np.empty((0, 0), dtype=np.int32)
    values = column.flatten()  # skips null rows, and values outside a slice
    if column.null_count or values.null_count:
        raise DataError(f"{name}: row group {group} of input_ids holds nulls")
    length = _common_length(column, name, group)
    tokens_RT = _as_int32(values.to_numpy(zero_copy_only=False), name).reshape(len(column), length)
    if length == 0 or tokens_RT.min() < 0:
        row = 0 if length == 0 else int(np.argmax((tokens_RT < 0).any(axis=1)))
        wrong = "no tokens" if length == 0 else f"the token id {tokens_RT[row][tokens_RT[row] < 0][0]}"
        raise DataError(
            f"{name}: row {row} of row group {group} has {wrong}; rows hold ids from 0, without padding or masks: leave such "
            "rows out, or cut the text anew with `pico data prepare`"
        )
    return tokens_RT


def read_labels(path: Path, name: str, group: int) -> list[str]:
    """Return the `source` of each row of one row group; empty text for null."""
    with opened(path, name) as shard:
        return _labels(shard, name, group)


def _labels(shard: pq.ParquetFile, name: str, group: int) -> list[str]:
    labels = _read_column(shard, name, group, "source").to_pylist()
    return ["" if label is None else str(label) for label in labels]


def _read_column(shard: pq.ParquetFile, name: str, group: int, column: str) -> pa.Array:
    if column not in shard.schema_arrow.names:
        raise DataError(f"{name}: has no column {column} (it has: {', '.join(shard.schema_arrow.names)})")
    metadata = shard.metadata.row_group(group)
    sizes = [metadata.column(place).num_values for place in range(metadata.num_columns)]
    if max(sizes, default=0) > _MOST_VALUES:
        raise DataError(
            f"{name}: row group {group} holds {max(sizes):,} values, which are decoded at once; write it again with fewer "
            "rows in a group"
        )
    return shard.read_row_group(group, columns=[column], use_threads=False).column(column).combine_chunks()


def _common_length(column: pa.Array, name: str, group: int) -> int:
    import pyarrow as pa

    if pa.types.is_fixed_size_list(column.type):
        return int(column.type.list_size)
    lengths = np.diff(column.offsets.to_numpy())
    if (lengths != lengths[0]).any():
        row = int(np.argmax(lengths != lengths[0]))
        raise DataError(
            f"{name}: row {row} of row group {group} has {lengths[row]} tokens and row 0 has {lengths[0]}; "
            "rows must be equally long (`pico data prepare` cuts text into such rows)"
        )
    return int(lengths[0])


def _as_int32(values: np.ndarray, name: str) -> np.ndarray:
    if values.dtype != np.int32 and values.size:
        limits = np.iinfo(np.int32)
        low, high = values.min(), values.max()
        if low < limits.min or high > limits.max:
            raise DataError(f"{name}: token id {high if high > limits.max else low} does not fit into 32 bits")
    return values.astype(np.int32, copy=False)


@contextmanager
def opened(path: Path, name: str) -> Iterator[pq.ParquetFile]:
    """Open a parquet file; errors inside the block become a DataError that contains `name`."""
    import pyarrow.parquet as pq

    with (
        named(name, path),
        pq.ParquetFile(_regular(path), page_checksum_verification=True) as shard,
    ):  # checked only if the writer stored checksums
        trusted.check_columns(shard.schema_arrow.names, name)
        yield shard


def _regular(file: Path | Any) -> Path | Any:
    """Resolve `file` if it is a path. Raises FileError if it is not a regular file, since a pipe would block."""
    if not isinstance(file, Path):
        return file
    file = file.resolve()
    trusted.require_regular(file)
    return file


@contextmanager
def named(name: str, file: Path | Any, form: str = "parquet") -> Iterator[None]:
    """Convert errors of pyarrow and the file system into a DataError that names the shard. form: the expected format."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:  # a name that is not UTF-8
        if isinstance(file, Path):
            trusted.refuse_lfs_pointer(file.resolve())
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{name}: cannot be read as {form} ({reason}); is the file truncated? fetch or prepare it again"
        ) from error
