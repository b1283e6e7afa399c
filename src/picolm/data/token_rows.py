"""Read rows of token ids from one file: FILE.npy, or FILE.parquet:COLUMN."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from picolm.errors import DataError


def read_token_rows(place: str) -> list[np.ndarray] | None:
    """Return the rows in a file, int64 [S] each; None if it holds texts. Raises DataError for a file that cannot be read."""
    name, _, column = place.rpartition(":") if ".parquet:" in place else (place, "", "")
    path = Path(name)
    if path.suffix == ".npy":
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path}: cannot be read as rows of token ids ({error})") from error
        if array.ndim != 2 or array.dtype.kind not in "iu":
            raise DataError(f"{path}: holds {array.dtype} {list(array.shape)}; expected whole numbers [rows, tokens]")
        return list(array.astype(np.int64))
    if path.suffix != ".parquet":
        return None
    import pyarrow as pa

    from picolm.data.decode import opened

    with opened(path, str(path)) as table:
        schema = table.schema_arrow
        column = column or ("input_ids" if "input_ids" in schema.names else "text")
        if column not in schema.names:
            raise DataError(f"{path}: has no column {column} (it has: {', '.join(schema.names)})")
        kind = schema.field(column).type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            return None
        if not hasattr(kind, "value_type") or not pa.types.is_integer(kind.value_type):
            raise DataError(f"{path}: the column {column} holds {kind}; expected texts, or lists of token ids")
        rows = table.read(columns=[column])[column].to_pylist()
        return [np.array(row, dtype=np.int64) for row in rows]
