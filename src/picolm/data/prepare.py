"""Text -> shuffled rows of token ids: the one way into training for any user's text, and for the embedded corpora.

    files ─ documents ─▶ corpus, shuffled on disk ─▶ tokens, joined by end-of-text, cut into rows ─▶ shuffled on disk ─▶ shards

Both shuffles are external (see `spill.py`), so that memory does not grow with the corpus; disk space of a few times the corpus
is used meanwhile, beside the result. Rows of one source come from one stream, so that a row has one source; tails shorter
than a row are dropped and counted. All is a function of the seed and of counters: the rows follow from files and options
alone. The folder appears whole, under its name, or not at all.

The held-out part (split `val`) is chosen by the seed among the documents of each source: the share `val_fraction` of them, at
least one where the source has two. Documents are not compared: duplicates in the corpus may fall on both sides.
A tokenizer is trained on the first 64 million characters of the shuffled training documents, never on the held-out ones.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from picolm.data.corpus import Corpus
from picolm.data.documents import LONGEST_BYTES, Reader, TextFile, digest_files, find_files
from picolm.data.manifest import FILE, Manifest, Shard, read_manifest
from picolm.data.rows import SPLITS, Rows, cut_rows
from picolm.data.shards import ROWS_PER_SHARD, write_shards
from picolm.data.tokenizer import Vocabulary, check_size, load_vocabulary, train_tokenizer, write_tokenizer
from picolm.errors import DataError

Progress = Callable[[str, int, int | None], None]
"""(what is being done, how much is done, how much there is in all): bytes while reading, then documents, then rows."""

_SAMPLE_CHARACTERS = 64 << 20
_SMALLEST_PIECE_BYTES = 1 << 16


@dataclass(frozen=True)
class Recipe:
    """All that the rows follow from. inputs: digest of the files; tokenizer: sha-256 of its file, or `trained`."""

    inputs: str
    tokenizer: str
    vocab_size: int | None
    seq_len: int
    seed: int
    val_fraction: float
    version: int = 1


def prepare(
    paths: Iterable[str | Path],
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    vocab_size: int = 4096,
    seq_len: int = 2048,
    seed: int = 42,
    val_fraction: float = 0.0,
    progress: Progress | None = None,
) -> Manifest:
    """Turn text files into a folder of shards, `manifest.json` and the tokenizer's files; returns the manifest.

    tokenizer: a tokenizer.json, a folder with one, or a Hub name; None trains one of `vocab_size` entries on the text.
    A folder that holds the same already (by digest of inputs and options) is left as it is, any other one is refused.
    Raises DataError for inputs that cannot be read and for a corpus too short for a single row.
    """
    files = find_files(paths)
    vocabulary = None if tokenizer is None else load_vocabulary(tokenizer)
    recipe = recipe_for(files, vocabulary, vocab_size=vocab_size, seq_len=seq_len, seed=seed, val_fraction=val_fraction)
    return prepare_files(files, recipe, Path(out), vocabulary, progress)


def recipe_for(
    files: Sequence[TextFile],
    vocabulary: Vocabulary | None,
    *,
    vocab_size: int,
    seq_len: int,
    seed: int,
    val_fraction: float,
) -> Recipe:
    """The recipe of these files and options (reads all files for their digests). Raises DataError for senseless options."""
    if seq_len < 1:
        raise DataError(f"seq_len is {seq_len}; a row needs at least one input token")
    if not 0 <= val_fraction < 1:
        raise DataError(
            f"val_fraction is {val_fraction}; it is a share of the documents, from 0 up to, but not including, 1"
        )
    if vocabulary is None:
        check_size(vocab_size)
        return Recipe(digest_files(files), "trained", vocab_size, seq_len, seed, val_fraction)
    assert vocabulary.file is not None
    digest = hashlib.sha256(vocabulary.file.read_bytes()).hexdigest()
    return Recipe(digest_files(files), digest, None, seq_len, seed, val_fraction)


def prepare_files(
    files: Sequence[TextFile],
    recipe: Recipe,
    out: Path,
    vocabulary: Vocabulary | None = None,
    progress: Progress | None = None,
    rows_per_shard: int = ROWS_PER_SHARD,
) -> Manifest:
    """Make the folder of a recipe, beside `out` and then renamed, unless it is there already."""
    if (there := _already_there(out, recipe)) is not None:
        return there
    report = progress or (lambda what, done, total: None)
    aside = out.parent / f".{out.name}.{os.getpid()}-{secrets.token_hex(4)}"
    work = aside / "work"
    work.mkdir(parents=True)
    try:
        manifest = _fill(aside, work, files, recipe, vocabulary, report, rows_per_shard)
        shutil.rmtree(work)
        return _publish(aside, out, recipe, manifest)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error}); nothing of it was left behind") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _fill(
    folder: Path,
    work: Path,
    files: Sequence[TextFile],
    recipe: Recipe,
    vocabulary: Vocabulary | None,
    report: Progress,
    rows_per_shard: int,
) -> Manifest:
    """Make shards, tokenizer and manifest in `folder`, with the spills in `work`."""
    with (
        closing(Corpus(work / "documents", seed=recipe.seed, val_fraction=recipe.val_fraction)) as corpus,
        closing(Rows(work / "rows", row_length=recipe.seq_len + 1, seed=recipe.seed)) as rows,
    ):
        reader = _read(files, recipe, corpus, report)
        vocabulary = vocabulary or train_tokenizer(_sample(corpus, report), recipe.vocab_size or 0)
        cut_rows(corpus, vocabulary, rows, lambda done: report("tokenizing", done, len(corpus)))
        _check(rows, recipe, len(files), len(corpus))
        splits = {
            split: write_shards(
                rows.shuffled(split), rows.count(split), folder, split, corpus.sources, report, rows_per_shard
            )
            for split in SPLITS
            if rows.count(split)
        }
        return _manifest(folder, splits, recipe, vocabulary, corpus, rows, reader)


def _read(files: Sequence[TextFile], recipe: Recipe, corpus: Corpus, report: Progress) -> Reader:
    total = sum(file.path.stat().st_size for file in files)
    piece = LONGEST_BYTES
    if (
        recipe.val_fraction
    ):  # so that a corpus of one long text has a held-out part of about the share that was asked for
        piece = min(max(int(total * recipe.val_fraction), _SMALLEST_PIECE_BYTES), LONGEST_BYTES)
    reader = Reader(piece)
    for file in files:
        for document in reader.documents(file):
            corpus.add(document)
            if len(corpus) % 256 == 0:
                report("reading", reader.bytes_read, total)
    report("reading", total, total)
    if len(corpus) == 0:
        raise DataError(f"no text in the {len(files)} files ({total} bytes){_bad_lines(reader)}")
    return reader


def _sample(corpus: Corpus, report: Progress) -> Iterator[str]:
    """The first training documents of the shuffled corpus, up to 64 million characters."""
    characters = 0
    for document in corpus:
        if document.split == "train":
            yield document.text
            characters += len(document.text)
            if characters >= _SAMPLE_CHARACTERS:
                break
    report("training the tokenizer", 0, None)


def _check(rows: Rows, recipe: Recipe, files: int, documents: int) -> None:
    length = recipe.seq_len + 1
    for split in SPLITS if recipe.val_fraction else ("train",):
        if rows.count(split) == 0:
            part = "held-out part of the corpus" if split == "val" else "corpus"
            advice = "raise val_fraction, " if split == "val" else "add text, "
            raise DataError(
                f"the {part} is too short for a single row: {rows.dropped(split)} tokens at most, a row takes {length} "
                f"({documents} documents in {files} files); {advice}or lower seq_len"
            )


def _manifest(
    folder: Path,
    splits: dict[str, list[Shard]],
    recipe: Recipe,
    vocabulary: Vocabulary,
    corpus: Corpus,
    rows: Rows,
    reader: Reader,
) -> Manifest:
    """Write the tokenizer's files, and say in the manifest what is in the folder."""
    tokenizer = {
        "file": "tokenizer.json",
        "sha256": write_tokenizer(vocabulary, folder, recipe.seq_len),
        "vocab_size": vocabulary.tokenizer.get_vocab_size(),
        "eos_token": vocabulary.eos_token,
        "eos_id": vocabulary.eos_id,
    }
    manifest = Manifest(
        row_length=recipe.seq_len + 1,
        recipe=asdict(recipe),
        tokenizer=tokenizer,
        splits=splits,
        sources=_by_source(corpus, rows),
        documents=len(corpus),
        tokens=sum(rows.count(split) for split in SPLITS) * (recipe.seq_len + 1),
        dropped_tokens=rows.dropped(),
        bad_lines=reader.bad_lines,
        first_bad_lines=reader.first_bad_lines,
    )
    (folder / FILE).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _by_source(corpus: Corpus, rows: Rows) -> dict[str, dict[str, int]]:
    documents = corpus.documents_by_source()
    return {
        name: {"documents": documents[number]} | {f"{split}_rows": rows.by_source[split, number] for split in SPLITS}
        for number, name in enumerate(corpus.sources or [])
    }


