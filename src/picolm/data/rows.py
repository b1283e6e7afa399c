"""Documents -> rows: tokenized, joined by end-of-text within their source, cut into equal rows, shuffled.

The tokens of one split and source, in the order of the shuffled corpus, are a *stream*; a row is the next `row_length` tokens of
one, and belongs to the document that completes it. Rows are numbered, within their split, by the documents that complete them;
their place in the result follows from the seed and that number. Parts of the corpus are tokenized apart from each other; what
the streams of a part go on from (`carry`) is worked out in between, from the counts alone.

Shapes: D documents of a part, R rows, T tokens in a row (the inputs and the shifted targets).
"""

from __future__ import annotations

import shutil
import struct
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from picolm.data.corpus import Placed, Preparation, documents_of
from picolm.data.job import Job, Progress, Report, written
from picolm.data.runs import write_run
from picolm.data.tokenizer import Losses, Vocabulary, allow_parallelism, encode, train_tokenizer, write_tokenizer
from picolm.errors import DataError
from picolm.seeds import derive

SPLITS = ("train", "val")
_SOURCE = struct.Struct("<I")
_BATCH_DOCUMENTS = 512
_BATCH_CHARACTERS = 1 << 17
_NAMED_LOST = 10
_SAMPLE_CHARACTERS = 64 << 20

Stream = tuple[str, int]
"""(split, number of the source)."""


class _Tokens(NamedTuple):
    """The tokens of one part: those of each stream together, and for each document its stream (by place) and its tokens."""

    streams: dict[Stream, np.ndarray]
    owners_D: np.ndarray
    sizes_D: np.ndarray


def vocabulary(job: Preparation, unit: int, progress: Progress) -> Report:
    """Train the tokenizer, where none was given, on the first 64 million characters of the shuffled training documents."""
    if job.recipe.vocab_size is not None:
        trained = train_tokenizer(_sample(job, progress), job.recipe.vocab_size)
        job.path("tokenizer").mkdir(exist_ok=True)
        write_tokenizer(trained, job.path("tokenizer"), job.row_length - 1)
    return {}


