"""Documents -> rows: tokenized in parallel, joined by end-of-text within their source, cut into equal rows, shuffled on disk.

Shapes: T tokens in a row (the inputs and the shifted targets).
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from picolm.data.corpus import Placed
from picolm.data.spill import Spill
from picolm.data.tokenizer import Vocabulary, allow_parallelism
from picolm.seeds import derive

SPLITS = ("train", "val")
_SOURCE = struct.Struct("<I")
_BATCH_DOCUMENTS = 512
_BATCH_CHARACTERS = 2 << 20


class Rows:
    """Rows of both splits on disk; iterate over one split to get them shuffled."""

    def __init__(self, folder: Path, *, row_length: int, seed: int):
        self._spills = {split: Spill(folder / split) for split in SPLITS}
        self._row_length, self._seed = row_length, seed
        self._rests: defaultdict[tuple[str, int], np.ndarray] = defaultdict(lambda: np.empty(0, dtype=np.int32))
        self.by_source: defaultdict[tuple[str, int], int] = defaultdict(int)

    def add(self, split: str, source: int, tokens: np.ndarray) -> None:
        """Append tokens (int32) to the stream of a source, and store the rows that are full."""
        stream = np.concatenate([self._rests[split, source], tokens])
        full = len(stream) // self._row_length
        for tokens_T in stream[: full * self._row_length].reshape(full, self._row_length):
            spill = self._spills[split]
            key = derive(self._seed, f"row {split}", spill.records)
            spill.put(key, _SOURCE.pack(source) + tokens_T.tobytes())
        self._rests[split, source] = stream[full * self._row_length :].copy()
        self.by_source[split, source] += full

    def count(self, split: str) -> int:
        """Rows of a split."""
        return self._spills[split].records

    def close(self) -> None:
        """Close the files; they can still be read."""
        for spill in self._spills.values():
            spill.close()

    def shuffled(self, split: str) -> Iterator[tuple[int, np.ndarray]]:
        """(source, tokens int32 [T]) of the rows of a split."""
        for record in self._spills[split]:
            yield _SOURCE.unpack_from(record)[0], np.frombuffer(record, dtype=np.int32, offset=_SOURCE.size)

    def dropped(self, split: str | None = None) -> int:
        """Tokens at the ends of the streams, too few for a row."""
        return sum(len(rest) for (side, _), rest in self._rests.items() if split in (None, side))


def cut_rows(documents: Iterable[Placed], vocabulary: Vocabulary, rows: Rows, report: Callable[[int], None]) -> None:
    """Tokenize all documents into `rows`. The result does not depend on the number of threads."""
    allow_parallelism()
    done = 0
    for batch in _batches(documents):
        encodings = vocabulary.tokenizer.encode_batch_fast(
            [document.text for document in batch], add_special_tokens=False
        )
        for document, encoding in zip(batch, encodings):
            rows.add(document.split, document.source, np.array([*encoding.ids, vocabulary.eos_id], dtype=np.int32))
        done += len(batch)
        report(done)


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
