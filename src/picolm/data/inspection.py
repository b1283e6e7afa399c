"""Inspect prepared rows: summarize their content, and check that they agree with their manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from picolm.data.decode import read_footer, read_groups
from picolm.data.manifest import Manifest, Shard, damaged_files, file_of, read_manifest
from picolm.data.parquet import open_parquet
from picolm.data.tokenizer import load_tokenizer
from picolm.errors import DataError, FileError, FileMissing
from picolm.seeds import derive


class Token(NamedTuple):
    """A token with its text and its number of occurrences."""

    id: int
    text: str
    times: int


class Sample(NamedTuple):
    """A row as text. number: the row number in its split."""

    split: str
    number: int
    source: str | None
    text: str


@dataclass(frozen=True)
class Inspection:
    """A summary of prepared rows.

    frequent: the most frequent tokens of all splits. unused_ids: how many token ids never occur. repeated: how many
    held-out rows are exactly equal to a training row; repeated_rows: the numbers of the first of them.
    """

    manifest: Manifest
    frequent: list[Token]
    unused_ids: int
    repeated: int
    repeated_rows: list[int]
    samples: list[Sample]


def inspect(folder: str | Path, *, tokens: int = 20, rows: int = 3, seed: int = 0) -> Inspection:
    """Read all rows of a prepared folder, and return token counts, repeated rows and `rows` random samples per split.

    Memory: about 150 bytes per held-out row and 8 per entry of the vocabulary. Raises DataError if the folder has no
    manifest or a token id is outside the vocabulary.
    """
    folder = Path(folder)
    manifest = prepared_manifest(folder)
    tokenizer = load_tokenizer(folder / manifest.tokenizer["file"])
    counts_V = np.zeros(manifest.tokenizer["vocab_size"], dtype=np.int64)
    held_out = [digest for tokens_RT in _groups(folder, manifest, "val") for digest in _digests(tokens_RT)]
    wanted, seen = frozenset(held_out), set[bytes]()
    for split in manifest.splits:
        for tokens_RT in _groups(folder, manifest, split):
            found_V = np.bincount(tokens_RT.reshape(-1), minlength=len(counts_V))
            if len(found_V) > len(counts_V):
                raise DataError(
                    f"{folder}: token {len(found_V) - 1} is beyond the vocabulary of {len(counts_V)}; see verify"
                )
            counts_V += found_V
            if split == "train" and wanted:
                seen |= wanted.intersection(_digests(tokens_RT))
    frequent = [
        Token(number, tokenizer.decode([number], skip_special_tokens=False), int(counts_V[number]))
        for number in np.argsort(-counts_V, kind="stable")[:tokens].tolist()
        if counts_V[number]
    ]
    repeated = [number for number, digest in enumerate(held_out) if digest in seen]
    samples = list(_samples(folder, manifest, rows, seed))
    return Inspection(manifest, frequent, int((counts_V == 0).sum()), len(repeated), repeated[:10], samples)


def verify(folder: str | Path) -> list[str]:
    """Compare a prepared folder with its manifest, and return a message for each difference.

    This checks the digests of files and rows, the row counts, the range of token ids, and the tokenizer.
    """
    folder = Path(folder)
    manifest = prepared_manifest(folder)
    problems = damaged_files(folder, manifest, [])
    for split, shards in manifest.splits.items():
        for number, shard in enumerate(shards):
            problems += [f"{folder / shard.file}: {problem}" for problem in _shard_problems(folder, manifest, shard)]
            if not shard.file.startswith(f"{split}-{number:05d}-of-{len(shards):05d}."):
                problems.append(f"{folder / shard.file}: is no name for shard {number} of {len(shards)} of {split}")
        by_source = sum(counts.get(f"{split}_rows", 0) for counts in manifest.sources.values())
        if manifest.sources and by_source != manifest.rows(split):
            problems.append(f"{folder}: {by_source} rows of {split} by source, {manifest.rows(split)} in the shards")
    named = {shard.file for shards in manifest.splits.values() for shard in shards}
    others = sorted(path for path in folder.glob("*.parquet") if path.name not in named)
    problems += [f"{path}: is not in the manifest" for path in others]
    tokens = sum(manifest.rows(split) for split in manifest.splits) * manifest.row_length
    if manifest.tokens != tokens:
        problems.append(f"{folder}: the manifest says {manifest.tokens} tokens, its rows are {tokens}")
    return problems


def prepared_manifest(folder: Path) -> Manifest:
    """Return the manifest of a folder of prepared rows. Raises DataError if it has none."""
    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is None:
        raise DataError(f"{folder}: is no folder of prepared rows (no manifest.json); `pico data prepare` makes one")
    return manifest


def _shard_problems(folder: Path, manifest: Manifest, shard: Shard) -> Iterator[str]:
    try:
        path = file_of(folder, shard.file)
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                size = path.stat().st_size
                yield f"its sha-256 is not that of the manifest ({size} bytes, {shard.bytes} in the manifest)"
        yield from _content_problems(path, manifest, shard)
    except FileMissing:
        yield "is missing"
    except (FileError, DataError) as error:
        yield str(error).removeprefix(f"{folder / shard.file}: ")


def _content_problems(path: Path, manifest: Manifest, shard: Shard) -> Iterator[str]:
    footer, content, lengths, low, high = read_footer(path, str(path)), hashlib.sha256(), {manifest.row_length}, 0, -1
    for tokens_RT, labels in read_groups(path, str(path), footer.has_labels):
        if not len(tokens_RT):
            continue
        lengths.add(tokens_RT.shape[1])
        low, high = min(low, int(tokens_RT.min())), max(high, int(tokens_RT.max()))
        content.update(tokens_RT.astype("<i4").tobytes())
        if labels is not None:
            content.update("\n".join(labels).encode())
    for length in lengths - {manifest.row_length}:
        yield f"has rows of {length} tokens, {manifest.row_length} in the manifest"
    if footer.rows != shard.rows:
        yield f"has {footer.rows} rows, {shard.rows} in the manifest"
    if content.hexdigest() != shard.content:
        yield "its rows are not those of the manifest (digest of tokens and sources)"
    if low < 0 or high >= manifest.tokenizer["vocab_size"]:
        yield f"has token ids from {low} to {high}; the vocabulary has {manifest.tokenizer['vocab_size']} entries"
    if high != shard.max_token:
        yield f"its largest token id is {high}, {shard.max_token} in the manifest"


def _groups(folder: Path, manifest: Manifest, split: str) -> Iterator[np.ndarray]:
    """Yield the tokens of a split, int32 [R, T], row group by row group."""
    for shard in manifest.splits.get(split, []):
        path = folder / shard.file
        yield from (tokens_RT for tokens_RT, _ in read_groups(path, str(path)))


def _digests(tokens_RT: np.ndarray) -> list[bytes]:
    return [hashlib.blake2b(row_T.tobytes(), digest_size=16).digest() for row_T in tokens_RT]


def _samples(folder: Path, manifest: Manifest, rows: int, seed: int) -> Iterator[Sample]:
    tokenizer = load_tokenizer(folder / manifest.tokenizer["file"])
    for split in manifest.splits:
        source = open_parquet(str(folder), split=split)
        numbers = {derive(seed, f"sample {split}", draw) % len(source) for draw in range(min(rows, len(source)))}
        for number in sorted(numbers):
            place = np.array([number])
            labels = source.labels(place)
            text = tokenizer.decode(source.rows(place)[0].tolist(), skip_special_tokens=False)
            yield Sample(split, number, labels[0] if labels else None, text)
