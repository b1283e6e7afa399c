"""Metrics over steps: one line per layer, coloured by depth; one panel per matrix."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from picolm.errors import PicoError
from picolm.report.plot.panels import Control, Panel, figure, line
from picolm.report.plot.series import by_step, gaps, matters, named, select

EACH_HEAD = ("mean of heads", "each head")


def metric(table: pd.DataFrame, name: str, options: str | None = None) -> go.Figure:
    """Return a figure of a metric over steps: lines are layers, panels are matrices. Raises PicoError if the table has
    no such metric.

    table: as `picolm.analyze.load` returns it. options: which ones, if the table has the metric with several.
    """
    rows = select(table, name, options)
    title = named(name, rows["options"].iloc[0] or "")
    found = list(matters(rows))
    if not found:
        raise PicoError(
            f"{name}: the table compares all layers or all steps with each other; see plot.layers and plot.steps"
        )
    runs = list(dict.fromkeys(run for _, group in found for run in group["run"].unique()))
    traces = [
        trace
        for panel, (matter, group) in enumerate(found)
        for place, run in enumerate(runs)
        for trace in layer_lines(matter.title, group[group["run"] == run], panel, {"run": place})
    ]
    headed = any(group["head"].notna().any() for _, group in found)
    return figure(
        f"{title} over steps",
        traces,
        [Panel(matter.title, y=title) for matter, _ in found],
        controls=[Control("run", "Run", runs), Control("heads", "Heads", EACH_HEAD if headed else ())],
        log="xy",
        shared_y=True,
        note=gaps(rows),
    )


def layer_lines(title: str, group: pd.DataFrame, panel: int, shown: dict[str, int]) -> list[go.Scatter]:
    """Return a line for each layer of one run, coloured by depth: the mean over heads, and each head. title: of the panel."""
    steps = np.sort(group["step"].unique())
    last = max(1, int(group["layer"].max())) if group["layer"].notna().any() else 1
    traces = []
    for layer, rows in group.groupby("layer", dropna=False, sort=True):
        name = "whole model" if pd.isna(layer) else f"layer {layer}"
        meaning: dict[str, Any] | None = None if pd.isna(layer) else {"depth": float(layer) / last}
        heads = rows["head"].notna().any()
        words = f"{name}, mean of {rows['head'].nunique()} heads" if heads else name
        choice = shown | {"heads": 0} if heads else shown
        values = by_step(rows, steps)
        style: dict[str, Any] = {"panel": panel, "meaning": meaning}
        traces.append(line(steps, values, name, shown=choice, about=f"{words}\n{title}", **style))
        for head, own in rows.groupby("head", sort=True) if heads else ():
            about = f"{name}, head {head}\n{title}"
            traces.append(line(steps, by_step(own, steps), name, shown=shown | {"heads": 1}, about=about, **style))
    return traces
