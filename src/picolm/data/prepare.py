"""Prepare text for training: turn text files into shuffled rows of token ids.

    files ─ scan ─▶ index of documents ─ decide ─▶ their streams ─ tokenize ─▶ token files ─ permute ─▶ shards, manifest

Several processes read the files twice: once to index the documents, once to tokenize them. Memory does not grow with
the text: the index (23 bytes per document) and the tokens are files in a hidden work folder beside the result. A unit
of work is done when its report is written there, so interrupted work can be resumed, and the rows do not depend on the
number of processes. The result gets its final name when it is complete.

Documents of one source and split are joined in file order, with the end-of-text token after each, and cut into rows,
which are written in a permuted order (see `shards.py`). Tails shorter than a row are dropped and counted. A tokenizer
is trained on at most 64 million characters of training documents, taken from all parts of the text in proportion, never
on held-out documents.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from picolm.data.documents import LONGEST, Found, TextFile, digest_files, survey
from picolm.data.manifest import FILE, Manifest, Shard, digest_of, read_manifest
from picolm.data.recipe import (
    Plan,
    Report,
    Unusable,
    alone,
    already_there,
    check_apart,
    explained,
    is_free,
    publish,
    recipe_of,
    require_plain,
)
from picolm.data.scan import decide, scan, texts
from picolm.data.shards import ROWS_PER_SHARD, SPLITS, TOKEN, Segment, StreamRows, shard_name, write_shard, written
from picolm.data.tokenizer import (
    Losses,
    Vocabulary,
    allow_parallelism,
    encode,
    load_vocabulary,
    train_tokenizer,
    write_tokenizer,
)  # fmt: skip
from picolm.trusted import remove_folder

UNIT_BYTES = 32 << 20
_SMALLEST_PIECE_BYTES = 1 << 16
_SAMPLE_CHARACTERS = 64 << 20
_MOST_FILES, _NAMED = 4096, 5
_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 512, 1 << 17

Progress = Callable[[str, int, int | None], None]
"""(name of the phase, amount done, total amount or None): bytes while reading, then documents, then rows."""


class Unit(NamedTuple):
    """Consecutive files that one process reads together, and their total bytes."""

    files: Sequence[TextFile]
    bytes: int


def prepare(
    paths: Iterable[str | Path],
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    vocab_size: int = 4096,
    seq_len: int = 2048,
    seed: int = 42,
    val_fraction: float = 0.0,
    val: Sequence[str | Path] = (),
    val_last: float = 0.0,
    filters: Sequence[str] = (),
    deduplicate: bool = False,
    workers: int | None = None,
    progress: Progress = lambda what, done, total: None,
    unit_bytes: int = UNIT_BYTES,
    rows_per_shard: int = ROWS_PER_SHARD,
) -> Manifest:
    """Turn text files into a folder of shards, `manifest.json` and the tokenizer's files. Returns the manifest.

    tokenizer: a tokenizer.json, a folder with one, or a Hub name; None trains one of `vocab_size` entries on the text.
    Held-out rows come from one of: val_fraction, a share of the documents; val, files and folders, which are not
    trained on even if `paths` contains them; val_last, a share at the end of each document.
    filters: such as `length,min_characters=200` (see `filters.py`). deduplicate: keep only the first of equal texts.
    workers: number of processes; None: one per processor. unit_bytes: text that each process holds at once. The rows do
    not depend on these two.

    If `out` holds the same rows already (by digest of inputs and options), it is kept. Interrupted work is resumed.
    Raises DataError if `out` holds anything else, inputs cannot be read, or the corpus is too short for a single row.
    """
    out, paths, val = Path(out).expanduser(), list(paths), list(val)
    check_apart(out, [*paths, *val])
    found = survey(paths, val)
    vocabulary = None if tokenizer is None else load_vocabulary(tokenizer)
    recipe = recipe_of(
        found.files, vocabulary, vocab_size=vocab_size, seq_len=seq_len, seed=seed, val_fraction=val_fraction,
        val_last=val_last, filters=filters, deduplicate=deduplicate,
    )  # fmt: skip
    name = digest_of([recipe, [file.state() for file in found.files], unit_bytes, rows_per_shard])[:12]
    plan = Plan(
        folder=out.parent / f".{out.name}.{name}", row_length=seq_len + 1, seed=seed, filters=tuple(filters),
        val_last=val_last, piece_bytes=piece_bytes(found.files, val_fraction), unit_bytes=unit_bytes,
        rows_per_shard=rows_per_shard,
    )  # fmt: skip
    with alone(out):
        if not is_free(out):
            manifest = already_there(out, recipe | {"inputs": digest_files(found.files)})
            remove_folder(plan.folder)
            return manifest
        require_plain(plan.folder)
        with explained(plan, out):
            if read_manifest(plan.path("result")) is None:
                _Work(plan, found, recipe, vocabulary, workers, progress).carry_out()
            return publish(plan, out)


def piece_bytes(files: Sequence[TextFile], val_fraction: float) -> int:
    """Return the size in bytes at which long texts are cut, so that `val_fraction` can split even one long text."""
    share = int(sum(file.size() for file in files) * val_fraction) if val_fraction else LONGEST
    return min(max(share, _SMALLEST_PIECE_BYTES), LONGEST)


class _Work:
    """The stages of one preparation. A stage consists of independent units, each done or not done."""

    def __init__(
        self,
        plan: Plan,
        found: Found,
        recipe: dict[str, Any],
        vocabulary: Vocabulary | None,
        workers: int | None,
        tell: Progress,
    ):
        self._plan, self._found, self._recipe, self._vocabulary = plan, found, recipe, vocabulary
        self._workers, self._tell = workers, tell
        self._units = list(_units(found.files, plan.unit_bytes))

    def carry_out(self) -> None:
        """Do all units that are not done yet, and write the folder `result` with its manifest."""
        read = self._spread(
            "scan", "reading", scan, [(unit.files,) for unit in self._units], [u.bytes for u in self._units]
        )
        self._check_text(read)
        options = {"deduplicate": "deduplicate" in self._recipe, "val_fraction": self._recipe["val_fraction"]}
        decided = self._once("decide", lambda: decide(self._plan, read, **options))
        self._once("vocabulary", lambda: self._make_vocabulary(read))
        documents = [report["documents"] for report in read]
        starts = np.cumsum([0, *documents]).tolist()
        parts = [(unit.files, start, end) for unit, start, end in zip(self._units, starts, starts[1:])]
        blocks = self._spread("tokenize", "tokenizing", _tokenize, parts, documents)
        layout = self._once("layout", lambda: self._lay_out(blocks))
        shards = {split: self._write_split(split, decided) for split in self._splits()}
        self._write_manifest(read, decided, layout, shards)

    def _spread(
        self, stage: str, what: str, work: Callable[..., Report], parts: Sequence[tuple[Any, ...]], sizes: Sequence[int]
    ) -> list[Report]:
        """Do the units of a stage that are not done, in `workers` processes, and return the reports of all units."""
        from joblib import Parallel, cpu_count, delayed

        todo = [unit for unit in range(len(parts)) if not self._plan.is_done(stage, unit)]
        workers = min(self._workers or cpu_count(), max(len(todo), 1))
        threads = 0 if workers == 1 else cpu_count() // workers
        calls = (delayed(_finish)(self._plan, stage, unit, work, parts[unit], threads) for unit in todo)
        done = sum(sizes) - sum(sizes[unit] for unit in todo)
        self._tell(what, done, sum(sizes))
        for unit in Parallel(n_jobs=workers, return_as="generator_unordered", batch_size=1)(calls):
            done += sizes[unit]
            self._tell(what, done, sum(sizes))
        return [self._plan.report(stage, unit) for unit in range(len(parts))]

    def _once(self, stage: str, work: Callable[[], Report]) -> Report:
        return self._plan.report(stage, 0) if self._plan.is_done(stage, 0) else self._plan.finish(work(), stage, 0)

    def _splits(self) -> Sequence[str]:
        holds_out = self._recipe["val_fraction"] or {"val_given", "val_last"} & self._recipe.keys()
        return SPLITS if holds_out else SPLITS[:1]

    def _check_text(self, read: Sequence[Report]) -> None:
        if any(report["used"] for report in read):
            return
        left_out = sum((Counter(report["left_out"]) for report in read), Counter[str]())
        reasons = [f"{dropped} documents were left out by {name}" for name, dropped in left_out.items()]
        if bad := sum(report["bad_lines"] for report in read):
            reasons.append(f"{bad} lines could not be used: {', '.join(_first(read, 'first_bad_lines'))}")
        size = sum(unit.bytes for unit in self._units)
        raise Unusable("; ".join([f"no text in the {len(self._found.files)} files ({size} bytes)", *reasons]))

    def _make_vocabulary(self, read: Sequence[Report]) -> Report:
        vocabulary = self._vocabulary
        if vocabulary is None:
            self._tell("training the tokenizer", 0, None)
            vocabulary = train_tokenizer(self._sample(read), self._recipe["vocab_size"])
        self._plan.path("tokenizer").mkdir(exist_ok=True)
        write_tokenizer(vocabulary, self._plan.path("tokenizer"), self._plan.row_length - 1)
        return {}

    def _sample(self, read: Sequence[Report]) -> Iterator[str]:
        """Yield training documents from the beginning of each unit, as many as its share of the bytes."""
        streams_D, start = np.load(self._plan.path("streams.npy"), mmap_mode="r"), 0
        for unit, report in zip(self._units, read):
            left = _SAMPLE_CHARACTERS * unit.bytes / sum(unit.bytes for unit in self._units)
            for stream, text in texts(self._plan, unit.files, streams_D[start : start + report["documents"]]):
                if stream % 2 == 0:
                    yield text
                    left -= len(text)
                if left <= 0:
                    break
            start += report["documents"]

    def _lay_out(self, tokenized: Sequence[Report]) -> Report:
        """Return the location of the tokens of each stream. Raises Unusable if the tokenizer lost most of the text."""
        segments, characters, lost = list[list[int]](), 0, Counter[str]()
        for unit, report in enumerate(tokenized):
            for block in range(report["blocks"]):
                found = self._plan.report("block", unit, block)
                segments += [[unit, block, *segment] for segment in found["segments"]]
                characters, lost = characters + found["characters"], lost + Counter(found["lost"])
        most_lost = dict(lost.most_common(2 * _NAMED))
        if 2 * lost.total() > characters:
            raise Unusable(
                f"the tokenizer has no token for {lost.total():,} of {characters:,} characters of the text, such as "
                f"{', '.join(map(repr, most_lost))}; choose one that was made for such text, or train one on it (leave out "
                "--tokenizer)"
            )
        return {"segments": segments, "lost_characters": lost.total(), "most_lost": most_lost}

    def _write_split(self, split: str, decided: Report) -> list[Shard]:
        rows, most = _rows(self._plan, split), self._plan.rows_per_shard
        if len(rows) == 0:
            part = "held-out part of the corpus" if split == "val" else "corpus"
            raise Unusable(
                f"the {part} is too short for a single row: {rows.dropped_tokens} tokens at most, a row takes "
                f"{self._plan.row_length} ({sum(decided['documents'])} documents in {len(self._found.files)} files); "
                f"{'hold out more' if split == 'val' else 'add text'}, or lower seq_len"
            )
        sizes = [min(most, len(rows) - start) for start in range(0, len(rows), most)]
        places = [(split, number, len(sizes), decided["sources"]) for number in range(len(sizes))]
        return [Shard(**report) for report in self._spread(f"write {split}", f"writing {split}", _write, places, sizes)]

    def _write_manifest(
        self, read: Sequence[Report], decided: Report, layout: Report, shards: dict[str, list[Shard]]
    ) -> None:
        plan, vocabulary = self._plan, load_vocabulary(self._plan.path("tokenizer"))
        rows = {split: _rows(plan, split) for split in SPLITS}
        sources = {
            label: {"documents": count}
            | {f"{split}_rows": rows[split].rows_by_source.get(number, 0) for split in SPLITS}
            for number, (label, count) in enumerate(zip(decided["sources"] or [], decided["documents"]))
        }
        left_out = Counter(dict.fromkeys(plan.filters, 0))
        for report in read:
            left_out.update(report["left_out"])
        digests = [digest for report in read for digest in report["digests"]]
        manifest = Manifest(
            row_length=plan.row_length,
            recipe=self._recipe | {"inputs": digest_files(self._found.files, digests)},
            tokenizer={
                "file": "tokenizer.json",
                **write_tokenizer(vocabulary, plan.path("result"), plan.row_length - 1),
                "vocab_size": vocabulary.tokenizer.get_vocab_size(),
                "eos_token": vocabulary.eos_token,
                "eos_id": vocabulary.eos_id,
            },
            splits=shards,
            sources=sources,
            documents=sum(decided["documents"]),
            tokens=sum(map(len, rows.values())) * plan.row_length,
            dropped_tokens=sum(part.dropped_tokens for part in rows.values()),
            bad_lines=sum(report["bad_lines"] for report in read),
            first_bad_lines=_first(read, "first_bad_lines"),
            left_out=left_out | ({"duplicates": decided["duplicates"]} if "deduplicate" in self._recipe else {}),
            not_read=self._found.not_read,
            first_not_read=self._found.first_not_read,
            outside=self._found.outside,
            nul_characters=sum(report["nul_characters"] for report in read),
            files_with_nul=_first(read, "files_with_nul"),
            lost_characters=layout["lost_characters"],
            most_lost=layout["most_lost"],
        )
        with written(plan.path("result", FILE)) as file:
            file.write(manifest.to_json().encode())


def _finish(plan: Plan, stage: str, unit: int, work: Callable[..., Report], part: tuple[Any, ...], threads: int) -> int:
    """Do a unit and write its report. Returns the unit's number.

    threads: number of tokenizer threads, 0 for its default; an existing RAYON_NUM_THREADS takes precedence.
    """
    if threads:
        os.environ.setdefault("RAYON_NUM_THREADS", str(threads))
    plan.finish(work(plan, unit, *part), stage, unit)
    return unit


def _tokenize(plan: Plan, unit: int, files: Sequence[TextFile], start: int, end: int) -> Report:
    """Write the tokens of the documents start … end - 1, block by block, without the blocks that exist already."""
    streams_D = np.load(plan.path("streams.npy"), mmap_mode="r")[start:end]
    vocabulary, number = load_vocabulary(plan.path("tokenizer")), -1
    for number, block in enumerate(_batches(texts(plan, files, streams_D), plan.unit_bytes)):
        if not plan.is_done("block", unit, number):
            plan.finish(_write_block(plan.path("tokens", unit, number), block, vocabulary), "block", unit, number)
    return {"blocks": number + 1}


def _write_block(path: Path, block: Sequence[tuple[int, str]], vocabulary: Vocabulary) -> Report:
    """Write the tokens of texts, grouped by stream. The tokens do not depend on the number of threads."""
    allow_parallelism()
    losses, streams = Losses(vocabulary.tokenizer), dict[int, list[np.ndarray]]()
    for batch in _batches(block, _BATCH_CHARACTERS, _BATCH_DOCUMENTS):
        ids = encode(vocabulary, [text for _, text in batch])
        losses.add([text for _, text in batch], ids)
        for (stream, _), tokens in zip(batch, ids):
            streams.setdefault(stream, []).append(np.array([*tokens, vocabulary.eos_id], dtype=TOKEN))
    segments, start = list[list[int]](), 0
    with written(path) as file:
        for stream in sorted(streams):
            tokens_N = np.concatenate(streams.pop(stream))
            file.write(tokens_N.tobytes())
            segments.append([stream, start, len(tokens_N)])
            start += len(tokens_N)
    return {"segments": segments, "characters": losses.characters, "lost": losses.lost}


def _write(plan: Plan, unit: int, split: str, number: int, shards: int, sources: list[str] | None) -> Report:
    """Write one shard of the result."""
    rows, start = _rows(plan, split), number * plan.rows_per_shard
    part = rows.permuted(start, min(start + plan.rows_per_shard, len(rows)), plan.seed)
    return asdict(write_shard(part, plan.path("result", shard_name(split, number, shards)), sources))


@lru_cache(maxsize=4)
def _rows(plan: Plan, split: str) -> StreamRows:
    segments = [
        Segment(plan.path("tokens", unit, block), SPLITS[stream % 2], stream // 2, start, tokens)
        for unit, block, stream, start, tokens in plan.report("layout", 0)["segments"]
    ]
    return StreamRows(segments, split, plan.row_length)


def _units(files: Sequence[TextFile], unit_bytes: int) -> Iterator[Unit]:
    """Group consecutive files into units of about `unit_bytes`; a larger file is not split."""
    start, size = 0, 0
    for number, file in enumerate(files, 1):
        size += file.size()
        if size >= unit_bytes or number - start == _MOST_FILES or number == len(files):
            yield Unit(files[start:number], size)
            start, size = number, 0


def _batches(
    documents: Iterable[tuple[int, str]], characters: int, most: int | None = None
) -> Iterator[list[tuple[int, str]]]:
    """Yield lists of (stream, text) with about `characters` characters and at most `most` texts each."""
    batch, held = list[tuple[int, str]](), 0
    for stream, text in documents:
        batch.append((stream, text))
        held += len(text)
        if held >= characters or len(batch) == most:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _first(reports: Sequence[Report], key: str) -> list[str]:
    return [name for report in reports for name in report[key]][:_NAMED]
