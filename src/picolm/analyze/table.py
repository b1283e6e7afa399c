"""The long table, with one row per value, and the files that are written from it.

COLUMNS names the columns. A missing value is null, and `reason` says why; infinity is a value. metric_kind: similarity,
distance or quantity. chance, chance_std: mean and standard deviation over permutations of the rows; z: how many of
these standard deviations the value is above the mean. forced: number of canonical correlations that are 1 whatever the
data; null for metrics without them. target: what the configuration compares with (`last`, `previous`, `300`, `run
wide`); against_run, against_step and against_layer: what that is for this row. bin: the group of tokens, positions or parameters
that a reading of a probe belongs to; units, definition: what it is; standard_error: over rows or draws; rows: digest of the rows
that it was asked on. note: why the step, or the one that it is compared
with, is doubtful; what a circuit of this architecture leaves out.
"""

import hashlib
import io
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from picolm.console import sparkline
from picolm.csvfile import csv_text
from picolm.errors import FileError
from picolm.store.files import disk_errors, write_atomically
from picolm.trusted import read_bytes, read_text, refuse_links, require_regular

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from rich.table import Table

TEXT = (
    "run", "split", "component", "kind", "module", "metric", "metric_kind", "options", "against_run", "target", "reason",
    "note", "bin", "units", "definition", "rows",
)  # fmt: skip
NUMBERS = ("value", "chance", "chance_std", "z", "standard_error")
COLUMNS = (
    "run", "step", "split", "component", "kind", "layer", "head", "module", "metric", "metric_kind", "options", *NUMBERS,
    "forced", "against_run", "against_step", "against_layer", "target", "reason", "note", "bin", "units", "definition", "rows",
)  # fmt: skip
MEASURED = (*NUMBERS, "forced", "reason", "note", "rows")  # the other columns say what a row is about
COUNTS = ("layer", "head", "forced", "against_step", "against_layer")  # whole numbers or null
RESULTS = "results.parquet"
AGGREGATED = "aggregated.parquet"
CSV = "results.csv"
SUMS = "checksums.sha256"
LONGEST_NAME = 200  # characters of the name of a JSON file without its end
FULL_WIDTH, LONG_NAME = (
    116,
    24,
)  # width in characters of a summary with all columns, for names of metrics up to this length
MODEL = "model"  # the component of the readings of probes, which belong to no tensor


def write(rows: Sequence[Mapping[str, Any]], folder: Path, csv: bool = False) -> Path:
    """Write results.parquet, the JSON files of each step and, if `csv`, results.csv. Each file is written atomically.
    Returns the path of results.parquet. Raises FileError if the folder is a link.
    """
    import pyarrow as pa

    types = {name: pa.string() if name in TEXT else pa.float64() if name in NUMBERS else pa.int64() for name in COLUMNS}
    table = pa.Table.from_pylist(
        [{name: row[name] for name in COLUMNS} for row in rows], schema=pa.schema(list(types.items()))
    )
    refuse_links(folder, folder.parent)
    with disk_errors("the analysis", folder):
        folder.mkdir(parents=True, exist_ok=True)
        seal(folder, RESULTS, to_parquet(table))
        for name, values in json_files(rows).items():
            refuse_links((folder / name).parent, folder)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / name, (json.dumps(values, indent=1) + "\n").encode())
        if csv:
            seal(folder, CSV, csv_text(load(folder)).encode())
    return folder / RESULTS


