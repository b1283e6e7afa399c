"""Prepared corpora -> one: rows mixed by weights and a seed, each with what it is from.

A weight is the share of the result's training rows that come from a part. No row is taken twice: the result has as many rows as
the weights allow, or as many as are asked for. Which rows of a part are taken is a permutation named by the seed, and so is the
order of the result. The held-out rows of all parts are all kept: `source` tells them apart when a loss is measured.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from picolm.data.decode import read_footer, read_labels, read_tokens
from picolm.data.inspection import prepared_manifest
from picolm.data.job import WORK_FORMAT, Job, Progress, Report, Stage, one, untold
from picolm.data.manifest import Manifest, Shard, damaged_files, digest_of
from picolm.data.order import permute
from picolm.data.parquet import rows_fingerprint
from picolm.data.publish import Executor, carry_out, publish
from picolm.data.recipe import already_there
from picolm.data.rows import SPLITS, record_of
from picolm.data.runs import write_run
from picolm.data.shards import ROWS_PER_SHARD, count_shards, rank, write, written_shards
from picolm.data.tokenizer import load_vocabulary, write_tokenizer
from picolm.errors import DataError
from picolm.seeds import derive

_RUN_BYTES = 32 << 20


@dataclass(frozen=True)
class Part:
    """A prepared folder. taken: how many of its training rows are in the result."""

    folder: Path
    manifest: Manifest
    taken: int

    @property
    def labels(self) -> list[str]:
        """What its rows are from: its sources, or its own name where it has none."""
        return list(self.manifest.sources) or [self.folder.resolve().name]

    @property
    def shards(self) -> list[tuple[str, int, Shard]]:
        """(split, number of its first row, shard) of all its shards."""
        found, starts = list[tuple[str, int, Shard]](), Counter[str]()
        for split in SPLITS:
            for shard in self.manifest.splits.get(split, []):
                found.append((split, starts[split], shard))
                starts[split] += shard.rows
        return found


@dataclass(frozen=True, kw_only=True, repr=False)
class Merging(Job):
    """Parts on their way to one folder."""

    parts: tuple[Part, ...]
    recipe: dict[str, Any]

    def sources(self) -> list[str]:
        """All names of sources, in the order of the parts."""
        return list(dict.fromkeys(label for part in self.parts for label in part.labels))

    @property
    def pieces(self) -> list[tuple[int, str, int, Shard]]:
        """(part, split, number of the first row, shard) of what each unit reads."""
        if "pieces" not in self._reports:
            shards = [(number, *shard) for number, part in enumerate(self.parts) for shard in part.shards]
            self._reports["pieces"] = {"of": shards}
        return self._reports["pieces"]["of"]


def merge(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    rows: int | None = None,
    seed: int = 42,
    progress: Progress | None = None,
    rows_per_shard: int = ROWS_PER_SHARD,
    executor: Executor | None = None,
) -> Manifest | None:
    """Mix prepared folders into one; returns its manifest (None: an executor is still at it).

    weights: shares of the training rows, of any sum; None takes all rows of all parts. rows: training rows in all, at most
    what the weights allow. Raises DataError for parts with different tokenizers or lengths of rows.
    """
    manifests = [_manifest(Path(folder)) for folder in folders]
    _check_alike(list(map(Path, folders)), manifests)
    taken = shares([manifest.rows("train") for manifest in manifests], weights, rows)
    parts = tuple(Part(Path(folder), manifest, count) for folder, manifest, count in zip(folders, manifests, taken))
    recipe = {
        "merged": [[part.labels, fingerprints(part.manifest), part.taken] for part in parts],
        "tokenizer": manifests[0].tokenizer["sha256"], "seq_len": manifests[0].seq_len, "seed": seed, "version": 1,
    }  # fmt: skip
    out = Path(out)
    job = Merging(
        folder=out.parent / f".{out.name}.{digest_of([recipe, rows_per_shard, WORK_FORMAT])[:12]}", out=out, seed=seed,
        row_length=manifests[0].row_length, run_bytes=_RUN_BYTES, rows_per_shard=rows_per_shard, parts=parts,
        recipe=recipe,
    )  # fmt: skip
    return carry_out(job, STAGES, lambda: already_there(out, recipe), lambda: None, progress or untold, executor)


def shares(available: Sequence[int], weights: Sequence[float] | None, rows: int | None) -> list[int]:
    """How many rows of each part are taken. Raises DataError for weights that cannot be had."""
    if weights is None:
        weights = [float(count) for count in available]
        rows = sum(available) if rows is None else rows
    if len(weights) != len(available):
        raise DataError(f"{len(weights)} weights for {len(available)} folders; give one for each")
    if not all(0 < weight < float("inf") for weight in weights):
        raise DataError(f"weights {', '.join(map(str, weights))}: all have to be above 0; leave out what is not wanted")
    decimal = [Fraction(str(weight)) for weight in weights]
    exact = [weight / sum(decimal) for weight in decimal]
    most = min(count / share for count, share in zip(available, exact))
    if rows is None:
        rows = int(most)
    if not 0 < rows <= most:
        raise DataError(
            f"{rows} rows cannot be had: without a row taken twice the weights allow {int(most)} (there are: "
            f"{', '.join(map(str, available))})"
        )
    taken = [int(rows * share) for share in exact]
    rests = sorted(range(len(exact)), key=lambda part: (taken[part] - rows * exact[part], part))
    for part in rests[: rows - sum(taken)]:  # the largest remainders; what a part has is never exceeded
        taken[part] += 1
    return taken


def pick(job: Merging, unit: int, progress: Progress) -> Report:
    """Take the rows of one shard that are chosen, and write them in the order of the result."""
    number, split, start, shard = job.pieces[unit]
    part, numbers = job.parts[number], {name: place for place, name in enumerate(job.sources())}
    path, keys, records, counts = part.folder / shard.file, list[int](), list[bytes](), Counter[str]()
    footer, run = read_footer(path, str(path)), itertools.count()
    for group, end in enumerate(footer.ends_G):
        tokens_RT = read_tokens(path, str(path), group)
        rows_R = start + int(end) - len(tokens_RT) + np.arange(len(tokens_RT))
        labels = read_labels(path, str(path), group) if footer.has_labels else part.labels * len(rows_R)
        for place in np.flatnonzero(_chosen(job, number, split, rows_R)).tolist():
            keys.append(derive(job.seed, f"merge {split}", number, int(rows_R[place])))
            if labels[place] not in numbers:
                raise DataError(
                    f"{path}: row {int(rows_R[place]) - start} has the source {labels[place]!r}, which its manifest does not "
                    f"list; see `pico data verify {part.folder}`"
                )
            records.append(record_of(numbers[labels[place]], tokens_RT[place]))
            counts[labels[place]] += 1
        if 4 * job.row_length * len(records) >= job.run_bytes or end == footer.rows:
            write_run(job.path("rows", split, f"{unit:06d}-{next(run):06d}"), keys, records)
            keys, records = [], []
    progress("reading", unit + 1, len(job.pieces))
    return {"split": split, "counts": counts}


def finish(job: Merging, unit: int, progress: Progress) -> Report:
    """Say in the manifest what is in the folder, and give it its name."""
    by_source = {name: {"documents": 0} | {f"{split}_rows": 0 for split in SPLITS} for name in job.sources()}
    for report in job.reports("pick", range(len(job.pieces))):
        for name, count in report["counts"].items():
            by_source[name][f"{report['split']}_rows"] += count
    for part in job.parts:
        for name, found in part.manifest.sources.items():
            by_source[name]["documents"] += found["documents"]
        if not part.manifest.sources:
            by_source[part.labels[0]]["documents"] += part.manifest.documents
    first, splits, digests = job.parts[0], written_shards(job), dict[str, str]()
    if job.path("result").is_dir():
        digests = write_tokenizer(load_vocabulary(first.folder), job.path("result"), job.row_length - 1)
    manifest = Manifest(
        row_length=job.row_length,
        recipe=job.recipe,
        tokenizer=first.manifest.tokenizer | digests,
        splits=splits,
        sources=by_source,
        documents=sum(part.manifest.documents for part in job.parts),
        tokens=job.row_length * sum(shard.rows for shards in splits.values() for shard in shards),
    )
    publish(job, manifest)
    return {}


def fingerprints(manifest: Manifest) -> dict[str, str]:
    """The digest of the rows of each split."""
    return {split: rows_fingerprint(manifest, split) for split in manifest.splits}


def _chosen(job: Merging, number: int, split: str, rows_R: np.ndarray) -> np.ndarray:
    """Whether each row is in the result: its image under a permutation of the part is among the first `taken`."""
    if split != "train":
        return np.ones(len(rows_R), dtype=bool)
    part = job.parts[number]
    return permute(rows_R, part.manifest.rows("train"), job.seed, "merge", number) < part.taken


def _manifest(folder: Path) -> Manifest:
    manifest = prepared_manifest(folder)
    if problems := damaged_files(folder, manifest, itertools.chain.from_iterable(manifest.splits.values())):
        raise DataError("\n".join([*problems, f"see `pico data verify {folder}`"]))
    return manifest


def _check_alike(folders: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    if len(folders) < 2 or len({folder.resolve() for folder in folders}) < len(folders):
        raise DataError(f"{', '.join(map(str, folders))}: two or more different folders can be merged")
    first = manifests[0]
    for folder, manifest in zip(folders[1:], manifests[1:]):
        if manifest.tokenizer["sha256"] != first.tokenizer["sha256"]:
            raise DataError(
                f"{folder}: was made with another tokenizer than {folders[0]}, so its ids mean other text; prepare it again "
                f"with --tokenizer {folders[0]}"
            )
        if manifest.row_length != first.row_length:
            raise DataError(
                f"{folder}: has rows of {manifest.row_length} tokens and {folders[0]} of {first.row_length}; prepare it "
                f"again with --seq-len {first.seq_len}"
            )


def _units(job: Merging) -> int:
    return len(job.pieces)


STAGES = (
    Stage("pick", _units, pick),
    Stage("rank", one, rank),
    Stage("write", count_shards, write),
    Stage("finish", one, finish),
)