def tokenize(job: Preparation, part: int, progress: Progress) -> Report:
    """The tokens of one part of the shuffled corpus. They do not depend on the number of threads."""
    parts, documents = job.report("divide")["parts"], sum(job.report("divide")["documents"])
    streams, owners, sizes, numbers = (
        defaultdict[Stream, list[np.ndarray]](list),
        list[int](),
        list[int](),
        dict[Stream, int](),
    )
    losses = Losses(job.vocabulary().tokenizer)
    for placed, tokens in _encoded(documents_of(job, part), job.vocabulary(), losses):
        stream = placed.split, placed.source
        streams[stream].append(tokens)
        owners.append(numbers.setdefault(stream, len(numbers)))
        sizes.append(len(tokens))
        if len(sizes) % _BATCH_DOCUMENTS == 0:
            progress("tokenizing", min(documents, part * documents // parts + len(sizes)), documents)
    with written(_tokens_path(job, part)) as file:
        for tokens in chain.from_iterable(streams.values()):
            file.write(tokens.astype("<i4").tobytes())
        file.write(np.array([owners, sizes], dtype="<i4").tobytes())
    return {
        "streams": [[*stream, sum(map(len, found))] for stream, found in streams.items()], "documents": len(sizes),
        "characters": losses.characters, "lost": losses.lost,
    }  # fmt: skip


def carry(job: Preparation, unit: int, progress: Progress) -> Report:
    """For each part: what its streams go on from, and how many rows of each split are complete before it."""
    rests: dict[Stream, np.ndarray] = {}
    rows, by_source = dict.fromkeys(SPLITS, 0), defaultdict[Stream, int](int)
    characters, lost = 0, Counter[str]()
    parts = job.report("divide")["parts"]
    for part, report in enumerate(job.reports("tokenize", range(parts))):
        streams = [(split, source) for split, source, _ in report["streams"]]
        characters, lost = characters + report["characters"], lost + Counter(report["lost"])
        with written(_carry_path(job, part)) as file:
            np.savez(
                file, *(rests.get(stream, _none()) for stream in streams), before=[rows[split] for split in SPLITS]
            )
        place = 0
        for stream, (_, _, size) in zip(streams, report["streams"]):
            full, rest = divmod(len(rests.get(stream, _none())) + size, job.row_length)
            rests[stream] = _rest(job, part, place + size, size, rest, rests.get(stream, _none()))
            rows[stream[0]] += full
            by_source[stream] += full
            place += size
    dropped = {split: sum(len(rest) for (side, _), rest in rests.items() if side == split) for split in SPLITS}
    progress("tokenizing", sum(job.report("divide")["documents"]), sum(job.report("divide")["documents"]))
    _check_losses(job, characters, lost)
    _check(job, rows, dropped)
    shutil.rmtree(job.path("documents"), ignore_errors=True)
    return {
        "rows": rows, "dropped": dropped, "parts": parts,
        "by_source": [[*stream, full] for stream, full in by_source.items()],
        "lost_characters": lost.total(), "most_lost": dict(lost.most_common(_NAMED_LOST)),
    }  # fmt: skip


def cut(job: Preparation, part: int, progress: Progress) -> Report:
    """Cut the streams of a part into rows, number them, and write them in the order of their keys."""
    content = _read_tokens(job, part)
    with np.load(_carry_path(job, part)) as given:
        rests, before = [given[f"arr_{place}"] for place in range(len(content.streams))], given["before"].tolist()
    counts = dict[str, int]()
    for split, start in zip(SPLITS, before):
        rows = sorted(_rows_of(content, rests, split, job.row_length), key=lambda row: row[0])
        keys = [derive(job.seed, f"row {split}", start + place) for place in range(len(rows))]
        records = [record_of(source, tokens_T) for _, source, tokens_T in rows]
        write_run(job.path("rows", split, part), keys, records)
        counts[split] = len(rows)
    return counts


def record_of(source: int, tokens_T: np.ndarray) -> bytes:
    """A row with the number of its source, as bytes."""
    return _SOURCE.pack(source) + tokens_T.astype("<i4", copy=False).tobytes()


def row_of(record: bytes) -> tuple[int, np.ndarray]:
    """(source, tokens int32 [T]) of a row's bytes."""
    return _SOURCE.unpack_from(record)[0], np.frombuffer(record, dtype="<i4", offset=_SOURCE.size)


def _rows_of(
    content: _Tokens, rests: list[np.ndarray], split: str, length: int
) -> Iterator[tuple[int, int, np.ndarray]]:
    """(number of the document that completes it, source, tokens [T]) of the rows that are completed in a part."""
    for place, ((side, source), tokens) in enumerate(content.streams.items()):
        if side != split:
            continue
        stream = np.concatenate([rests[place], tokens])
        full = len(stream) // length
        mine = np.flatnonzero(content.owners_D == place)
        ends = len(rests[place]) + np.cumsum(content.sizes_D[mine])
        completing_R = mine[np.searchsorted(ends, length * np.arange(1, full + 1))]
        yield from zip(completing_R.tolist(), [source] * full, stream[: full * length].reshape(full, length))


def _encoded(
    documents: Iterable[Placed], vocabulary: Vocabulary, losses: Losses
) -> Iterator[tuple[Placed, np.ndarray]]:
    """Each document with its tokens (int32) and the end of text."""
    allow_parallelism()
    for batch in _batches(documents):
        texts = [document.text for document in batch]
        ids = encode(vocabulary, texts)
        losses.add(texts, ids)
        for document, numbers in zip(batch, ids):
            yield document, np.array([*numbers, vocabulary.eos_id], dtype=np.int32)


def _batches(documents: Iterable[Placed]) -> Iterator[list[Placed]]:
    batch, characters = list[Placed](), 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _sample(job: Preparation, progress: Progress) -> Iterator[str]:
    characters = 0
    documents = chain.from_iterable(documents_of(job, part) for part in range(job.report("divide")["parts"]))
    for document in documents:
        if document.split == "train":
            yield document.text
            characters += len(document.text)
            if characters >= _SAMPLE_CHARACTERS:
                break
    progress("training the tokenizer", 0, None)


def _read_tokens(job: Job, part: int) -> _Tokens:
    report = next(job.reports("tokenize", [part]))
    everything = np.fromfile(_tokens_path(job, part), dtype="<i4")
    streams, place = dict[Stream, np.ndarray](), 0
    for split, source, size in report["streams"]:
        streams[split, source] = everything[place : place + size]
        place += size
    owners_D, sizes_D = everything[place:].reshape(2, report["documents"])
    return _Tokens(streams, owners_D, sizes_D.astype(np.int64))


def _rest(job: Job, part: int, end: int, size: int, rest: int, before: np.ndarray) -> np.ndarray:
    """The last `rest` tokens of a stream whose `size` tokens of this part end at `end` of its file."""
    own = min(rest, size)
    tail = np.fromfile(_tokens_path(job, part), dtype="<i4", count=own, offset=4 * (end - own))
    return np.concatenate([before[len(before) - (rest - own) :], tail])


def _check(job: Preparation, rows: dict[str, int], dropped: dict[str, int]) -> None:
    for split in SPLITS if job.recipe.val_fraction or job.recipe.is_fixed else ("train",):
        if rows[split] == 0:
            part = "held-out part of the corpus" if split == "val" else "corpus"
            advice = "hold out more, " if split == "val" else "add text, "
            raise DataError(
                f"the {part} is too short for a single row: {dropped[split]} tokens at most, a row takes {job.row_length} "
                f"({sum(job.report('divide')['documents'])} documents in {len(job.files)} files); {advice}or lower seq_len"
            )


def _check_losses(job: Preparation, characters: int, lost: Counter[str]) -> None:
    """Raise DataError where the tokenizer has no tokens for most of the text."""
    if 2 * lost.total() > characters:
        shown = ", ".join(f"{character!r}" for character, _ in lost.most_common(_NAMED_LOST))
        raise DataError(
            f"the tokenizer has no token for {lost.total():,} of {characters:,} characters of the text, such as {shown}; "
            "choose one that was made for such text, or train one on it (leave out --tokenizer)"
        )


def _none() -> np.ndarray:
    return np.empty(0, dtype=np.int32)


def _tokens_path(job: Job, part: int) -> Path:
    return job.path("tokens", part)


def _carry_path(job: Job, part: int) -> Path:
    return job.path("carry", f"{part:06d}.npz")
