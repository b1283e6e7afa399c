"""What rows follow from: the identity of a prepared folder, and of the work that makes it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from picolm.data.documents import TextFile, digest_files
from picolm.data.filters import identity
from picolm.data.manifest import Manifest, damaged_files, read_manifest
from picolm.data.tokenizer import Vocabulary, check_size
from picolm.errors import DataError

_NEWER = ("filters", "deduplicate", "val_given", "val_last")


@dataclass(frozen=True)
class Recipe:
    """All that the rows follow from. inputs: digest of the files; tokenizer: sha-256 of its file, or `trained`.

    Held out are the share `val_fraction` of the documents, or given files (val_given), or the last share of each document.
    """

    inputs: str
    tokenizer: str
    vocab_size: int | None
    seq_len: int
    seed: int
    val_fraction: float
    version: int = 1
    filters: tuple[str, ...] = ()
    deduplicate: bool = False
    val_given: bool = False
    val_last: float = 0.0

    @property
    def is_fixed(self) -> bool:
        """Whether what is held out does not depend on the seed."""
        return self.val_given or self.val_last > 0

    def identity(self) -> dict[str, Any]:
        """Its fields; those that are newer than the first prepared folders only where they say something."""
        said = {name: value for name, value in asdict(self).items() if name not in _NEWER or value}
        return said | ({"filters": list(self.filters)} if self.filters else {})


def recipe_for(
    files: Sequence[TextFile],
    vocabulary: Vocabulary | None,
    *,
    vocab_size: int,
    seq_len: int,
    seed: int,
    val_fraction: float,
    filters: Sequence[str] = (),
    deduplicate: bool = False,
    val_last: float = 0.0,
    inputs: str | None = None,
) -> Recipe:
    """The recipe of these files and options. inputs None: reads all files for their digests.

    Raises DataError for senseless options.
    """
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
        tokenizer, size = "trained", vocab_size
    else:
        assert vocabulary.file is not None
        tokenizer, size = hashlib.sha256(vocabulary.file.read_bytes()).hexdigest(), None
    named = tuple(identity(text) for text in filters)
    inputs = digest_files(files) if inputs is None else inputs
    return Recipe(
        inputs, tokenizer, size, seq_len, seed, val_fraction, filters=named, deduplicate=deduplicate, val_given=given,
        val_last=val_last,
    )  # fmt: skip


def already_there(out: Path, recipe: dict[str, Any]) -> Manifest | None:
    """The manifest of `out` if it was made by this recipe; None if nothing is there. Raises DataError for anything else."""
    if is_free(out):
        return None
    manifest = read_manifest(out) if out.is_dir() else None
    if manifest is None:
        raise DataError(f"{out}: is there already and holds something else; choose another folder or delete it")
    if differences := _differences(manifest.recipe, recipe):
        raise DataError(f"{out}: holds rows made in another way ({differences}); choose another folder or delete it")
    if problems := damaged_files(out, manifest, (shard for shards in manifest.splits.values() for shard in shards)):
        raise DataError("\n".join([*problems, f"{out}: is not whole; delete it and prepare it again"]))
    return manifest


def is_free(out: Path) -> bool:
    """Whether there is nothing, or an empty folder."""
    return not out.exists() or (out.is_dir() and not any(out.iterdir()))


def _differences(there: dict[str, Any], asked: dict[str, Any]) -> str:
    return ", ".join(
        "other text" if key == "inputs" else f"{key} {there.get(key)} there, {asked.get(key)} asked for"
        for key in {**asked, **there}
        if there.get(key) != asked.get(key)
    )
