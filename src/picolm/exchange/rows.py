"""Upload prepared rows to the Hub as a data set: shards, tokenizer, manifest, and a card that describes them.

Shards are uploaded first and the manifest last, so an incomplete data set cannot be taken for a complete one. Files
that are there with the same content are not uploaded again.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import yaml

from picolm.data.manifest import FILE, Manifest, Shard, file_of, read_manifest
from picolm.errors import DataError
from picolm.exchange.commits import commit, prepare_repository
from picolm.markdown import code, plain

_SHARDS_PER_COMMIT = 16
_CARD, _TOKENIZER = "README.md", "tokenizer.json"


def push_rows(
    folder: Path,
    repository: str,
    *,
    branch: str = "main",
    private: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Upload a folder made by `pico data prepare`, and return its manifest.

    progress: called with the number of shards done, and of all shards. Raises DataError when the folder has no
    manifest, or a shard with other bytes than the manifest says.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise DataError(f"{folder}: has no {FILE} of `pico data prepare`; only prepared rows can be sent")
    shards = [shard for split in manifest.splits.values() for shard in split]
    prepare_repository(repository, branch, "dataset", private, DataError)
    for first in range(0, len(shards), _SHARDS_PER_COMMIT):
        progress(first, len(shards))
        part = shards[first : first + _SHARDS_PER_COMMIT]
        files: dict[str, Path | bytes] = {shard.file: _checked(folder, shard) for shard in part}
        last = first + len(part)
        commit(repository, branch, "dataset", f"Shards {first + 1} to {last} of {len(shards)}", files, DataError)
    last_files: dict[str, Path | bytes] = {FILE: folder / FILE, _CARD: data_card(manifest, repository).encode()}
    for name in (manifest.tokenizer["file"], "tokenizer_config.json"):
        if os.path.lexists(folder / name):
            last_files[name] = file_of(folder, name)
    commit(repository, branch, "dataset", "Manifest and card", last_files, DataError)
    progress(len(shards), len(shards))
    return manifest


def data_card(manifest: Manifest, repository: str) -> str:
    """Return the data card: what the rows are and how to train on them.

    Licence and language are left out: only the owner of the texts knows them.
    """
    splits = [{"split": split, "path": f"{split}-*.parquet"} for split in manifest.splits]
    front = {"tags": ["pico", "pretokenized"], "configs": [{"config_name": "default", "data_files": splits}]}
    rows = "".join(
        f"| {plain(split)} | {manifest.rows(split):,} | {len(shards)} |\n" for split, shards in manifest.splits.items()
    )
    sources = "".join(
        f"| {plain(source)} | {', '.join(f'{count:,} {plain(what)}' for what, count in counts.items())} |\n"
        for source, counts in manifest.sources.items()
    )
    tokenizer = manifest.tokenizer
    return f"""---
{yaml.safe_dump(front, sort_keys=False)}---
# {repository.split("/")[1]}

Rows of token ids for language models: {manifest.documents:,} documents, {manifest.tokens:,} tokens, rows of
{manifest.seq_len} + 1 tokens (inputs, and the targets one further), in a shuffled order that a seed gives. `{FILE}` holds the
digest of every shard, and all that the rows follow from.

| split | rows | shards |
|---|---:|---:|
{rows}
Tokenizer: {plain(tokenizer.get("vocab_size", "?"))} entries, sha-256 {code(tokenizer.get("sha256", "?"))}, in `{_TOKENIZER}`.

| source | |
|---|---|
{sources}
```sh
pico train CONFIG.yaml data.dataset.name={repository}
```
"""


def _checked(folder: Path, shard: Shard) -> Path:
    path = file_of(folder, shard.file)
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != shard.sha256:
        raise DataError(f"{path}: is not the file that {FILE} describes; prepare the data again")
    return path
