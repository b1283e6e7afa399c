"""Compare runs: a line for each group of runs, with a confidence interval of the mean if a group has several."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from picolm.analyze.intervals import aggregate
from picolm.errors import PicoError
from picolm.report.plot.panels import Control, Panel, band, figure, line
from picolm.report.plot.readings import terms
from picolm.report.plot.series import gaps, matters, named, of_probes, select

MOST_LAYERS = 12  # layers that readers can choose one by one
NORMAL_975 = 1.96  # the 97.5 % point of the normal distribution


def compare(
    table: pd.DataFrame, name: str, options: str | None = None, *, groups: Mapping[str, str] | None = None
) -> go.Figure:
    """Return a figure of a metric over steps that compares runs: the mean over layers and heads, or one layer at a
    time.

    groups: run -> its group (seeds of one configuration); a group of several runs is drawn as their mean with a 95 %
    confidence interval (Student's t), by `picolm.analyze.aggregate`. Default: each run by itself. Raises PicoError for
    fewer than two runs.
    """
    rows = select(table, name, options)
    runs = list(rows["run"].unique())
    if len(runs) < 2:
        raise PicoError("a comparison needs a table of several runs")
    belongs = {run: (groups or {}).get(run, run) for run in runs}
    found = list(matters(rows))
    depths = sorted({int(layer) for _, group in found for layer in group["layer"].dropna().unique()})[:MOST_LAYERS]
    choices = ["mean of layers", *(f"layer {layer}" for layer in depths)] if len(depths) > 1 else []
    traces: list[go.Scatter] = []
    left_out: dict[str, None] = {}
    for panel, (_, group) in enumerate(found):
        for place, layer in enumerate([None, *(depths if choices and group["layer"].notna().any() else [])]):
            chosen = _per_run(group if layer is None else group[group["layer"] == layer])
            fixed = group["layer"].isna().all() or not choices
            traces += lines_of_groups(chosen, belongs, panel, {} if fixed else {"layer": place}, left_out)
    title = named(name, rows["options"].iloc[0] or "")
    panels = [Panel(matter.title, y=title) for matter, _ in found]
    control = Control("layer", "Layer", choices)
    note = " ".join(filter(None, [gaps(rows), *(f"{sentence}." for sentence in left_out)]))
    about = terms(rows) if of_probes(rows).all() else ()
    return figure(
        f"{title}, run by run", traces, panels, controls=[control], log="xy", shared_y=True, note=note, terms=about
    )


def _per_run(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row per run and step: the mean over layers and heads of the finite values.

    Of no rows, as of a layer that only another part of a deeper model has, it is empty.
    """
    finite = rows[np.isfinite(rows["value"].to_numpy(dtype=float))]
    means = finite.groupby(["run", "step"], as_index=False)["value"].mean()
    if rows.empty:
        return means
    keep = [column for column in rows.columns if column not in ("run", "step", "value")]
    one = rows.iloc[[0]][keep].assign(
        layer=pd.NA, head=pd.NA, against_step=pd.NA, module="", against_run="", reason="", standard_error=math.nan
    )
    return means.merge(one, how="cross")


def lines_of_groups(
    rows: pd.DataFrame, belongs: Mapping[str, str], panel: int, shown: dict[str, int], left_out: dict[str, None]
) -> list[go.Scatter]:
    """Return a line for each group of runs, from one row per run and step.

    A group of several runs has the 95 % interval of its mean; a run by itself the interval of its own standard errors, where it
    has some. left_out: where sentences on steps that not all runs of a group have are added.
    """
    names = list(dict.fromkeys(belongs.values()))
    traces: list[go.Scatter] = []
    for number, name in enumerate(names):
        members = [run for run, group in belongs.items() if group == name]
        own = rows[rows["run"].isin(members)].drop(
            columns=["part", "against", "of_layers", "of_steps"], errors="ignore"
        )
        if own.empty:
            continue
        style: dict[str, Any] = {"panel": panel, "meaning": {"category": number}, "shown": shown}
        traces += one_run(own, name, **style) if len(members) == 1 else _mean(own, name, members, left_out, **style)
    return traces


def one_run(rows: pd.DataFrame, name: str, about: str = "", **style: Any) -> list[go.Scatter]:
    """Return the line of one run, with a band of 1.96 standard errors to both sides where they are known.

    style: panel, meaning and shown, as of `line`.
    """
    own = rows.sort_values("step")
    at, values = own["step"].to_numpy(), own["value"].to_numpy(dtype=float)
    half = NORMAL_975 * own["standard_error"].to_numpy(dtype=float)
    around = [band(at, values - half, values + half, group=name, **style)] if np.isfinite(half).any() else []
    return [*around, line(at, values, name, about=about, **style)]


def _mean(
    rows: pd.DataFrame, name: str, members: list[str], left_out: dict[str, None], **style: Any
) -> list[go.Scatter]:
    mean = aggregate(rows, dict.fromkeys(members, name)).sort_values("step")
    left_out |= dict.fromkeys(mean.attrs["left_out"])
    at, values = mean["step"].to_numpy(), mean["mean"].to_numpy(dtype=float)
    low, high = (mean[column].to_numpy(dtype=float) for column in ("low", "high"))
    words = f"{name}, mean of {len(members)} runs"
    return [band(at, low, high, group=name, **style), line(at, values, name, about=words, **style)]
