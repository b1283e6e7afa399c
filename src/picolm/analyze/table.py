"""The long table: one row per value, and what is written from it.

Columns: run, step, split, component, kind, layer, head, module, metric, options, value, against_run, against_step,
against_layer, reason. A missing value is null and says why in `reason`; infinity is a value.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from picolm.console import sparkline

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

TEXT = ("run", "split", "component", "kind", "module", "metric", "options", "against_run", "reason")
COLUMNS = (
    "run", "step", "split", "component", "kind", "layer", "head", "module", "metric", "options", "value",
    "against_run", "against_step", "against_layer", "reason",
)  # fmt: skip
RESULTS = "results.parquet"
FULL_WIDTH = 116  # characters that all columns of a summary take


def write(rows: Sequence[Mapping[str, Any]], folder: Path, csv: bool = False) -> Path:
    """Write results.parquet, the JSON files of each step and, when asked, results.csv; each file is there whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    types = {name: pa.string() if name in TEXT else pa.float64() if name == "value" else pa.int64() for name in COLUMNS}
    table = pa.Table.from_pylist(
        [{name: row[name] for name in COLUMNS} for row in rows], schema=pa.schema(list(types.items()))
    )
    aside = folder / f".{RESULTS}"
    pq.write_table(table, aside)
    aside.replace(folder / RESULTS)
    for name, values in json_files(rows).items():
        _write_text(folder / name, json.dumps(values, indent=1) + "\n")
    if csv:
        _write_text(folder / "results.csv", load(folder).to_csv(index=False))
    return folder / RESULTS


def load(place: str | Path) -> "pd.DataFrame":
    """The long table of an analysis, from its folder or its file, as a pandas data frame (layers and heads as Int64)."""
    import pandas as pd

    path = Path(place)
    frame = pd.read_parquet(path / RESULTS if path.is_dir() else path)
    return frame.astype(dict.fromkeys(("layer", "head", "against_step", "against_layer"), "Int64"))


def json_files(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """`step_N/<metric>_<split>.json` -> {name: value}, as pico-analyze writes them.

    With several runs each has a folder of its own; where a metric occurs with several options they become part of the file's
    name. Values that compare with several layers or steps have no place in this format and are only in the table.
    """
    rows = list(rows)
    several = len({row["run"] for row in rows}) > 1
    variants: dict[str, set[str]] = {}
    partners: dict[tuple[Any, ...], set[Any]] = {}
    for row in rows:
        variants.setdefault(row["metric"], set()).add(row["options"])
        partners.setdefault(_identity(row), set()).add((row["against_run"], row["against_step"], row["against_layer"]))
    files: dict[str, dict[str, float | None]] = {}
    for row in rows:
        if len(partners[_identity(row)]) > 1:
            continue
        options = "_" + row["options"].replace(" ", "_") if len(variants[row["metric"]]) > 1 and row["options"] else ""
        folder = f"{row['run']}/step_{row['step']}" if several else f"step_{row['step']}"
        files.setdefault(f"{folder}/{row['metric']}{options}_{row['asked_split']}.json", {})[json_name(row)] = row[
            "value"
        ]
    return files


def _identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("run", "step", "split", "kind", "module", "head", "metric", "options"))


def json_name(row: Mapping[str, Any]) -> str:
    """The name of a value in the JSON files: `layers.0.swiglu.w_2.weights`, `layers.0.ov_circuit.activations.heads.3`."""
    return f"{row['module']}.{row['kind']}" + ("" if row["head"] is None else f".heads.{row['head']}")


def summary(rows: Iterable[Mapping[str, Any]], width: int = FULL_WIDTH) -> "Table":
    """For a terminal of `width` characters: the mean over layers and heads of each metric at the first and the last step,
    and how it went. Where there is not room for all columns, what was measured is one of them, and counts are left out.
    """
    from rich import box
    from rich.table import Table

    series: dict[tuple[str, ...], dict[int, list[float]]] = {}
    missing: dict[tuple[str, ...], int] = {}
    for row in rows:
        metric = "\n".join(filter(None, (row["metric"], *(row["options"] or "").split())))
        key = (row["run"], metric, row["component"], row["kind"], row["split"])
        steps = series.setdefault(key, {})
        if row["value"] is None:
            missing[key] = missing.get(key, 0) + 1
        else:
            steps.setdefault(row["step"], []).append(row["value"])
    narrow, alone = width < FULL_WIDTH, len({run for run, *_ in series}) == 1  # the name of the only run says nothing
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


def _course(steps: Mapping[int, Sequence[float]], width: int) -> tuple[str, str, str]:
    """The means at the first and the last step, and the means of all as a sparkline."""
    means = [sum(steps[step]) / len(steps[step]) for step in sorted(steps)]
    return (f"{means[0]:.4g}", f"{means[-1]:.4g}", sparkline(means, width)) if means else ("", "", "")


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
