"""Heatmaps: layer or head by step, layer by layer of two runs or steps, step by step."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from picolm.errors import PicoError
from picolm.report.look import label
from picolm.report.plot.panels import Control, Panel, figure
from picolm.report.plot.readings import terms
from picolm.report.plot.series import by_step, gaps, matters, metrics, named, of_probes, pairs, select


def heatmap(table: pd.DataFrame, name: str | None = None, options: str | None = None) -> go.Figure:
    """Return a heatmap with layers or heads from bottom to top and steps from left to right, one matrix at a time.
    Without `name` readers can choose any metric. Raises PicoError if there is only one layer or one step.
    """
    wanted = [(name, options)] if name is not None else metrics(table)
    rows = [select(table, *one) for one in wanted]
    titled = [pair for own in rows for pair in _titled(own, alone=name is not None)]
    title = "Every metric" if name is None else named(name, rows[0]["options"].iloc[0] or "")
    note = " ".join(filter(None, map(gaps, rows))) if name is not None else ""
    return by_layer_and_step(f"{title} by layer and step", titled, note=note)


def by_layer_and_step(
    title: str, titled: Iterable[tuple[str, pd.DataFrame]], note: str = "", about: Sequence[tuple[str, str]] = ()
) -> go.Figure:
    """Return a heatmap with layers or heads from bottom to top and steps from left to right, of one group of rows at a time.
    Raises PicoError if there is none that has several layers and several steps.
    """
    layered = [
        (words, own)
        for words, group in titled
        for own in [group.dropna(subset="layer")]
        if own["layer"].nunique() > 1 and own["step"].nunique() > 1
    ]
    if not layered:
        raise PicoError("a heatmap needs several layers and several steps")
    runs = list(dict.fromkeys(run for _, group in layered for run in group["run"].unique()))
    traces = [
        trace
        for place, (_, group) in enumerate(layered)
        for number, run in enumerate(runs)
        if len(own := group[group["run"] == run])
        for trace in _by_step(own, {"matter": place, "run": number})
    ]
    headed = any(group["head"].notna().any() for _, group in layered)
    controls = [
        Control("matter", "Of", [words for words, _ in layered]),
        Control("run", "Run", runs),
        Control("heads", "Heads", ("mean of heads", "each head") if headed else ()),
    ]
    return map_figure(title, traces, Panel("", y="layer"), controls, note, about)


def _titled(rows: pd.DataFrame, alone: bool) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the matrices of a metric with their titles, which include its name unless `alone`."""
    before = "" if alone else named(rows["metric"].iloc[0], rows["options"].iloc[0] or "") + " · "
    for matter, group in matters(rows):
        yield before + matter.title, group


def layers(table: pd.DataFrame, name: str, options: str | None = None) -> go.Figure:
    """Return heatmaps of a metric between all layers, of two runs or of one run at two steps; a slider selects the
    step.
    """
    rows, missing = select(table, name, options), "a layer with several; target: {layer: all} does"
    return _squares(rows, name, "layer", "step", missing)


def steps(table: pd.DataFrame, name: str, options: str | None = None) -> go.Figure:
    """Return heatmaps of a metric between all steps of the same layer; a slider selects the layer."""
    rows, missing = select(table, name, options), "all steps; target: {checkpoint: all} does"
    return _squares(rows, name, "step", "layer", missing)


