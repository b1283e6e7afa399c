"""Write a step: its files into a directory that no reader sees yet, then a rename, so that it is complete or not there."""

import ctypes
import dataclasses
import io
import logging
import math
import os
import re
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from picolm.address import Address
from picolm.errors import StoreError
from picolm.store.checkpoint import SealedCheckpoint
from picolm.store.files import FileRecord, dump_json, link_or_copy, replacement, sync_directory, write_bytes
from picolm.store.folders import move_others, others_in
from picolm.store.manifest import (
    LATEST,
    MANIFEST,
    OPTIMIZER,
    STATE,
    TOKENIZER,
    WEIGHTS,
    Manifest,
    TensorRecord,
    check_name,
    inside,
    place,
    step_directory,
    step_of,
    table_file,
)
from picolm.store.tensors import DTYPES, dtype_name, write_tensors
from picolm.trusted import remove_folder

if TYPE_CHECKING:
    from torch import Tensor


logger = logging.getLogger(__name__)
_REPLACED = ".replaced"
_PARTIAL = ".partial-"
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE


@contextmanager
def temporary_step(checkpoints: Path, step: int) -> Iterator[Path]:
    """Create and yield a directory that readers do not see; at the end it is deleted unless it was published."""
    partial = _temporary_name(checkpoints, step)
    partial.mkdir()
    try:
        yield partial
    finally:
        remove_folder(partial)


def discard(checkpoints: Path, step: int) -> None:
    """Delete a step: readers stop seeing it at once. `sweep` removes what an interrupted deletion leaves.

    Raises StoreError when its folder holds other files: they are not ours to delete.
    """
    target = checkpoints / step_directory(step)
    if others := others_in(target, {*_names_of(target), MANIFEST}):
        raise StoreError(f"{target}: {others[0]} is no part of the step; move it away first")
    temporary = _temporary_name(checkpoints, step)
    os.rename(checkpoints / step_directory(step), temporary)
    sync_directory(checkpoints)
    remove_folder(temporary)


def _temporary_name(checkpoints: Path, step: int) -> Path:
    return checkpoints / f".{step_directory(step)}{_PARTIAL}{uuid.uuid4().hex[:8]}"


def write_thinned(partial: Path, checkpoint: SealedCheckpoint, drop: Collection[str]) -> Manifest:
    """Write the step again without the files of some kinds, and return its manifest.

    Other files are linked, not copied; their digests stay as they are. Dropping the weights also drops the files that
    only they need: tokenizer, configuration and modelling code.
    """
    kinds, old = checkpoint.files_by_kind(), checkpoint.manifest
    dropped = {name for kind in drop for name in kinds.get(kind, [])}
    if "weights" in drop:
        dropped |= {name for kind in ("tokenizer", "other") for name in kinds.get(kind, [])} - {STATE, MANIFEST}
    files = {name: record for name, record in old.files.items() if name not in dropped}
    tensors = {address: record for address, record in old.tensors.items() if record.file in files}
    make_directories(partial, files)
    for name in files:
        link_or_copy(inside(checkpoint.path, name), partial / name)
    thinned = [*old.about.get("thinned", []), {"was": old.digest, "without": sorted(dropped)}]
    manifest = dataclasses.replace(old, files=files, tensors=tensors, about={**old.about, "thinned": thinned})
    write_manifest(partial, manifest)
    return manifest


def write_renewed(
    partial: Path, checkpoint: SealedCheckpoint, texts: Mapping[str, bytes], gone: Collection[str]
) -> Manifest:
    """Write the step again with new `texts` and without the files in `gone`; link all others. Return its manifest.

    The manifest records under `renewed` its old digest, the files that changed, and what had been thinned before. From
    now on the step counts as a different one (`selection.origin`).
    """
    old = checkpoint.manifest
    kept = {name: record for name, record in old.files.items() if name not in texts and name not in gone}
    make_directories(partial, {*kept, *texts})
    for name in kept:
        link_or_copy(inside(checkpoint.path, name), partial / name)
    files = kept | {name: write_bytes(partial / name, data) for name, data in texts.items()}
    entry = {"was": old.digest, "files": sorted({*texts, *gone}), "without": sorted(checkpoint.dropped)}
    about = {key: value for key, value in old.about.items() if key != "thinned"}
    about["renewed"] = [*old.about.get("renewed", []), entry]
    manifest = dataclasses.replace(old, files=dict(sorted(files.items())), about=about)
    write_manifest(partial, manifest)
    return manifest


