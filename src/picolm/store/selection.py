"""Select parts of a step, and merge them again: manifests tell which files belong to one state.

A thinned manifest names the one it was made from. So parts of one step that were uploaded, downloaded or kept at
different times can be recognised, and together they are the step again, with its original digest.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

from picolm.errors import StoreError
from picolm.store.checkpoint import SealedCheckpoint
from picolm.store.manifest import STATE, Manifest, natural
from picolm.store.writer import part_of

PARTS = ("weights", "optimizer", "dynamics")


def check_parts(only: Collection[str]) -> None:
    """Raise StoreError for a word that is not a part of a step."""
    for part in only:
        if part not in PARTS:
            raise StoreError(f"--only {part}: no part of a step; there are {', '.join(PARTS)}")


def origin(manifest: Manifest) -> str:
    """The digest of the manifest that the step was written with."""
    thinned = manifest.about.get("thinned")
    return thinned[0]["was"] if thinned else manifest.digest


def chosen(checkpoint: SealedCheckpoint, only: Collection[str]) -> Manifest:
    """Return the manifest of the step with only the parts in `only`; the whole manifest when `only` is empty.

    `trainer_state.json` always stays. The weights include tokenizer, configuration and modelling code, as when a step
    is thinned.
    """
    if not only:
        return checkpoint.manifest
    kept = {*only, *([""] if "weights" in only else [])}
    names = {name for kind, names in checkpoint.files_by_kind().items() if part_of(kind) in kept for name in names}
    return _of_files(checkpoint.manifest, checkpoint.manifest, (names | {STATE}) & checkpoint.files.keys())


def united(one: Manifest, other: Manifest) -> Manifest:
    """Return the manifest with the files of both. Raises StoreError when they are not parts of the same step."""
    if origin(one) != origin(other):
        raise StoreError(
            f"step {one.step}: two different states have this number ({origin(one)[:8]}, {origin(other)[:8]})"
        )
    return _of_files(one, other, one.files.keys() | other.files.keys())


def _of_files(one: Manifest, other: Manifest, names: Collection[str]) -> Manifest:
    files, tensors = {**one.files, **other.files}, {**one.tensors, **other.tensors}
    missing = (files.keys() | _dropped(one) | _dropped(other)) - set(names)
    about: dict[str, Any] = {key: value for key, value in one.about.items() if key != "thinned"}
    if missing:
        about["thinned"] = [{"was": origin(one), "without": sorted(missing)}]
    return dataclasses.replace(
        one,
        files={name: files[name] for name in sorted(names)},
        tensors={a: tensors[a] for a in sorted(tensors, key=lambda a: natural(str(a))) if tensors[a].file in names},
        about=about,
    )


def _dropped(manifest: Manifest) -> set[str]:
    return {name for entry in manifest.about.get("thinned", []) for name in entry["without"]}
