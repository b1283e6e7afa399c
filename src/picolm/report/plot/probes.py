"""Readings of any probe over steps: of the whole model, by layer and head, and by bin."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from picolm.errors import PicoError
from picolm.report.plot.comparison import lines_of_groups
from picolm.report.plot.heatmaps import by_layer_and_step, cells, map_figure
from picolm.report.plot.metrics import EACH_HEAD, layer_lines
from picolm.report.plot.panels import Control, Panel, figure, line
from picolm.report.plot.readings import (
    chance_of,
    depth,
    natural,
    panels_of,
    read,
    reading,
    select_probe,
    terms,
    title_of,
    told,
    units_of,
)
from picolm.report.plot.series import by_step

FEW_BINS, MOST_BINS = 12, 64  # more than the first are a heatmap, and more than the last are not all shown
MOST_STEPS = 8  # lines of steps in one panel
COUNTS = ("positions", "tokens", "occurrences", "rows")  # units of readings that say how large a bin is


def probe(
    table: pd.DataFrame, name: str, options: str | None = None, *, groups: Mapping[str, str] | None = None
) -> go.Figure:
    """Return a figure of the readings of a probe that are of the whole model, a panel each.

    A run by itself has a band of 1.96 standard errors to both sides; a group of several runs (`groups`: run -> its group) is
    their mean with a 95 % interval (Student's t). A faint line is the chance level. Raises PicoError without such readings.
    """
    rows = read(select_probe(table, name, options))
    rows = rows[depth(rows) == "model"]
    if rows.empty:
        raise PicoError(f"{name} gives nothing of the whole model; see plot.probe_layers and plot.bins")
    found, left_out = _panels(rows, name), dict[str, None]()
    belongs = {run: (groups or {}).get(run, run) for run in rows["run"].unique()}
    traces = []
    for panel, (_, group) in enumerate(found):
        traces += [*lines_of_groups(group, belongs, panel, {}, left_out), *chance_line(group, panel)]
    note = " ".join(filter(None, [told(rows), *(f"{sentence}." for sentence in left_out)]))
    panels = [Panel(title, y=units_of(group)) for title, group in found]
    return figure(f"{title_of(rows, name)} over steps", traces, panels, log="xy", note=note, terms=terms(rows))


def _panels(rows: pd.DataFrame, name: str) -> list[tuple[str, pd.DataFrame]]:
    found = list(panels_of(rows))
    if not found:
        raise PicoError(f"{name}: the table compares all steps with each other; see plot.steps")
    return found


def chance_line(
    rows: pd.DataFrame, panel: int, shown: dict[str, int] | None = None, about: str = ""
) -> list[go.Scatter]:
    """Return the faint line of the chance level, where it is known and the same for all rows of a step."""
    known = chance_of(rows)
    made = [line(*known, "chance", panel=panel, shown=shown, dash="dot", about=about)] if known else []
    return [trace.update(mode="lines" if len(trace.x) > 1 else "markers") for trace in made]


def probe_layers(table: pd.DataFrame, name: str, options: str | None = None) -> go.Figure:
    """Return a figure of the readings of a probe that are of a layer or head, a panel each: lines are layers, as in `metric`.
    Raises PicoError if there are no such readings.
    """
    rows = _layered(table, name, options)
    found = _panels(rows, name)
    runs = list(dict.fromkeys(rows["run"]))
    traces = []
    for panel, (title, group) in enumerate(found):
        for place, run in enumerate(runs):
            own = group[group["run"] == run]
            traces += [*layer_lines(title, own, panel, {"run": place}), *chance_line(own, panel, {"run": place})]
    controls = [Control("run", "Run", runs), Control("heads", "Heads", EACH_HEAD if rows["head"].notna().any() else ())]
    panels = [Panel(title, y=units_of(group)) for title, group in found]
    title = f"{title_of(rows, name)} by layer"
    return figure(title, traces, panels, controls=controls, log="xy", note=told(rows), terms=terms(rows))


def probe_heatmap(table: pd.DataFrame, name: str, options: str | None = None) -> go.Figure:
    """Return a heatmap of the same readings, one at a time: layers or heads from bottom to top, steps from left to right.
    Raises PicoError if there is only one layer or one step.
    """
    rows = _layered(table, name, options)
    return by_layer_and_step(f"{title_of(rows, name)} by layer and step", panels_of(rows), told(rows), terms(rows))


def _layered(table: pd.DataFrame, name: str, options: str | None) -> pd.DataFrame:
    """Return the readings without bins that some layer has; with each, its value for the whole model."""
    rows = read(select_probe(table, name, options))
    rows = rows[depth(rows) != "bin"]
    rows = rows[rows["layer"].notna().groupby(rows["metric"]).transform("any")]
    if rows.empty:
        raise PicoError(f"{name} gives nothing of a layer; see plot.probe and plot.bins")
    return rows


def bins(
    table: pd.DataFrame, metric: str, options: str | None = None, *, groups: Mapping[str, str] | None = None
) -> go.Figure:
    """Return a figure of a reading by bin (of tokens, positions, parts): lines over steps for few bins, a heatmap for more.

    Of very many bins only some are shown, which the note below says. Readings of layers or heads by bin are a heatmap with a
    slider of the step. Several runs are shown one at a time, a group (run -> its group) as its mean with a 95 % interval.
    Raises PicoError if the reading has no bins.
    """
    rows = reading(table, metric, options)
    rows = rows[rows["bin"].fillna("") != ""]
    if rows.empty:
        raise PicoError(f"{metric} has no bins; see plot.probe and plot.probe_layers")
    shown, note = _shown_bins(rows, table)
    own = rows[rows["bin"].isin(set(shown))]
    note = " ".join(filter(None, [note, told(rows)]))
    if own["layer"].notna().any():
        return _bins_of_layers(own, shown, metric, note)
    if own["step"].nunique() == 1:
        return _bin_points(own, shown, metric, note)
    if len(shown) > FEW_BINS:
        return _bin_map(own, shown, metric, note)
    return _bin_lines(own, shown, metric, groups or {}, note)


def _shown_bins(rows: pd.DataFrame, table: pd.DataFrame) -> tuple[list[str], str]:
    """Return the bins to show in order, and a sentence on those that are not."""
    there = sorted(map(str, rows["bin"].unique()), key=natural)
    if len(there) <= MOST_BINS:
        return there, ""
    sizes = _sizes(rows, table)
    if sizes is None:
        return there[:MOST_BINS], f"The first {MOST_BINS} of {len(there):,} bins are shown; the table has all."
    most = sorted(sizes.reindex(there, fill_value=0).nlargest(MOST_BINS).index, key=natural)
    return most, f"The {MOST_BINS} largest of {len(there):,} bins are shown; the table has all."


def _sizes(rows: pd.DataFrame, table: pd.DataFrame) -> pd.Series | None:
    """Return how large the bins are, if another reading of the probe tells."""
    probe_name = str(rows["metric"].iloc[0]).rpartition(".")[0]
    beside = select_probe(table, probe_name, rows["options"].fillna("").iloc[0])
    counted = beside[beside["units"].isin(COUNTS) & (beside["bin"].fillna("") != "")]
    return counted.groupby("bin")["value"].mean() if len(counted) else None


def _bin_lines(rows: pd.DataFrame, shown: list[str], metric: str, groups: Mapping[str, str], note: str) -> go.Figure:
    belongs = {run: groups.get(run, run) for run in rows["run"].unique()}
    names, found = list(dict.fromkeys(belongs.values())), list(panels_of(rows))
    traces, left_out = [], dict[str, None]()
    for panel, (_, group) in enumerate(found):
        for place, name in enumerate(names):
            members = {run: name for run, other in belongs.items() if other == name}
            mine = group[group["run"].isin(members)]
            for number, label in enumerate(shown):
                of_bin = lines_of_groups(mine[mine["bin"] == label], members, panel, {"run": place}, left_out)
                traces += [_as_bin(trace, label, number / max(1, len(shown) - 1)) for trace in of_bin]
            traces += chance_line(mine, panel, {"run": place})
    controls = [Control("run", "Run", names)]
    panels = [Panel(title, y=units_of(group)) for title, group in found]
    title = f"{title_of(rows, metric)} over steps"
    note = " ".join(filter(None, [note, *(f"{sentence}." for sentence in left_out)]))
    return figure(title, traces, panels, controls=controls, log="xy", note=note, terms=terms(rows))


def _as_bin(trace: go.Scatter, name: str, place: float) -> go.Scatter:
    """Return a line of a run as the line of one of its bins. place: of the bin among all, from 0 to 1."""
    from picolm.report.look import colour, faded, label

    meaning = {"depth": place}
    shade = colour(meaning)
    trace.update(name=label(name), legendgroup=label(name), meta=trace.meta | {"colour": meaning})
    if trace.meta.get("band"):
        return trace.update(fillcolor=faded(shade, 0.18))
    hover = f"{label(name)}<br>{trace.hovertemplate}"
    return trace.update(line={"color": shade}, marker={"color": shade}, hovertemplate=hover)


def _bin_points(rows: pd.DataFrame, shown: list[str], metric: str, note: str) -> go.Figure:
    """Return the values of one step over bins, a line for each run."""
    found, traces = list(panels_of(rows)), []
    for panel, (_, group) in enumerate(found):
        for place, (run, own) in enumerate(group.groupby("run", sort=False)):
            by_bin = own.set_index("bin")["value"].reindex(shown)
            traces.append(line(shown, by_bin.to_numpy(dtype=float), str(run), panel=panel, meaning={"category": place}))
    panels = [Panel(title, y=units_of(group), x="bin") for title, group in found]
    title = f"{title_of(rows, metric)} at step {rows['step'].iloc[0]:,}"
    made = figure(title, traces, panels, height=340, note=note, terms=terms(rows))
    return made.update_xaxes(type="category")


def _bin_map(rows: pd.DataFrame, shown: list[str], metric: str, note: str) -> go.Figure:
    runs, found = list(dict.fromkeys(rows["run"])), list(panels_of(rows))
    steps = np.sort(rows["step"].unique())
    traces = []
    for place, (title, group) in enumerate(found):
        for number, run in enumerate(runs):
            own = dict(list(group[group["run"] == run].groupby("bin")))
            values = np.array(
                [by_step(own[name], steps) if name in own else np.full(len(steps), np.nan) for name in shown]
            )
            traces.append(cells(steps, shown, values, {"matter": place, "run": number}, about=title))
    controls = [Control("matter", "Of", [title for title, _ in found]), Control("run", "Run", runs)]
    title = f"{title_of(rows, metric)} by bin and step"
    return map_figure(title, traces, Panel("", y="bin"), controls, note, terms(rows))


def _bins_of_layers(rows: pd.DataFrame, shown: list[str], metric: str, note: str) -> go.Figure:
    """Return heatmaps of layers or heads by bin; a slider selects the step, and starts at the last one."""
    found = [
        (f"{run}: {title}" if rows["run"].nunique() > 1 else title, own)
        for title, group in panels_of(rows)
        for run, own in group.groupby("run", sort=False)
    ]
    steps = list(np.sort(rows["step"].unique()))
    traces = []
    for place, (_, group) in enumerate(found):
        names = _places(group)
        for number, step in enumerate(steps):
            own = group[group["step"] == step]
            if len(own):
                grid = own.assign(place=names[own.index]).pivot_table(index="place", columns="bin", values="value")
                grid = grid.reindex(index=list(dict.fromkeys(names)), columns=shown)
                values = grid.to_numpy(dtype=float)
                where = {"matter": place, "step": number}
                traces.append(cells(shown, grid.index, values, where, about=f"step {step}"))
    controls = [
        Control("matter", "Of", [title for title, _ in found]),
        Control("step", "Step", list(map(str, steps)), kind="slider", value=len(steps) - 1),
    ]
    panel = Panel("", y="layer", x="bin")
    return map_figure(f"{title_of(rows, metric)} by layer and bin", traces, panel, controls, note, terms(rows))


def _places(rows: pd.DataFrame) -> pd.Series:
    """Return the place in the model of each row in words, in the order of layers and heads."""
    own = rows.sort_values(["layer", "head"], kind="stable")
    words = [
        "model" if pd.isna(layer) else f"layer {layer}" if pd.isna(head) else f"layer {layer}, head {head}"
        for layer, head in zip(own["layer"], own["head"])
    ]
    return pd.Series(words, index=own.index)


def some(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most `most` of the items: the first, the last, and others at equal distances."""
    return list(items) if len(items) <= most else [items[round(n * (len(items) - 1) / (most - 1))] for n in range(most)]


def reliability(table: pd.DataFrame, options: str | None = None) -> go.Figure:
    """Return the reliability curve: accuracy by confidence of each bin of the probe `calibration`, a line for each step.
    Raises PicoError if the table has no such bins.
    """
    rows = {name: reading(table, f"calibration.bin_{name}", options) for name in ("accuracy", "confidence")}
    own = rows["accuracy"].merge(rows["confidence"], on=["run", "step", "split", "bin"], suffixes=("", "_x"))
    own = own[own["value"].notna() & own["value_x"].notna()].sort_values("value_x")
    runs, steps = list(dict.fromkeys(own["run"])), some(sorted(own["step"].unique()), MOST_STEPS)
    if not steps:
        raise PicoError("no bin of calibration has a position")
    traces = [
        line(
            mine["value_x"].to_numpy(), mine["value"].to_numpy(), f"step {step}", shown={"run": place},
            meaning={"depth": number / max(1, len(steps) - 1)},
        )
        for place, run in enumerate(runs)
        for number, step in enumerate(steps)
        for mine in [own[(own["run"] == run) & (own["step"] == step)]]
        if len(mine)
    ]  # fmt: skip
    traces.append(line(np.array([0.0, 1.0]), np.array([0.0, 1.0]), "confidence is accuracy", dash="dot"))
    panel = Panel("", y="accuracy", x="mean confidence of the bin")
    both = pd.concat(rows.values())
    return figure(
        title_of(both, "Reliability: calibration"), traces, [panel], controls=[Control("run", "Run", runs)], height=380,
        note=told(rows["accuracy"]), terms=terms(both),
    )  # fmt: skip
