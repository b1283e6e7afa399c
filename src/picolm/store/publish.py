"""Turn a temporary directory into a step by renaming it, so that the step is complete or not there at all."""

import ctypes
import dataclasses
import logging
import os
import re
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from picolm.errors import StoreError
from picolm.store.compose import make_directories, write_manifest
from picolm.store.files import link_or_copy, sync_directory, write_bytes, written_aside
from picolm.store.folders import move_others, others_in
from picolm.store.layout import LATEST, MANIFEST, OPTIMIZER, STATE, TOKENIZER, WEIGHTS, inside, step_directory, step_of
from picolm.store.manifest import Manifest
from picolm.store.sealed import SealedCheckpoint

logger = logging.getLogger(__name__)
_REPLACED = ".replaced"
_PARTIAL = ".partial-"
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE


@contextmanager
def set_aside(checkpoints: Path, step: int) -> Iterator[Path]:
    """Create and yield a directory that readers do not see; at the end it is deleted unless it was published."""
    partial = _name_aside(checkpoints, step)
    partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def discard(checkpoints: Path, step: int) -> None:
    """Delete a step: readers stop seeing it at once. `sweep` removes what an interrupted deletion leaves.

    Raises StoreError when its folder holds other files: they are not ours to delete.
    """
    target = checkpoints / step_directory(step)
    if others := others_in(target, {*_names_of(target), MANIFEST}):
        raise StoreError(f"{target}: {others[0]} is no part of the step; move it away first")
    aside = _name_aside(checkpoints, step)
    os.rename(checkpoints / step_directory(step), aside)
    sync_directory(checkpoints)
    shutil.rmtree(aside, ignore_errors=True)


def _name_aside(checkpoints: Path, step: int) -> Path:
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
    shutil.rmtree(old, ignore_errors=True)


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
            shutil.rmtree(leftover, ignore_errors=True)
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
        with written_aside(link) as aside:
            aside.symlink_to(step_directory(step), target_is_directory=True)
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
