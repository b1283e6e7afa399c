"""Write a mixture of prepared folders (see `mix.py`) as a new prepared folder, in which each row keeps its source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from picolm.data.inspection import prepared_manifest
from picolm.data.manifest import FILE, Manifest, Shard, damaged_files
from picolm.data.mix import Mixture, mixed
from picolm.data.parquet import rows_fingerprint
from picolm.data.recipe import VERSION, alone, already_there, is_free
from picolm.data.shards import ROWS_PER_SHARD, SPLITS, Row, shard_name, write_shard
from picolm.data.tokenizer import load_vocabulary, write_tokenizer
from picolm.errors import DataError

Progress = Callable[[str, int, int | None], None]
_ROWS_AT_ONCE = 1024


def merge(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    rows: int | None = None,
    seed: int = 42,
    progress: Progress = lambda what, done, total: None,
    rows_per_shard: int = ROWS_PER_SHARD,
) -> Manifest:
    """Mix prepared folders into the folder `out`, created atomically. Returns its manifest.

    weights: shares of the training rows, with any sum; None takes all rows of all parts. rows: number of training rows,
    at most what the weights allow (default: all of these). All held-out rows are kept. If `out` holds the same mixture
    already, it is kept. Raises DataError for parts with different tokenizers or row lengths, and if `out` holds
    anything else.
    """
    out, manifests = Path(out).expanduser(), [_manifest(Path(folder)) for folder in folders]
    if len(folders) < 2 or len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise DataError(f"{', '.join(map(str, folders))}: two or more different folders can be merged")
    mixtures = {split: _mixture(folders, manifests, split, weights, rows, seed) for split in SPLITS}
    labels = [list(manifest.sources) or [Path(folder).resolve().name] for folder, manifest in zip(folders, manifests)]
    recipe = {
        "merged": [[names, _fingerprints(part)] for names, part in zip(labels, manifests)],
        "taken": mixtures["train"].taken, "tokenizer": manifests[0].tokenizer["sha256"], "seq_len": manifests[0].seq_len,
        "seed": seed, "version": VERSION,
    }  # fmt: skip
    with alone(out):
        if not is_free(out):
            return already_there(out, recipe)
        with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as name:
            manifest = _write(
                Path(name, "rows"), mixtures, labels, manifests, folders, recipe, rows_per_shard, progress
            )
            if out.is_dir():
                out.rmdir()  # an empty one
            Path(name, "rows").rename(out)
    return manifest


def _mixture(
    folders: Sequence[str | Path], manifests: Sequence[Manifest], split: str, weights: Sequence[float] | None,
    rows: int | None, seed: int,
) -> Mixture:  # fmt: skip
    names = [
        f"parquet:{folder}" for folder, manifest in zip(folders, manifests) if manifest.rows(split) or split == "train"
    ]
    if split == "train":
        return mixed(names, weights, rows=rows, seed=seed)
    return mixed(names, seed=seed, split=split)


def _write(
    folder: Path, mixtures: dict[str, Mixture], labels: Sequence[list[str]], manifests: Sequence[Manifest],
    folders: Sequence[str | Path], recipe: dict[str, Any], rows_per_shard: int, progress: Progress,
) -> Manifest:  # fmt: skip
    folder.mkdir()
    numbers = {name: number for number, name in enumerate(dict.fromkeys(chain.from_iterable(labels)))}
    counts, splits = Counter[tuple[str, str]](), dict[str, list[Shard]]()
    for split, mixture in mixtures.items():
        if not len(mixture):
            continue
        starts = range(0, len(mixture), rows_per_shard)
        splits[split] = []
        for number, start in enumerate(starts):
            rows = _rows(mixture, start, min(start + rows_per_shard, len(mixture)), split, numbers, counts)
            splits[split].append(write_shard(rows, folder / shard_name(split, number, len(starts)), list(numbers)))
            progress(f"writing {split}", min(start + rows_per_shard, len(mixture)), len(mixture))
    documents = Counter[str]()
    for names, manifest in zip(labels, manifests):
        for name in names:
            documents[name] += manifest.sources[name]["documents"] if manifest.sources else manifest.documents
    manifest = Manifest(
        row_length=manifests[0].row_length,
        recipe=recipe,
        tokenizer=manifests[0].tokenizer | write_tokenizer(load_vocabulary(folders[0]), folder, manifests[0].seq_len),
        splits=splits,
        sources={
            name: {"documents": documents[name]} | {f"{split}_rows": counts[split, name] for split in SPLITS}
            for name in numbers
        },
        documents=sum(part.documents for part in manifests),
        tokens=manifests[0].row_length * sum(shard.rows for shards in splits.values() for shard in shards),
    )
    (folder / FILE).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _rows(
    mixture: Mixture, start: int, end: int, split: str, numbers: dict[str, int], counts: Counter[tuple[str, str]]
) -> Iterator[Row]:
    """Yield the rows start … end - 1 of a mixture, and count them by source in `counts`."""
    for first in range(start, end, _ROWS_AT_ONCE):
        places = np.arange(first, min(first + _ROWS_AT_ONCE, end))
        for place, label, tokens_T in zip(places.tolist(), mixture.labels(places), mixture.rows(places)):
            if label not in numbers:
                raise DataError(
                    f"{mixture.locate(place)}: has the source {label!r}, which its manifest does not list; see `pico data verify`"
                )
            counts[split, label] += 1
            yield numbers[label], tokens_T


def _fingerprints(manifest: Manifest) -> dict[str, str]:
    return {split: rows_fingerprint(manifest, split) for split in manifest.splits}


def _manifest(folder: Path) -> Manifest:
    manifest = prepared_manifest(folder)
    if problems := damaged_files(folder, manifest, chain.from_iterable(manifest.splits.values())):
        raise DataError("\n".join([*problems, f"see `pico data verify {folder}`"]))
    return manifest
