"""Write the files of a step into a directory that no reader sees yet."""

import io
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from picolm.address import Address
from picolm.errors import StoreError
from picolm.store.files import FileRecord, dump_json, sync_directory, write_bytes
from picolm.store.layout import MANIFEST, STATE, check_name, place, table_file
from picolm.store.manifest import Manifest, TensorRecord
from picolm.store.tensors import DTYPES, dtype_name, write_tensors

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Content:
    """The arguments of `Run.commit`, see there."""

    step: int
    tensors: Mapping[Address, "Tensor"]
    meta: Mapping[str, Any]
    texts: Mapping[str, str | bytes] = field(default_factory=dict)
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    weight_prefix: str = ""
    parameters: Collection[str] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Bytes of its tensors and texts, known before anything is written; for the message about a full disk."""
        return sum(map(_tensor_bytes, self.tensors.values())) + sum(map(len, self.texts.values()))


def write_step(directory: Path, content: Content, dynamics: str, parent: Mapping[str, Any] | None) -> Manifest:
    """Write every file and then the manifest, and return the manifest. All of it is on disk when this returns.

    Raises StoreError for content that cannot be stored, OSError when the disk fails.
    """
    members, others = _by_file(content, dynamics), _other_files(content, dynamics)
    taken = {MANIFEST, *members} & set(others)
    if taken:
        raise StoreError(f"step {content.step}: the file name {min(taken)!r} is taken; call that text something else")
    make_directories(directory, {*members, *others})
    records, tensors = _write_tensor_files(directory, content, members)
    records |= {name: write_bytes(directory / name, data) for name, data in others.items()}
    created = datetime.now(UTC).isoformat(timespec="seconds")
    about = {str(key): value for key, value in content.about.items()}
    manifest = Manifest(content.step, created, parent, records, tensors, about)
    write_manifest(directory, manifest)
    return manifest


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest, the last file of a step, and flush the names of all its files to disk.

    Raises StoreError when the size of a file has changed since it was written.
    """
    for name, record in manifest.files.items():
        if (directory / name).stat().st_size != record.bytes:  # another process wrote to this directory
            raise StoreError(f"{directory / name}: changed while the step was being written")
    write_bytes(directory / MANIFEST, manifest.to_bytes())
    for path in {directory, *((directory / name).parent for name in manifest.files)}:
        sync_directory(path)


def make_directories(directory: Path, names: Collection[str]) -> None:
    """Create the parent directories of `names`, never `directory` itself.

    If `directory` was deleted meanwhile, writing must fail.
    """
    for parent in sorted({parent for name in names for parent in PurePosixPath(name).parents[:-1]}):
        (directory / parent).mkdir(exist_ok=True)


def _write_tensor_files(
    directory: Path, content: Content, files: Mapping[str, Mapping[str, Address]]
) -> tuple[dict[str, FileRecord], dict[Address, TensorRecord]]:
    records, tensors = {}, {}
    for file, members in files.items():
        records[file], digests = write_tensors(
            directory / file, {key: content.tensors[address] for key, address in members.items()}
        )
        for key, address in members.items():
            tensor = content.tensors[address]
            tensors[address] = TensorRecord(file, key, tuple(tensor.shape), dtype_name(tensor), digests[key])
    return records, tensors


def _by_file(content: Content, dynamics: str) -> dict[str, dict[str, Address]]:
    """Return the address for each key of each file. Raises StoreError for two addresses with the same key."""
    files: dict[str, dict[str, Address]] = {}
    for address, tensor in content.tensors.items():
        if dtype_name(tensor) not in DTYPES:
            raise StoreError(f"{Address(*address)}: tensors of type {dtype_name(tensor)} cannot be stored")
        file, key = place(Address(*address), content.weight_prefix, content.parameters, dynamics)
        other = files.setdefault(file, {}).setdefault(key, Address(*address))
        if other != address:
            raise StoreError(f"{Address(*address)} and {other} would both be {key!r} in {file}")
    return files


def _other_files(content: Content, dynamics: str) -> dict[str, bytes]:
    files = {STATE: dump_json(content.meta, indent=1).encode() + b"\n"}
    for split, columns in content.tables.items():
        files[table_file(split, dynamics)] = _parquet(columns)
    for name, text in content.texts.items():
        check_name(name, f"step {content.step}")
        if name in files:
            raise StoreError(f"step {content.step}: the file name {name!r} is taken; call that text something else")
        files[name] = text.encode() if isinstance(text, str) else text
    return files


def _parquet(columns: Mapping[str, Any]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({name: _column(values) for name, values in columns.items()})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", compression_level=9)
    return buffer.getvalue()


def _column(values: Any) -> Any:
    """Return an arrow array of a list, a one-dimensional array, or the rows of a two-dimensional one (tokens_RT)."""
    import numpy as np
    import pyarrow as pa

    if not hasattr(values, "ndim"):
        return pa.array(values)
    array = np.asarray(values.cpu() if hasattr(values, "cpu") else values)
    if array.ndim == 1:
        return pa.array(array)
    rows, width = array.shape
    return pa.ListArray.from_arrays(np.arange(rows + 1, dtype=np.int32) * np.int32(width), pa.array(array.reshape(-1)))


def _tensor_bytes(tensor: "Tensor") -> int:
    return math.prod(tensor.shape) * tensor.element_size()