def publish(partial: Path, target: Path, manifest: Manifest, replace: bool) -> None:
    """Rename `partial` to `target`. An existing step is kept when it is complete and the same, replaced when damaged.

    Raises StoreError when it is complete and different, and `replace` is false.
    """
    if not os.path.lexists(target):
        os.rename(partial, target)
        sync_directory(target.parent)
        return
    existing = _whole(target)
    if existing is not None:
        changes = set(existing.files.items()) ^ set(manifest.files.items())
        if not changes:
            return
        if not replace:
            names = ", ".join(sorted({name for name, _ in changes}))
            raise StoreError(f"{target} exists, with other content in {names}; it is replaced only with replace=True")
    exchange(partial, target, {*manifest.files, *_names_of(target)})


def exchange(partial: Path, target: Path, known: Collection[str]) -> None:
    """Replace `target` by `partial`: atomically where the system can, so that readers find the step at any moment.

    known: names of the files of the step, before and after; other files in `target` are kept. Where the system cannot,
    it takes two renames; after a crash between them `sweep` restores the old step.
    """
    if _swap(partial, target):
        move_others(partial, target, {*known, MANIFEST})
        sync_directory(target.parent)
        return
    old = target.with_name(f".{target.name}{_REPLACED}")
    os.rename(target, old)
    try:
        os.rename(partial, target)
    except OSError:
        os.rename(old, target)
        raise
    move_others(old, target, {*known, MANIFEST})
    sync_directory(target.parent)
    remove_folder(old)


def _swap(one: Path, other: Path) -> bool:
    """Exchange two names in one operation (Linux: renameat2). Return False when the system or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except AttributeError:
        return False
    return renameat2(_HERE, os.fsencode(one.absolute()), _HERE, os.fsencode(other.absolute()), _EXCHANGE) == 0


def sweep(checkpoints: Path) -> None:
    """Remove what a crashed writer left.

    Call it only with the lock held: then no other process can be writing a temporary directory here.
    """
    for leftover in filter(_is_leftover, checkpoints.glob(".step_*")):
        target = leftover.with_name(leftover.name[1:].removesuffix(_REPLACED))
        if leftover.name.endswith(_REPLACED) and not target.exists():
            os.rename(leftover, target)
        else:
            logger.info("%s was left by a writer that did not finish; removed", leftover)
            remove_folder(leftover)
    for link in checkpoints.glob(f".{LATEST}{_PARTIAL}*"):  # as `point_latest` names them
        if link.is_symlink():
            link.unlink(missing_ok=True)


def _is_leftover(path: Path) -> bool:
    """Return whether it is a directory with a name that a writer of a run uses for temporary directories."""
    number = re.sub(rf"({re.escape(_PARTIAL)}[0-9a-f]{{8}}|{re.escape(_REPLACED)})$", "", path.name[1:])
    return number != path.name[1:] and step_of(number) is not None and path.is_dir() and not path.is_symlink()


def _names_of(target: Path) -> Collection[str]:
    """Return the names of the files of a step, which may be damaged."""
    try:
        return SealedCheckpoint(target).files
    except StoreError:
        usual = {WEIGHTS, OPTIMIZER, STATE, *TOKENIZER}
        return {name for name in others_in(target, ()) if name in usual or name.endswith((".safetensors", ".parquet"))}


def point_latest(checkpoints: Path, step: int) -> None:
    """Make the link `latest` name the step, atomically. A failure is logged as a warning."""
    link = checkpoints / LATEST
    try:
        if os.path.lexists(link) and not link.is_symlink():
            raise FileExistsError(f"{link} is there, and is no link")
        with replacement(link) as temporary:
            temporary.symlink_to(step_directory(step), target_is_directory=True)
    except OSError as error:
        logger.warning("%s: the link cannot be made (%s); the step itself is stored", checkpoints / LATEST, error)


def _whole(target: Path) -> SealedCheckpoint | None:
    """Return the step at `target`; None when it is damaged and may be replaced."""
    if target.is_symlink() or not target.is_dir():
        raise StoreError(f"{target}: not a directory of this run; move it out of the way")
    try:
        existing = SealedCheckpoint(target)
        problems = existing.verify()
    except StoreError as error:
        problems = [str(error)]
    if problems:
        logger.warning("a damaged step makes way for a whole one: %s", "; ".join(problems))
        return None
    return existing


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