def _already_there(out: Path, recipe: Recipe) -> Manifest | None:
    """The manifest of `out` if it was made by this recipe; None if nothing is there. Raises DataError for anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    manifest = read_manifest(out) if out.is_dir() else None
    if manifest is None:
        raise DataError(f"{out}: is there already and holds something else; choose another folder or delete it")
    differences = _differences(manifest.recipe, asdict(recipe))
    if differences:
        raise DataError(f"{out}: holds rows made in another way ({differences}); choose another folder or delete it")
    for shard in (shard for shards in manifest.splits.values() for shard in shards):
        path = out / shard.file
        if not path.is_file() or path.stat().st_size != shard.bytes:
            raise DataError(f"{path}: is not whole; delete {out} and prepare it again")
    return manifest


def _differences(there: dict[str, Any], asked: dict[str, Any]) -> str:
    return ", ".join(
        "other text" if key == "inputs" else f"{key} {there.get(key)} there, {value} asked for"
        for key, value in asked.items()
        if there.get(key) != value
    )


def _publish(aside: Path, out: Path, recipe: Recipe, manifest: Manifest) -> Manifest:
    """Rename the finished folder; another process that made the same meanwhile is as good."""
    try:
        if out.is_dir():
            out.rmdir()  # an empty one
        aside.rename(out)
    except OSError:
        there = _already_there(out, recipe)
        if there is None:
            raise
        return there
    return manifest


def _bad_lines(reader: Reader) -> str:
    if not reader.bad_lines:
        return ""
    return f"; {reader.bad_lines} lines could not be used: {', '.join(reader.first_bad_lines)}"
