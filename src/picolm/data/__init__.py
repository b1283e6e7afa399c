"""Data sources: rows of token ids, read by row number.

A source is a table of rows of equal length. Row i is found by arithmetic, in any order, so nothing has to be iterated
or fast-forwarded. A family of sources is one factory registered in `SOURCES`; it gets the part of the name after the
colon.

    embedded:state_of_the_union   a corpus that comes with a package, prepared once into the cache folder
    parquet:PATH                  a folder, a file or a glob of parquet shards; PATH alone works if it exists
    hub:owner/name[@revision]     a data set of the Hugging Face Hub; owner/name alone works too
    datatrove:PATH                .ds files of datatrove's DocumentTokenizer, unchanged
    megatron:PATH                 .bin and .idx files of Megatron-LM and GPT-NeoX
    olmo:PATH                     .npy files; olmo:uint16:PATH and olmo:uint32:PATH for files without a header
    nanogpt:PATH                  .bin files of nanoGPT and llm.c
    datasets:FOLDER               a folder written by `save_to_disk` of the library datasets
    mix:NAME*WEIGHT,NAME*WEIGHT   rows of several sources by weights
    first:ROWS,NAME               the first training rows of another source
    my_lab.module:attribute       a factory of your own, with the same arguments

The names of files and folders give the split (see `manifest.py`). Published data sets and `picolm.data.prepare` use
`train-*.parquet` and `val-*.parquet`, in the folder itself or in its `data/` folder. Shards whose names contain no
split are the train split; if other shards are named train, this is an error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from picolm.data.manifest import matching
from picolm.errors import DataError
from picolm.network import cache_folder
from picolm.registry import Registry, did_you_mean, names_code


class Source(Protocol):
    """Rows of token ids by number. All methods may be called from several threads.

    fingerprint: digest of the content and its order, independent of where the data are stored.
    row_length: tokens in a row, including the shifted target.
    max_token: the largest token id, if a manifest gives it; max_token_file: the shard that contains it.
    eos: the id of the token that ends a document. tokenizer_file: the tokenizer.json that made the rows;
    tokenizer_sha256: its digest. Each is None if unknown.
    """

    fingerprint: str
    row_length: int
    max_token: int | None
    max_token_file: str | None
    eos: int | None
    tokenizer_file: Path | None
    tokenizer_sha256: str | None

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Return the rows with these numbers, int32 [R, row_length]. Raises DataError naming an unreadable shard."""
        ...

    def labels(self, indices: np.ndarray) -> list[str] | None:
        """Return the label of each row (its `source` column); None if the data have no labels."""
        ...

    def locate(self, index: int) -> str:
        """Return the location of a row, for messages: `train-00003-of-00010.parquet row 17`."""
        ...


SourceFactory = Callable[..., Source]
"""(place, *, split, row_length, vocab_size, cache_dir) -> Source; `place` is the part after the colon, or empty."""

SOURCES: Registry[SourceFactory] = Registry("data source")


def open_source(
    name: str,
    *,
    split: str = "train",
    row_length: int | None = None,
    vocab_size: int = 4096,
    cache_dir: Path | None = None,
) -> Source:
    """Open one split of a data set and return its rows.

    row_length: tokens needed in a row; longer rows are cut, shorter rows are an error. None keeps the rows as they are.
    vocab_size: size of the tokenizer that is trained on an embedded corpus; other data sets have their own tokenizer.
    cache_dir: folder for prepared corpora and indices of remote data sets (default: $PICO_CACHE, else ~/.cache/pico).
    Raises DataError, saying what was tried, if there is no such data set or no such split.
    """
    factory, place = _find(name)
    return factory(
        place, split=split, row_length=row_length, vocab_size=vocab_size, cache_dir=cache_dir or cache_folder()
    )


def is_own_source(name: str) -> bool:
    """Return whether a data set name refers to the user's own code rather than to a registered family."""
    return names_code(name) and name.partition(":")[0] not in SOURCES


def is_hidden_code(name: str) -> bool:
    """Return whether a source named inside of another source's name is code: the checks for untrusted code do not look there."""
    return is_own_source(name) and not os.path.exists(name)


def has_own_length(name: str) -> bool:
    """Return whether the stored rows have a fixed length, so that the data set can be opened without `row_length`."""
    return name.partition(":")[0] not in ("datatrove", "embedded", "first", "megatron", "mix", "nanogpt", "olmo")


def _find(name: str) -> tuple[SourceFactory, str]:
    family, colon, place = name.partition(":")
    if colon and family in SOURCES:
        return SOURCES.get(family), place
    if os.path.exists(os.path.expanduser(name)) or matching(os.path.expanduser(name))[1]:
        return SOURCES.get("parquet"), name
    if is_own_source(name):
        return SOURCES.get(name), ""
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?", name):
        return SOURCES.get("hub"), name
    raise DataError(
        f"data set {name!r} is not found: no such file or folder, no glob that matches, not the form owner/name of a "
        f"Hub data set, and no family of sources{did_you_mean(family, SOURCES)} (there are: {', '.join(SOURCES)})"
    )


from picolm.data import (  # noqa: E402  (each registers its families above)
    arrow,  # noqa: F401
    embedded,  # noqa: F401
    first,  # noqa: F401
    flat,  # noqa: F401
    hub,  # noqa: F401
    megatron,  # noqa: F401
    mix,  # noqa: F401
    nanogpt,  # noqa: F401
    olmo,  # noqa: F401
    parquet,  # noqa: F401
)
