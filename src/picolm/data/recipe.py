"""The recipe of prepared rows: all that determines them, and so the identity of a prepared folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from picolm import trusted
from picolm.data.documents import TextFile, is_remote
from picolm.data.filters import identity
from picolm.data.manifest import Manifest, damaged_files, read_manifest
from picolm.data.tokenizer import Vocabulary, check_size
from picolm.errors import DataError

VERSION = 2  # version of the row order; version 1 shuffled documents and rows, both by sorting


def recipe_of(
    files: Sequence[TextFile],
    vocabulary: Vocabulary | None,
    *,
    vocab_size: int,
    seq_len: int,
    seed: int,
    val_fraction: float,
    val_last: float,
    filters: Sequence[str],
    deduplicate: bool,
) -> dict[str, Any]:
    """Return the recipe of the rows, with an empty digest of the inputs. Raises DataError for invalid options."""
    if seq_len < 1:
        raise DataError(f"seq_len is {seq_len}; a row needs at least one input token")
    for name, share, whole in (
        ("val_fraction", val_fraction, "the documents"),
        ("val_last", val_last, "each document"),
    ):
        if not 0 <= share < 1:
            raise DataError(f"{name} is {share}; it is a share of {whole}, from 0 up to, but not including, 1")
    given = any(file.held_out for file in files)
    if (val_fraction > 0) + (val_last > 0) + given > 1:
        raise DataError("what is held out is said in two ways; choose one of val, val_fraction and val_last")
    if vocabulary is None:
        check_size(vocab_size)
        tokenizer = "trained"
    else:
        assert vocabulary.file is not None
        tokenizer = hashlib.sha256(trusted.read_bytes(vocabulary.file.resolve())).hexdigest()
    optional = {
        "filters": [identity(text) for text in filters], "deduplicate": deduplicate, "val_given": given, "val_last": val_last,
    }  # fmt: skip
    return {
        "inputs": "", "tokenizer": tokenizer, "vocab_size": vocab_size if vocabulary is None else None, "seq_len": seq_len,
        "seed": seed, "val_fraction": val_fraction, "version": VERSION,
    } | {name: value for name, value in optional.items() if value}  # fmt: skip


def is_free(out: Path) -> bool:
    """Return whether `out` does not exist or is an empty folder."""
    return not out.exists() or (out.is_dir() and not any(out.iterdir()))


def already_there(out: Path, recipe: dict[str, Any]) -> Manifest:
    """Return the manifest of `out` if it has this recipe, in any version. Raises DataError if it holds other data."""
    manifest = read_manifest(out) if out.is_dir() else None
    if manifest is None:
        raise DataError(f"{out}: is there already and holds something else; choose another folder or delete it")
    if differences := _differences(manifest.recipe, recipe):
        raise DataError(f"{out}: holds rows made in another way ({differences}); choose another folder or delete it")
    if problems := damaged_files(out, manifest, (shard for shards in manifest.splits.values() for shard in shards)):
        raise DataError("\n".join([*problems, f"{out}: is not whole; delete it and prepare it again"]))
    return manifest


def check_apart(out: Path, paths: Iterable[str | Path]) -> None:
    """Raise DataError if `out` is inside a folder of `paths` or the reverse: next time, `out` would be read as text."""
    for path in paths:
        place = Path(path).expanduser()
        if is_remote(path) or not place.exists():
            continue
        if place.is_dir() and out.resolve().is_relative_to(place.resolve()):
            raise DataError(f"{out}: lies inside of {path}, which is read; choose a folder outside of it")
        if place.resolve().is_relative_to(out.resolve()):
            raise DataError(f"{path}: lies inside of {out}, which is to be made; choose another folder for the result")


def _differences(there: dict[str, Any], asked: dict[str, Any]) -> str:
    return ", ".join(
        "other text" if key == "inputs" else f"{key} {there.get(key)} there, {asked.get(key)} asked for"
        for key in {**asked, **there}
        if there.get(key) != asked.get(key) and key != "version"
    )