def to_parquet(table: "pa.Table | pd.DataFrame") -> bytes:
    """Return a table as the bytes of a Parquet file whose pages have checksums."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = io.BytesIO()
    whole = table if isinstance(table, pa.Table) else pa.Table.from_pandas(table, preserve_index=False)
    pq.write_table(whole, content, write_page_checksum=True)
    return content.getvalue()


def seal(folder: Path, name: str, content: bytes) -> None:
    """Write a file of results, and its digest to SUMS, which `sha256sum --check` can read.

    Between the two writes SUMS has the digests of both the old and the new file: whenever this is interrupted, the file
    that is there matches. Raises StoreError if it cannot be written.
    """
    new = hashlib.sha256(content).hexdigest()
    digests = {file: found for file, found in _digests(folder).items() if (folder / file).exists()}
    with disk_errors(name, folder):
        _write_digests(folder, digests | {name: [*digests.get(name, []), new]})
        write_atomically(folder / name, content)
        _write_digests(folder, digests | {name: [new]})


def _write_digests(folder: Path, digests: Mapping[str, Sequence[str]]) -> None:
    lines = [f"{digest}  {name}\n" for name, found in digests.items() for digest in found]
    write_atomically(folder / SUMS, "".join(lines).encode())


def _digests(folder: Path) -> dict[str, list[str]]:
    """Return the valid digests by file; empty for a folder that an earlier version wrote. Raises FileError."""
    found: dict[str, list[str]] = {}
    if not os.path.lexists(folder / SUMS):
        return found
    for line in read_text(folder / SUMS).splitlines():
        if not re.fullmatch(r"[0-9a-f]{64}  \S+", line):
            raise FileError(f"{folder / SUMS}: is damaged, {line!r} is no digest of a file; run the analysis again")
        found.setdefault(line[66:], []).append(line[:64])
    return found


def read_sealed(path: Path) -> bytes:
    """Return the content of a file of results. Raises FileError if it does not match its digest. A file without a
    digest (written by an earlier version, or copied alone) is returned unchecked.
    """
    content = read_bytes(path, most_bytes=require_regular(path).st_size)
    digests = _digests(path.parent).get(path.name)
    if digests is not None and hashlib.sha256(content).hexdigest() not in digests:
        raise FileError(
            f"{path}: is not what was written: its sha-256 is not the one in {SUMS}; run the analysis again"
        )
    return content


def read_parquet(path: Path) -> "pd.DataFrame":
    """Return a table of results, after checking its digest and the checksums of its pages. Raises FileError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = pa.BufferReader(read_sealed(path))
    try:
        return pq.read_table(content, page_checksum_verification=True).to_pandas()
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise FileError(f"{path}: cannot be read as a table ({error}); run the analysis again") from error


def load(place: str | Path) -> "pd.DataFrame":
    """Read the long table of an analysis, from its folder or its file, as a pandas data frame (layers and heads as
    Int64).

    Columns that an older table lacks are added, see `completed`. Raises FileError if the file is damaged or is not a
    table.
    """
    path = Path(place)
    frame = completed(read_parquet(path / RESULTS if path.is_dir() else path))
    return frame[[*COLUMNS, *(name for name in frame.columns if name not in COLUMNS)]].astype(
        dict.fromkeys(COUNTS, "Int64")
    )


def completed(frame: "pd.DataFrame") -> "pd.DataFrame":
    """Return a table with all columns: missing ones are added empty, `metric_kind` from the name of the metric."""
    import pandas as pd

    added = [name for name in COLUMNS if name not in frame.columns]
    frame = frame.assign(**{name: math.nan if name in NUMBERS else pd.NA if name in COUNTS else "" for name in added})
    return frame.assign(metric_kind=frame["metric"].map(_kind_of)) if "metric_kind" in added else frame


def _kind_of(metric: str) -> str:
    from picolm.analyze.metrics import METRICS

    return METRICS.get(metric).kind if metric in METRICS else ""


