"""`manifest.json`, which stands beside prepared shards: what they hold and what made them, so that nothing has to be measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from picolm.errors import DataError

FORMAT = "picolm-rows-1"
FILE = "manifest.json"


@dataclass(frozen=True)
class Shard:
    """One file of rows. sha256: of the file; content: sha-256 of its rows (tokens, then labels), however compressed."""

    file: str
    rows: int
    bytes: int
    sha256: str
    content: str
    max_token: int


@dataclass(frozen=True)
class Manifest:
    """What a folder of prepared rows holds.

    recipe: what the rows follow from (inputs by digest, tokenizer, options), and so also the identity of the folder.
    tokenizer: file, sha256, vocab_size, eos_token, eos_id. sources: documents and rows per source and split.
    documents: those of its rows, or, of a mixture, those of its parts. tokens: in all rows; dropped_tokens: tails too short
    for a row; bad_lines: left out, with the first few of them; left_out: documents that a filter refused, or that were
    duplicates.
    """

    row_length: int
    recipe: dict[str, Any]
    tokenizer: dict[str, Any]
    splits: dict[str, list[Shard]]
    sources: dict[str, dict[str, int]] = field(default_factory=dict)
    documents: int = 0
    tokens: int = 0
    dropped_tokens: int = 0
    bad_lines: int = 0
    first_bad_lines: list[str] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    format: str = FORMAT

    @property
    def seq_len(self) -> int:
        """Inputs in a row: one less than its tokens."""
        return self.row_length - 1

    def rows(self, split: str) -> int:
        """Rows of a split."""
        return sum(shard.rows for shard in self.splits.get(split, []))

    def to_json(self) -> str:
        """The text of the file."""
        return json.dumps({"format": self.format, "seq_len": self.seq_len, **asdict(self)}, indent=1) + "\n"


def parse_manifest(text: str, name: str) -> Manifest | None:
    """The manifest in a file's text; None where the file is some other program's. Raises DataError on a damaged one."""
    try:
        content = json.loads(text)
        form = content.get("format", "") if isinstance(content, dict) else ""
        if form != FORMAT:
            if str(form).startswith("picolm-rows-"):
                raise DataError(f"{name}: is of the format {form}; this version reads {FORMAT}")
            return None
        content.pop("seq_len")
        splits = {split: [Shard(**shard) for shard in shards] for split, shards in content.pop("splits").items()}
        return Manifest(splits=splits, **content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{name}: is damaged ({error}); prepare the data again, or delete it to use the shards alone"
        ) from error


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder, None where it has none."""
    path = folder / FILE
    return parse_manifest(path.read_text(encoding="utf-8"), str(path)) if path.is_file() else None


def digest_of(parts: Iterable[Any]) -> str:
    """sha-256 of values that JSON can say, in their order."""
    return hashlib.sha256(json.dumps(list(parts), sort_keys=True).encode()).hexdigest()
