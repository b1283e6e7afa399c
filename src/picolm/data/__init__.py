"""Where the tokens come from: rows of token ids, found by their number.

A source is a table of equally long rows; row i is found by arithmetic, in any order, so that nothing has to be iterated or
fast-forwarded. A family of sources is one factory registered in `SOURCES`; the part of a name behind the colon is handed to it.

    embedded:state_of_the_union   a corpus that comes with a package, prepared once into the cache folder
    parquet:PATH                  a folder, a file or a glob of parquet shards; PATH alone does where it exists
    hub:owner/name[@revision]     a data set of the Hugging Face Hub; owner/name alone does
    datatrove:PATH                .ds files of datatrove's DocumentTokenizer, as they lie
    mix:NAME*WEIGHT,NAME*WEIGHT   rows of several sources by weights
    my_lab.module:attribute       a factory of the user's own, called like those below

Splits are told from the names of files and folders (see `splits.py`): `train-*.parquet` and `val-*.parquet`, in the folder itself
or in its `data/` folder, is the layout of published data sets and of `picolm.data.prepare`. Shards of a data set without the
word train are the train split if they name no other one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from picolm.data.splits import matching
from picolm.errors import DataError
from picolm.network import cache_folder
from picolm.registry import Registry, did_you_mean, names_code


class Source(Protocol):
    """Rows of token ids by number. All methods may be called from several threads.

    fingerprint: digest of the content and its order, the same wherever the data lie.
    row_length: tokens in a row, the shifted target included.
    max_token: the largest token id, where a manifest states it, and max_token_file: the shard it is in.
    eos: the id of the token that ends a document; tokenizer_file: the tokenizer.json that made the rows, and
    tokenizer_sha256, its digest; None where unknown.
    """

    fingerprint: str
    row_length: int
    max_token: int | None
    max_token_file: str | None
    eos: int | None
    tokenizer_file: Path | None
    tokenizer_sha256: str | None

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """The rows of these numbers, int32 [R, row_length]. Raises DataError naming the shard that cannot be read."""
        ...

    def labels(self, indices: np.ndarray) -> list[str] | None:
        """What each row is from (its `source` column); None where the data do not tell."""
        ...

    def locate(self, index: int) -> str:
        """Where a row lies, for messages: `train-00003-of-00010.parquet row 17`."""
        ...


SourceFactory = Callable[..., Source]
"""(place, *, split, row_length, vocab_size, cache_dir) -> Source; `place` is the name behind the colon, or empty."""

SOURCES: Registry[SourceFactory] = Registry("data source")


def open_source(
    name: str,
    *,
    split: str = "train",
    row_length: int | None = None,
    vocab_size: int = 4096,
    cache_dir: Path | None = None,
) -> Source:
    """The rows of one split of a data set.

    row_length: tokens needed in a row; longer rows are cut, shorter ones an error. None takes the rows as they are.
    vocab_size: entries of the tokenizer that an embedded corpus trains; other sources have theirs already.
    cache_dir: where prepared corpora and indices of remote data sets are kept ($PICO_CACHE, else ~/.cache/pico).
    Raises DataError when there is no such data set or no such split, with what was tried.
    """
    factory, place = _find(name)
    return factory(
        place, split=split, row_length=row_length, vocab_size=vocab_size, cache_dir=cache_dir or cache_folder()
    )


def is_own_source(name: str) -> bool:
    """Return whether a name of data is that of code, not of a family that there is."""
    return names_code(name) and name.partition(":")[0] not in SOURCES


def has_own_length(name: str) -> bool:
    """Return whether the rows of a data set have a length of their own, so that it need not be said to open it."""
    return name.partition(":")[0] not in ("datatrove", "embedded", "mix")


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


from picolm.data import embedded, flat, hub, mix, parquet  # noqa: E402, F401  (each registers its families above)
