"""Text -> shuffled rows of token ids: the one way into training for any user's text, and for the embedded corpora.

    files ─ documents ─▶ corpus, shuffled on disk ─▶ tokens, joined by end-of-text, cut into rows ─▶ shuffled on disk ─▶ shards

Both shuffles are external (see `runs.py`), so that memory does not grow with the corpus; disk space of a few times the corpus
is used meanwhile, in a hidden folder beside the result. Rows of one source come from one stream, so that a row has one source;
tails shorter than a row are dropped and counted. All is a function of the seed and of counters: the rows follow from files and
options alone, whoever does the work (see `job.py`) and however often it was interrupted. The folder appears whole, under its
name, or not at all.

The held-out part (split `val`) is chosen by the seed among the documents of each source: the share `val_fraction` of them, at
least one where the source has two. Unless `deduplicate` is asked for, duplicates in the corpus may fall on both sides.
A tokenizer is trained on the first 64 million characters of the shuffled training documents, never on the held-out ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from picolm.data import corpus, rows
from picolm.data.corpus import Preparation
from picolm.data.documents import LONGEST_BYTES, Found, TextFile, digest_files, digest_inputs, is_remote, survey
from picolm.data.duplicates import find_duplicates
from picolm.data.job import WORK_FORMAT, Progress, Report, Stage, one, untold
from picolm.data.manifest import Manifest, digest_of
from picolm.data.publish import Executor, carry_out, publish
from picolm.data.recipe import Recipe, already_there, is_free, recipe_for
from picolm.data.rows import SPLITS
from picolm.data.shards import ROWS_PER_SHARD, count_shards, written_shards
from picolm.data.shards import rank as rank_rows
from picolm.data.shards import write as write_shard
from picolm.data.tokenizer import Vocabulary, load_vocabulary, write_tokenizer
from picolm.errors import DataError

RUN_BYTES = 32 << 20
_SMALLEST_PIECE_BYTES = 1 << 16
_LISTED = "listed "


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
    progress: Progress | None = None,
    run_bytes: int = RUN_BYTES,
    executor: Executor | None = None,
) -> Manifest | None:
    """Turn text files into a folder of shards, `manifest.json` and the tokenizer's files; returns the manifest.

    tokenizer: a tokenizer.json, a folder with one, or a Hub name; None trains one of `vocab_size` entries on the text.
    val_fraction: share of the documents that is held out; or val: files and folders that are held out, and not trained on
    even if they lie in the given folders; or val_last: the share at the end of each document that is held out.
    filters: such as `length,min_characters=200` (see `filters.py`); deduplicate: of equal texts, keep the first.
    run_bytes: text that a process holds at once; changes no row. executor: who does the work; None: this process. One that
    does not wait for its work (a cluster) makes the result None as long as that is not finished.

    A folder that holds the same already (by digest of inputs and options) is left as it is, any other one is refused. Work
    that was interrupted is gone on with. Raises DataError for inputs that cannot be read and for a corpus too short for a
    single row.
    """
    out, paths, val = Path(out).expanduser(), list(paths), list(val)
    _check_apart(out, [*paths, *val])
    if executor is not None:  # its tasks may run in other folders
        out = out.absolute()
        paths, val = ([path if is_remote(path) else Path(path).absolute() for path in given] for given in (paths, val))
    found = survey(paths, val)
    files = found.files
    vocabulary = None if tokenizer is None else load_vocabulary(tokenizer)
    listed = _listed(files) if is_free(out) else None  # reading all of a large corpus for its digest takes long
    recipe = recipe_for(
        files, vocabulary, vocab_size=vocab_size, seq_len=seq_len, seed=seed, val_fraction=val_fraction,
        filters=filters, deduplicate=deduplicate, val_last=val_last, inputs=listed,
    )  # fmt: skip
    return prepare_files(
        files, recipe, out, vocabulary, progress, filters=filters, run_bytes=run_bytes, executor=executor, found=found
    )


def prepare_files(
    files: Sequence[TextFile],
    recipe: Recipe,
    out: Path,
    vocabulary: Vocabulary | None = None,
    progress: Progress | None = None,
    rows_per_shard: int = ROWS_PER_SHARD,
    *,
    filters: Sequence[str] = (),
    run_bytes: int = RUN_BYTES,
    executor: Executor | None = None,
    found: Found | None = None,
) -> Manifest | None:
    """Make the folder of a recipe unless it is there already. `recipe.inputs` may be a digest of names, sizes and times."""
    name = digest_of([recipe.identity(), run_bytes, rows_per_shard, WORK_FORMAT])[:12]
    job = Preparation(
        folder=out.parent / f".{out.name}.{name}", out=out, seed=recipe.seed, row_length=recipe.seq_len + 1,
        run_bytes=run_bytes, rows_per_shard=rows_per_shard, files=tuple(files), recipe=recipe, filters=tuple(filters),
        piece_bytes=_piece_bytes(files, recipe.val_fraction), found=found or Found(list(files), {}, [], []),
    )  # fmt: skip

    def start() -> None:
        if vocabulary is not None:
            job.path("tokenizer").mkdir(exist_ok=True)
            write_tokenizer(vocabulary, job.path("tokenizer"), recipe.seq_len)

    def there() -> Manifest | None:
        return None if is_free(out) else already_there(out, _measured(job).identity())

    return carry_out(job, STAGES, there, start, progress or untold, executor)


def _check_apart(out: Path, paths: Iterable[str | Path]) -> None:
    """Raise DataError where the result would lie among the texts, or the texts in it: another time it would be read as text."""
    for path in paths:
        place = Path(path).expanduser()
        if is_remote(path) or not place.exists():
            continue
        if place.is_dir() and out.resolve().is_relative_to(place.resolve()):
            raise DataError(f"{out}: lies inside of {path}, which is read; choose a folder outside of it")
        if place.resolve().is_relative_to(out.resolve()):
            raise DataError(f"{path}: lies inside of {out}, which is to be made; choose another folder for the result")


def finish(job: Preparation, unit: int, progress: Progress) -> Report:
    """Say in the manifest what is in the folder, and give it its name."""
    index, divide, carry = (job.report(stage) for stage in ("index", "divide", "carry"))
    vocabulary = job.vocabulary()
    tokenizer = {
        "file": "tokenizer.json",
        **(write_tokenizer(vocabulary, job.path("result"), job.row_length - 1) if job.path("result").is_dir() else {}),
        "vocab_size": vocabulary.tokenizer.get_vocab_size(),
        "eos_token": vocabulary.eos_token,
        "eos_id": vocabulary.eos_id,
    }
    duplicates = {"duplicates": divide["duplicates"]} if job.recipe.deduplicate else {}
    manifest = Manifest(
        row_length=job.row_length,
        recipe=_measured(job, index["digests"]).identity(),
        tokenizer=tokenizer,
        splits=written_shards(job),
        sources=_by_source(job.sources() or [], divide["documents"], carry["by_source"]),
        documents=sum(divide["documents"]),
        tokens=sum(carry["rows"].values()) * job.row_length,
        dropped_tokens=sum(carry["dropped"].values()),
        bad_lines=index["bad_lines"],
        first_bad_lines=index["first_bad_lines"],
        left_out=index["left_out"] | duplicates,
        not_read=job.found.not_read,
        first_not_read=job.found.first_not_read,
        outside=job.found.outside,
        nul_characters=index["nul_characters"],
        files_with_nul=index["files_with_nul"],
        lost_characters=carry["lost_characters"],
        most_lost=carry["most_lost"],
    )
    publish(job, manifest)
    return {}


def _by_source(names: list[str], documents: list[int], rows: list[list[Any]]) -> dict[str, dict[str, int]]:
    found = {(split, source): count for split, source, count in rows}
    return {
        name: {"documents": documents[number]} | {f"{split}_rows": found.get((split, number), 0) for split in SPLITS}
        for number, name in enumerate(names)
    }


def _measured(job: Preparation, digests: Sequence[str] | None = None) -> Recipe:
    """The recipe with the digest of what is in the files."""
    if digests is None and not job.recipe.inputs.startswith(_LISTED):
        return job.recipe
    return replace(job.recipe, inputs=digest_inputs(job.files, digests) if digests else digest_files(job.files))


def _piece_bytes(files: Sequence[TextFile], val_fraction: float) -> int:
    """Where long texts are cut: with a held-out part so that a corpus of one long text has about the share asked for."""
    if not val_fraction:
        return LONGEST_BYTES
    share = int(sum(file.size() for file in files) * val_fraction)
    return min(max(share, _SMALLEST_PIECE_BYTES), LONGEST_BYTES)


def _groups(job: Preparation) -> int:
    return len(job.groups)


def _duplicate_parts(job: Preparation) -> int:
    return job.report("index")["duplicate_parts"]


def _pieces(job: Preparation) -> int:
    return len(job.report("index")["pieces"])


def _parts(job: Preparation) -> int:
    return job.report("divide")["parts"]


STAGES = (
    Stage("read", _groups, corpus.read),
    Stage("index", one, corpus.index),
    Stage("deduplicate", _duplicate_parts, find_duplicates),
    Stage("shuffle", _pieces, corpus.shuffle),
    Stage("divide", one, corpus.divide),
    Stage("vocabulary", one, rows.vocabulary),
    Stage("tokenize", _parts, rows.tokenize),
    Stage("carry", one, rows.carry),
    Stage("cut", _parts, rows.cut),
    Stage("rank", one, rank_rows),
    Stage("write", count_shards, write_shard),
    Stage("finish", one, finish),
)


def _listed(files: Sequence[TextFile]) -> str:
    """Digest of what the files are called, how large they are and when they were written."""

    def state(file: TextFile) -> Any:
        return list(file.remote) if file.remote is not None else [file.size(), file.path.stat().st_mtime_ns]

    return _LISTED + digest_of(
        [file.name, str(file.path.absolute()), file.source, file.held_out, state(file)] for file in files
    )