def _squares(rows: pd.DataFrame, name: str, axis: str, slider: str, missing: str) -> go.Figure:
    """Return heatmaps of `axis` by itself, one for each value of `slider`. missing: what the table lacks, for the
    error.
    """
    found = list(pairs(rows, f"{axis}s"))
    if not found:
        raise PicoError(f"{name}: nothing in the table compares {missing}")
    stops = sorted({stop for _, group in found for stop in group[slider].dropna().unique()}) or [None]  # of no layer
    titles, traces = [], []
    for place, (matter, group) in enumerate(found):
        titles.append(f"{group['run'].iloc[0]}: {matter.title}")
        for number, stop in enumerate(stops):
            own = group if stop is None else group[group[slider] == stop]
            if len(own):
                shown = {"matter": place, slider: number}
                about = "" if stop is None else f"{slider} {stop}"
                traces.append(_square(own, axis, f"against_{axis}", shown, about=about))
    controls = [
        Control("matter", "Of", titles),
        Control(slider, slider.capitalize(), list(map(str, stops)), kind="slider"),
    ]
    title = named(name, rows["options"].iloc[0] or "")
    panel = Panel("", y=axis, x=f"{axis} compared with")
    meant = terms(rows) if of_probes(rows).all() else ()
    return map_figure(f"{title} between {axis}s", traces, panel, controls, gaps(rows), meant)


def _by_step(rows: pd.DataFrame, shown: dict[str, int]) -> list[go.Heatmap]:
    at = np.sort(rows["step"].unique())
    heads = rows["head"].notna().any()
    depths = sorted(rows["layer"].unique())
    mean = np.array([by_step(rows[rows["layer"] == layer], at) for layer in depths])
    names = [f"layer {layer}" for layer in depths]
    made = [cells(at, names, mean, shown | ({"heads": 0} if heads else {}))]
    if heads:
        each = [
            (f"layer {layer}, head {head}", own) for (layer, head), own in rows.groupby(["layer", "head"], sort=True)
        ]
        values = np.array([by_step(own, at) for _, own in each])
        made.append(cells(at, [words for words, _ in each], values, shown | {"heads": 1}))
    return made


def _square(rows: pd.DataFrame, down: str, across: str, shown: dict[str, int], about: str) -> go.Heatmap:
    """Return a heatmap of rows against columns; the mean over heads if there are several."""
    finite = rows[np.isfinite(rows["value"].to_numpy(dtype=float))]
    grid = finite.pivot_table(index=down, columns=across, values="value", aggfunc="mean", sort=True)
    grid = grid.reindex(index=sorted(rows[down].unique()), columns=sorted(rows[across].unique()))
    return cells(grid.columns, grid.index, grid.to_numpy(dtype=float), shown, about)


def cells(x: Any, y: Any, values: np.ndarray, shown: dict[str, int], about: str = "") -> go.Heatmap:
    """Return a heatmap with categories on both axes, so that unevenly spaced steps get cells of equal width. Empty
    cells are missing values.
    """
    text = f"{label(about)}<br>%{{y}} · %{{x}}: <b>%{{customdata}}</b><extra></extra>"
    return go.Heatmap(
        x=[str(at) for at in x], y=[str(at) for at in y], z=values, customdata=values, colorscale="Cividis", hoverongaps=False,
        colorbar={"thickness": 14, "outlinewidth": 0, "tickfont": {"size": 11}},
        hovertemplate=text.removeprefix("<br>"), xgap=1, ygap=1 if len(y) <= 40 else 0, meta={"shown": shown},
    )  # fmt: skip


def map_figure(
    title: str,
    traces: list[go.Heatmap],
    panel: Panel,
    controls: list[Control],
    note: str,
    about: Sequence[tuple[str, str]] = (),
) -> go.Figure:
    """Return a figure of one panel that shows one of several heatmaps. about: see `terms` of `figure`."""
    _same_scale(traces)
    made = figure(title, traces, [panel], controls=controls, note=note, terms=about)
    return made.update_xaxes(type="category", showgrid=False).update_yaxes(type="category", showgrid=False)


def _same_scale(traces: list[go.Heatmap]) -> None:
    """Set one colour range for all heatmaps of a matrix, so that the slider shows change."""
    ranges: dict[int, list[float]] = {}
    for trace in traces:
        values = np.asarray(trace.z, dtype=float)
        ranges.setdefault(trace.meta["shown"]["matter"], []).extend(values[np.isfinite(values)])
    for trace in traces:
        if finite := ranges[trace.meta["shown"]["matter"]]:
            trace.update(zmin=min(finite), zmax=max(finite) if any(finite) else 1)  # nothing but zeros is dark
