"""The results of a suite: one analysis of all members, tables that compare them, and a report.

The tables have confidence intervals over seeds.
"""

import logging
import math
import os
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from picolm.analyze import table
from picolm.analyze.engine import analyze
from picolm.analyze.intervals import interval
from picolm.analyze.work import Outcome
from picolm.csvfile import csv_text, read
from picolm.report.material import Material, gather
from picolm.report.section import Section, Sheet
from picolm.store import Run
from picolm.store.files import disk_errors, write_atomically
from picolm.store.listing import BOUND
from picolm.suite.config import SEED, Member, Suite
from picolm.suite.convergence import by_group, figures
from picolm.train.job import Plan
from picolm.train.preview import parameter_count, tokens_in_all
from picolm.trusted import read_bytes

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger("picolm")

MEMBERS, COMPARED, REPORT = "members.csv", "comparison.csv", "report.html"
LOSSES = ("train/loss", "val/paloma/nats_per_token")
BOUNDS = (BOUND, "val/paloma_bound/bound_nats_per_token")
SECTION = "picolm.suite.comparison:section"


def analyze_members(suite: Suite, members: list[Member], workers: int = 1) -> tuple[Outcome | None, bool]:
    """Analyze the runs of `members`, and write the tables to the folder of the suite.

    Known values are not computed again. Return the outcome (None without an analysis), and whether any table or value
    is new.
    """
    folder = suite.config.folder
    described = describe(members)
    changed = _write(described, folder / MEMBERS)
    if suite.analysis is None:
        return None, changed
    outcome = analyze(suite.analysis, [str(member.path) for member in members], workers=workers)
    table.write(outcome.rows, folder / suite.analysis.analysis_name)
    compared = compare(described, planned(table.load(folder / suite.analysis.analysis_name), members))
    return outcome, _write(compared, folder / COMPARED) or changed or outcome.computed > 0


def planned(values: "pd.DataFrame", members: list[Member]) -> "pd.DataFrame":
    """Return the rows of planned steps: an interrupted run has one more step, which the others do not have."""
    steps = {member.name: set(Plan(member.config).saved_steps()) for member in members}
    kept = [step in steps.get(run, ()) for run, step in zip(values["run"], values["step"])]
    return values[kept]


def describe(members: list[Member]) -> "pd.DataFrame":
    """Return one row per member.

    Columns: its label on each axis, its group (all axes but the seed), parameters, tokens, and final losses.
    """
    import pandas as pd

    rows = []
    for member in members:
        run = Run.open(member.path)
        ends = {name: _last(run, name) for name in (*LOSSES, *BOUNDS)}
        if ends[BOUND] is not None:
            ends["train/loss"] = None  # it is the bound under another name
        group = "-".join(text for axis, text in member.labels.items() if axis != SEED) or "all"
        rows.append(
            {"run": member.name, "group": group}
            | member.labels
            | {"parameters": parameter_count(member.config), "tokens": tokens_in_all(member.config)}
            | ends
        )
    described = pd.DataFrame(rows)
    return described.drop(columns=[name for name in BOUNDS if name in described and described[name].isna().all()])


def compare(members: "pd.DataFrame", values: "pd.DataFrame") -> "pd.DataFrame":
    """Return a row per group and figure, with the mean over runs and its 95 % confidence interval (Student's t).

    Final losses come first, then the metrics. Bounds are figures of their own: no mean is over both.
    """
    import pandas as pd

    losses = []
    for group, rows in members.groupby("group", sort=False):
        for name in [name for name in (*LOSSES, *BOUNDS) if name in rows]:
            mean, low, high, n = interval(rows[name].dropna().tolist())
            losses.append(
                {"group": group, "figure": name, "mean": mean, "low": low, "high": high, "n": n, "of": len(rows)}
            )
    of_metrics = by_group(figures(values), dict(zip(members["run"], members["group"])))
    return pd.concat([pd.DataFrame(losses), of_metrics], ignore_index=True)


def write_report(suite: Suite, members: list[Member]) -> Path:
    """Write the report of all members, with the comparison of the suite first, and return its path."""
    from picolm.report.assembly import save

    folder = suite.config.folder
    analyses = [str(folder / suite.analysis.analysis_name)] if suite.analysis is not None else []
    own = [SECTION] if analyses else []
    material = gather([str(member.path) for member in members], analyses, own)
    material.title = suite.config.suite_name
    described = read(folder / MEMBERS, dtype=str)
    material.labels = dict(zip(described["run"], described["group"]))
    return save(material, folder / REPORT, own=own)


def section(material: Material) -> Section | None:
    """Return the section of a report that compares the groups of a suite; None without tables beside an analysis."""
    for analysis in material.analyses:
        folder = Path(analysis.place).parent
        if (folder / COMPARED).is_file() and (folder / MEMBERS).is_file():
            lead = (
                "Means over seeds with 95 % intervals (Student's t) of the final losses, and of what each metric gives over the "
                f"layers of a run. Steps are those that were saved. All digits are in {COMPARED}; curves follow below."
            )
            sheets = [
                Sheet("Side by side", side_by_side(read(folder / COMPARED))),
                Sheet("Runs", read(folder / MEMBERS)),
            ]
            return Section("The suite", sheets, lead, first=True)
    return None


def side_by_side(compared: "pd.DataFrame") -> "pd.DataFrame":
    """Return a row per figure and its subject, and a column per group: `0.694 ± 0.040`.

    A cell also gives the number of runs with a value when some have none.
    """
    import pandas as pd

    what = ["metric", "options", "component", "kind", "split"]
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for row in compared.to_dict("records"):
        target = row.get("target")
        against = f"with {target}" if isinstance(target, str) and target not in ("last", "same") else ""
        of = " ".join(filter(None, [*(row[name] for name in what if isinstance(row.get(name), str)), against]))
        rows.setdefault((of or "loss", row["figure"]), {})[str(row["group"])] = _with_interval(row)
    matters = list(dict.fromkeys(of for of, _ in rows))
    ordered = sorted(rows.items(), key=lambda entry: matters.index(entry[0][0]))
    return pd.DataFrame([{"of": of, "figure": figure} | groups for (of, figure), groups in ordered])


def _with_interval(row: Mapping[Hashable, Any]) -> str:
    mean, half = row["mean"], row["high"] - row["mean"]
    if not row["n"]:
        return f"none of {row['of']}"
    places = ".3f" if abs(mean) >= 0.1 else ".3g"
    interval = "" if math.isnan(half) else f" ± {half:{places}}"
    return f"{mean:{places}}{interval}" + (f" ({row['n']} of {row['of']})" if row["n"] < row["of"] else "")


def _last(run: Run, name: str) -> Any:
    values = [entry[name] for entry in run.read_metrics((name,)) if name in entry]
    return values[-1] if values else None


def _write(frame: "pd.DataFrame", path: Path) -> bool:
    """Write a table, unless the file has this content already; return whether it was written."""
    data = csv_text(frame).encode()
    if os.path.lexists(path) and read_bytes(path) == data:
        return False
    with disk_errors("a table of the suite", path):
        write_atomically(path, data)
    return True