def json_files(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Return `step_N/<metric>_<split>.json` -> {name: value}, as pico-analyze writes them.

    With several runs, each has its own folder. If a metric has several options or targets, they become part of the file
    name. This format cannot hold comparisons of one target with several layers or steps, see `only_in_table`.
    """
    rows = list(rows)
    several = len({row["run"] for row in rows}) > 1
    left_out = only_in_table(rows)
    variants: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        for name in ("options", "target"):
            variants.setdefault((row["metric"], name), set()).add(row[name])
    files: dict[str, dict[str, float | None]] = {}
    for row in rows:
        if _identity(row) in left_out:
            continue
        words = [
            prefix + row[name]
            for name, prefix in (("options", ""), ("target", "target="))
            if row[name] and len(variants[row["metric"], name]) > 1
        ]
        folder = f"{row['run']}/step_{row['step']}" if several else f"step_{row['step']}"
        file = " ".join([row["metric"].replace(":", "."), *words, row["asked_split"]])
        files.setdefault(f"{folder}/{_file_name(file)}.json", {})[json_name(row)] = row["value"]
    return files


def _file_name(words: str) -> str:
    """Return words as the name of a file, with a digest in place of the end of what no file system has room for."""
    name = quote(words, safe=" =,").replace(" ", "_")  # quoted: an option may hold a slash
    return name if len(name) <= LONGEST_NAME else f"{name[:100]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def only_in_table(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[Any, ...], int]:
    """Return what the JSON files cannot hold, because one target compares it with several layers or steps, with the
    number of rows of each.
    """
    partners: dict[tuple[Any, ...], list[Any]] = {}
    for row in rows:
        partner = row["against_run"], row["against_step"], row["against_layer"]
        partners.setdefault(_identity(row), []).append(partner)
    return {key: len(found) for key, found in partners.items() if len(set(found)) > 1}


def _identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    names = "run", "step", "split", "kind", "module", "head", "metric", "options", "target", "bin"
    return tuple(row[name] for name in names)


def json_name(row: Mapping[str, Any]) -> str:
    """Return the name of a value in the JSON files: `layers.0.mlp.out.weights`,
    `layers.0.ov_circuit.activations.heads.3`.
    """
    head = "" if row["head"] is None else f".heads.{row['head']}"
    return f"{row['module']}.{row['kind']}{head}" + (f".{row['bin']}" if row["bin"] else "")


def summary(rows: Iterable[Mapping[str, Any]], width: int = FULL_WIDTH) -> "Table":
    """Return a table for a terminal of `width` characters: for each metric, the mean over layers and heads at the first
    and the last step, and its course. A metric with several targets has a line for each. If there is no space for all
    columns, those of what was measured are joined into one, and counts are left out.
    """
    from rich import box
    from rich.table import Table

    rows = list(rows)
    targets: dict[tuple[str, ...], set[str]] = {}
    for row in rows:
        targets.setdefault(_measured(row), set()).add(row["target"])
    series: dict[tuple[str, ...], dict[int, list[float]]] = {}
    missing: dict[tuple[str, ...], int] = {}
    for row in rows:
        against = f"with {row['target']}" if len(targets[_measured(row)]) > 1 else ""
        metric = "\n".join(filter(None, (row["metric"], *(row["options"] or "").split(), against)))
        component = "" if row["component"] == MODEL else row["component"]
        key = (row["run"], metric, component, row["kind"], row["split"])
        steps = series.setdefault(key, {})
        if row["value"] is None:
            missing[key] = missing.get(key, 0) + 1
        else:
            steps.setdefault(row["step"], []).append(row["value"])
    longest = max((len(line) for _, metric, *_ in series for line in metric.split("\n")), default=0)
    narrow = width < FULL_WIDTH + max(0, longest - LONG_NAME)
    alone = len({run for run, *_ in series}) == 1  # the name of the only run says nothing
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("metric", "of") if narrow else ("run", "metric", "component", "kind", "split")[alone:]:
        shown.add_column(heading, overflow="fold", no_wrap=heading == "metric" and not narrow)
    for heading in (*(() if narrow else ("values", "missing")), "first", "last", "over steps"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for name, steps in series.items():
        run, metric, *what = name
        names: tuple[str, ...] = (
            (metric, " ".join(filter(None, ("" if alone else run, *what)))) if narrow else name[alone:]
        )
        counts = () if narrow else (str(sum(map(len, steps.values()))), str(missing.get(name, 0) or ""))
        shown.add_row(*names, *counts, *_course(steps, 10 if narrow else 16))
    return shown


def _measured(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(row[name] for name in ("run", "metric", "options", "component", "kind", "split"))


def _course(steps: Mapping[int, Sequence[float]], width: int) -> tuple[str, str, str]:
    """Return the means at the first and the last step, and the means of all steps as a sparkline."""
    means = [sum(steps[step]) / len(steps[step]) for step in sorted(steps)]
    return (f"{means[0]:.4g}", f"{means[-1]:.4g}", sparkline(means, width)) if means else ("", "", "")
