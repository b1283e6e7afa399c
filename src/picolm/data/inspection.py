"""Looking into prepared rows: what they hold, and whether they are what their manifest says."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from picolm.data.decode import read_footer, read_labels, read_tokens
from picolm.data.manifest import Manifest, Shard, damaged_files, file_of, read_manifest
from picolm.data.parquet import open_parquet
from picolm.data.tokenizer import load_tokenizer
from picolm.errors import DataError, FileError, FileMissing
from picolm.seeds import derive

_DIGEST = np.dtype([("first", "<u8"), ("second", "<u8")])


class Token(NamedTuple):
    """A token with its text, and how often it occurs."""

    id: int
    text: str
    times: int


class Sample(NamedTuple):
    """A row as text. number: within its split."""

    split: str
    number: int
    source: str | None
    text: str


@dataclass(frozen=True)
class Inspection:
    """What prepared rows hold.

    frequent: the most frequent tokens of all splits. repeated: held-out rows that are training rows too, exactly;
    repeated_rows: the numbers of the first of them.
    """

    manifest: Manifest
    frequent: list[Token]
    unused_ids: int
    repeated: int
    repeated_rows: list[int]
    samples: list[Sample]


def inspect(folder: str | Path, *, tokens: int = 20, rows: int = 3, seed: int = 0) -> Inspection:
    """Count and compare all rows of a prepared folder, and show random ones (by the seed) of each split as text.

    Memory: 16 bytes for each held-out row and 8 for each entry of the vocabulary. Raises DataError.
    """
    folder = Path(folder)
    manifest = prepared_manifest(folder)
    tokenizer = load_tokenizer(folder / manifest.tokenizer["file"])
    counts_V = np.zeros(manifest.tokenizer["vocab_size"], dtype=np.int64)
    held_out = np.sort(_digests(folder, manifest, "val"), order="first")
    seen = np.zeros(len(held_out), dtype=bool)
    for split in manifest.splits:
        for tokens_RT in _groups(folder, manifest, split):
            found_V = np.bincount(tokens_RT.reshape(-1), minlength=len(counts_V))
            if len(found_V) > len(counts_V):
                raise DataError(
                    f"{folder}: token {len(found_V) - 1} is beyond the vocabulary of {len(counts_V)}; see verify"
                )
            counts_V += found_V
            if split == "train" and len(held_out):
                _mark(seen, held_out, _digest_rows(tokens_RT))
    order_V = np.argsort(-counts_V, kind="stable")[:tokens]
    frequent = [
        Token(int(number), tokenizer.decode([int(number)], skip_special_tokens=False), int(counts_V[number]))
        for number in order_V
        if counts_V[number]
    ]
    repeated_rows = _rows_with(folder, manifest, held_out[seen])
    return Inspection(
        manifest, frequent, int((counts_V == 0).sum()), len(repeated_rows), repeated_rows[:10],
        _samples(folder, manifest, rows, seed),
    )  # fmt: skip


def verify(folder: str | Path) -> list[str]:
    """What is wrong with a prepared folder, in sentences; nothing where all is as its manifest says.

    Compared are the digests of files and rows, the numbers of rows, the range of token ids, and the tokenizer.
    """
    folder = Path(folder)
    manifest = prepared_manifest(folder)
    problems = damaged_files(folder, manifest, [])
    for split, shards in manifest.splits.items():
        for number, shard in enumerate(shards):
            problems += [f"{folder / shard.file}: {problem}" for problem in _shard_problems(folder, manifest, shard)]
            if not shard.file.startswith(f"{split}-{number:05d}-of-{len(shards):05d}."):
                problems.append(f"{folder / shard.file}: is no name for shard {number} of {len(shards)} of {split}")
    named = {shard.file for shards in manifest.splits.values() for shard in shards}
    problems += [
        f"{path}: is not in the manifest" for path in sorted(folder.glob("*.parquet")) if path.name not in named
    ]
    rows = sum(manifest.rows(split) for split in manifest.splits)
    if manifest.tokens != rows * manifest.row_length:
        problems.append(
            f"{folder}: the manifest says {manifest.tokens} tokens, its rows are {rows * manifest.row_length}"
        )
    for split in manifest.splits:
        by_source = sum(counts.get(f"{split}_rows", 0) for counts in manifest.sources.values())
        if manifest.sources and by_source != manifest.rows(split):
            problems.append(f"{folder}: {by_source} rows of {split} by source, {manifest.rows(split)} in the shards")
    return problems


def prepared_manifest(folder: Path) -> Manifest:
    """The manifest of a folder of prepared rows. Raises DataError where it has none."""
    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is None:
        raise DataError(f"{folder}: is no folder of prepared rows (no manifest.json); `pico data prepare` makes one")
    return manifest


def _shard_problems(folder: Path, manifest: Manifest, shard: Shard) -> Iterator[str]:
    try:
        path = file_of(folder, shard.file)
    except FileMissing:
        yield "is missing"
        return
    except FileError as error:
        yield str(error).removeprefix(f"{folder / shard.file}: ")
        return
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            yield f"its sha-256 is not that of the manifest ({path.stat().st_size} bytes, {shard.bytes} in the manifest)"
    try:
        yield from _content_problems(path, manifest, shard)
    except DataError as error:
        yield str(error).removeprefix(f"{path}: ")


def _content_problems(path: Path, manifest: Manifest, shard: Shard) -> Iterator[str]:
    footer, content = read_footer(path, str(path)), hashlib.sha256()
    low, high, length = 0, -1, manifest.row_length
    for group in range(len(footer.ends_G)):
        tokens_RT = read_tokens(path, str(path), group)
        length = tokens_RT.shape[1] if tokens_RT.shape[1] != manifest.row_length else length
        low, high = min(low, int(tokens_RT.min())), max(high, int(tokens_RT.max()))
        content.update(tokens_RT.astype("<i4").tobytes())
        if footer.has_labels:
            content.update("\n".join(read_labels(path, str(path), group)).encode())
    if footer.rows != shard.rows:
        yield f"has {footer.rows} rows, {shard.rows} in the manifest"
    if length != manifest.row_length:
        yield f"has rows of {length} tokens, {manifest.row_length} in the manifest"
    if content.hexdigest() != shard.content:
        yield "its rows are not those of the manifest (digest of tokens and sources)"
    if low < 0 or high >= manifest.tokenizer["vocab_size"]:
        yield f"has token ids from {low} to {high}; the vocabulary has {manifest.tokenizer['vocab_size']} entries"
    if high != shard.max_token:
        yield f"its largest token id is {high}, {shard.max_token} in the manifest"


def _groups(folder: Path, manifest: Manifest, split: str) -> Iterator[np.ndarray]:
    """The tokens of a split, int32 [R, T], row group by row group."""
    for shard in manifest.splits.get(split, []):
        path = folder / shard.file
        for group in range(len(read_footer(path, str(path)).ends_G)):
            yield read_tokens(path, str(path), group)


def _digest_rows(tokens_RT: np.ndarray) -> np.ndarray:
    digests = b"".join(hashlib.blake2b(row_T.tobytes(), digest_size=16).digest() for row_T in tokens_RT)
    return np.frombuffer(digests, dtype=_DIGEST)


def _digests(folder: Path, manifest: Manifest, split: str) -> np.ndarray:
    found = [_digest_rows(tokens_RT) for tokens_RT in _groups(folder, manifest, split)]
    return np.concatenate(found) if found else np.empty(0, dtype=_DIGEST)


def _mark(seen: np.ndarray, held_out: np.ndarray, digests_R: np.ndarray) -> None:
    """Mark the digests, sorted by their first half, that are among others."""
    starts_R = np.searchsorted(held_out["first"], digests_R["first"], side="left")
    ends_R = np.searchsorted(held_out["first"], digests_R["first"], side="right")
    for row in np.flatnonzero(ends_R > starts_R):
        same = slice(starts_R[row], ends_R[row])
        seen[same] |= held_out["second"][same] == digests_R["second"][row]


def _rows_with(folder: Path, manifest: Manifest, digests: np.ndarray) -> list[int]:
    """The numbers of the held-out rows with these digests."""
    if not len(digests):
        return []
    wanted = set(digests.tolist())
    return [row for row, digest in enumerate(_digests(folder, manifest, "val").tolist()) if digest in wanted]


def _samples(folder: Path, manifest: Manifest, rows: int, seed: int) -> list[Sample]:
    tokenizer, found = load_tokenizer(folder / manifest.tokenizer["file"]), list[Sample]()
    for split in manifest.splits:
        source = open_parquet(str(folder), split=split)
        numbers = [derive(seed, f"sample {split}", draw) % len(source) for draw in range(min(rows, len(source)))]
        indices = np.array(sorted(set(numbers)), dtype=np.int64)
        if not len(indices):
            continue
        tokens_RT, labels = source.rows(indices), source.labels(indices)
        for place, number in enumerate(indices.tolist()):
            text = tokenizer.decode(tokens_RT[place].tolist(), skip_special_tokens=False)
            found.append(Sample(split, number, labels[place] if labels else None, text))
    return found
