"""Figures with several panels, and what readers can change in them.

`layout.meta` of a figure lists what the page offers: `panels` (how many, how high), `log` (axes that can be
logarithmic), `controls` (choices, each with a key). `meta` of a trace states what its colour means and for which
choices it is shown.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from picolm.report.look import colour, faded, label, template

COLUMNS = 3
WIDTH, HEIGHT = 1000, 250  # of a figure, and of one row of panels, in pixels
TITLE, LEGEND_ROW, PANEL_TITLE, BOTTOM, SIDES = 40, 20, 48, 52, 76  # heights above and below the panels; both margins
MARKED = {"category": 1}  # the colour of marks
GAP_X, GAP_Y = 66, 86  # between panels: tick labels of the right one; tick labels above, title below


@dataclass(frozen=True)
class Panel:
    """One panel of a figure: its title, and the titles of its axes, with units."""

    title: str
    y: str = ""
    x: str = "step (updates)"


@dataclass(frozen=True)
class Control:
    """A choice for readers, or a slider if the options are ordered numbers. y: title of the y axis for each option."""

    key: str
    label: str
    options: Sequence[str]
    kind: str = "choice"
    value: int = 0
    y: Sequence[str] = ()

    def plain(self) -> dict[str, Any]:
        made = {
            "key": self.key,
            "label": self.label,
            "options": list(self.options),
            "kind": self.kind,
            "value": self.value,
        }
        return made | ({"y": [label(title) for title in self.y]} if self.y else {})


def suffix(index: int) -> str:
    """Return the number of an axis as plotly writes it: "", "2", "3", …"""
    return "" if index == 0 else str(index + 1)


def figure(
    title: str,
    traces: Iterable[go.Scatter | go.Heatmap],
    panels: Sequence[Panel],
    *,
    controls: Iterable[Control] = (),
    log: str = "",
    logged: str = "",
    height: int = HEIGHT,
    shared_y: bool = False,
    note: str = "",
    terms: Sequence[tuple[str, str]] = (),
    **layout: Any,
) -> go.Figure:
    """Return a figure of traces in panels, three in a row, with each control at its initial value.

    log: which of "x", "y" can be logarithmic; logged: which of these are at first. shared_y: all panels have the same y
    title; only the left ones show it. note: text below the figure, such as how many values are missing. terms: (name, what
    it is) of what is drawn.
    """
    offered = [control.plain() for control in controls if len(control.options) > 1]
    made = go.Figure(list(traces))
    show(made, {control["key"]: control["value"] for control in offered})
    made.update_layout(template=template(), title_text=f"<b>{label(title)}</b>", **layout)
    meta = {"panels": len(panels), "row": height, "controls": offered, "log": log, "sharedY": shared_y, "note": note}
    meta |= {"logged": logged} if logged else {}
    meta |= {"terms": [list(term) for term in terms]} if terms else {}
    made.update_layout(meta=meta, showlegend=sum(bool(trace.showlegend) for trace in made.data) > 1)
    for index, panel in enumerate(panels):
        n = suffix(index)
        made.update_layout({f"xaxis{n}": {"anchor": f"y{n}", "title": {"text": label(panel.x)}}})
        # Around values that are all the same the axis would go from one below to one above, whatever their size.
        constant = _constant(made, n)
        mode = "normal" if constant is None else "tozero" if constant else "nonnegative"
        made.update_layout({f"yaxis{n}": {"anchor": f"x{n}", "title": {"text": label(panel.y)}, "rangemode": mode}})
        if panel.title:
            made.add_annotation(
                text=f"<b>{label(panel.title)}</b>", xref=f"x{n} domain", yref=f"y{n} domain",
                x=0, y=1, xanchor="left", yanchor="bottom", yshift=6, showarrow=False,
            )  # fmt: skip
    for axis in logged:
        made.update_layout({f"{axis}axis{suffix(index)}": {"type": "log"} for index in range(len(panels))})
    return arrange(made, COLUMNS)


def _constant(made: go.Figure, panel: str) -> float | None:
    """Return the one finite value at which all lines of a panel stay; None if there is no such value."""
    lines = [
        trace
        for trace in made.data
        if trace.type == "scatter" and (trace.yaxis or "y") == f"y{panel}" and not trace.meta.get("mark")
    ]
    values = {float(value) for trace in lines for value in (() if trace.y is None else trace.y) if value is not None}
    values = {value for value in values if not math.isnan(value)}
    return value if len(values) == 1 and math.isfinite(value := next(iter(values))) else None


def show(made: go.Figure, chosen: dict[str, int]) -> None:
    """Show the traces of the chosen options; each group of lines has one entry in the legend (`show` in figures.js)."""
    named: set[str] = set()
    for trace in made.data:
        trace.visible = all(chosen.get(key, option) == option for key, option in trace.meta["shown"].items())
        if trace.type == "scatter" and not trace.meta.get("quiet"):
            trace.showlegend = trace.visible and trace.legendgroup not in named
            named |= {trace.legendgroup} if trace.visible else set()


def arrange(made: go.Figure, columns: int, width: int = WIDTH) -> go.Figure:
    """Arrange the panels in a grid of `columns`, and return the figure; the page does so for its own width (`arrange` in
    figures.js).
    """
    count, row = made.layout.meta["panels"], _row_height(made)
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    inner_width, inner_height = width - SIDES, rows * row + (rows - 1) * GAP_Y
    cell = (inner_width - (columns - 1) * GAP_X) / columns
    for index in range(count):
        left, top = (index % columns) * (cell + GAP_X), (index // columns) * (row + GAP_Y)
        domain_x = [left / inner_width, (left + cell) / inner_width]
        domain_y = [1 - (top + row) / inner_height, 1 - top / inner_height]
        made.update_layout({f"xaxis{suffix(index)}.domain": [min(1, round(at, 6)) for at in domain_x]})
        made.update_layout({f"yaxis{suffix(index)}.domain": [max(0, round(at, 6)) for at in domain_y]})
        if made.layout.meta["sharedY"] and index % columns:
            made.update_layout({f"yaxis{suffix(index)}.title.text": ""})
    for trace in made.data if count > 1 else ():
        if trace.type == "heatmap":  # its colour bar stands beside its panel
            n = (trace.yaxis or "y")[1:]
            across, up = made.layout[f"xaxis{n}"].domain, made.layout[f"yaxis{n}"].domain
            trace.update(colorbar={"x": across[1], "y": sum(up) / 2, "len": up[1] - up[0]})
    for note in made.layout.annotations:
        note.text = fit(note.text, cell)
    entry, lines = _legend(made, width)
    top = TITLE + lines * LEGEND_ROW + (PANEL_TITLE if made.layout.annotations else 8)
    made.update_layout(legend={"entrywidth": entry, "y": 1 - TITLE / (inner_height + top + BOTTOM)})
    return made.update_layout(width=width, height=inner_height + top + BOTTOM, margin={"t": top, "b": BOTTOM})


def _row_height(made: go.Figure) -> int:
    """Return the height of a panel in pixels; a heatmap is as high as its rows need."""
    drawn = [len(trace.y) for trace in made.data if trace.type == "heatmap" and trace.visible]
    return min(680, max(220, 22 * max(drawn) + 40)) if drawn else made.layout.meta["row"]


def fit(title: str, width: float) -> str:
    """Return a title, on two lines if it is too long for one."""
    if len(title) * 6.6 <= width + 46 or " · " not in title:  # 46: the tags around it
        return title
    first, _, last = title.rpartition(" · ")
    return f"{first}<br>{last}"


def _legend(made: go.Figure, width: int) -> tuple[int, int]:
    """Return the width of an entry of the legend in pixels, and the number of lines of the legend."""
    names = [trace.name for trace in made.data if trace.showlegend]
    entry = 8 + round(6.4 * max(map(len, names), default=0))
    return entry, math.ceil(len(names) / max(1, (width - SIDES) // (entry + 46))) if len(names) > 1 else 0


def line(
    x: Any,
    y: Any,
    name: str,
    *,
    panel: int = 0,
    meaning: dict[str, Any] | None = None,
    shown: dict[str, int] | None = None,
    about: str = "",
    dash: str = "solid",
    quiet: bool = False,
) -> go.Scatter:
    """Return a line with gaps where values are missing; hovering shows the exact value, since plotly rounds `%{y}`.

    name: lines of one name share an entry in the legend. shown: for each control, the option for which the line is
    drawn. about: hover text before x and value. quiet: no entry in the legend.
    """
    text = f"{label(about or name)}<br>%{{x}}: <b>%{{customdata}}</b><extra></extra>"
    shade = colour(meaning)
    return go.Scatter(
        x=x, y=y, customdata=y, name=label(name), mode="lines+markers" if len(x) <= 60 else "lines",
        line={"width": 1.8, "dash": dash, "color": shade}, marker={"size": 4, "color": shade},
        connectgaps=False, hovertemplate=text, xaxis=f"x{suffix(panel)}", yaxis=f"y{suffix(panel)}", legendgroup=label(name),
        meta={"colour": meaning, "shown": shown or {}, "quiet": quiet}, showlegend=False,
    )  # fmt: skip


def mark(
    x: Any, y: Any, name: str, panel: int, shown: dict[str, int], meaning: dict[str, Any] | None = None
) -> go.Scatter:
    """Return a dotted line that marks a place in a panel; it holds no values."""
    made = line(x, y, name, panel=panel, meaning=meaning or MARKED, shown=shown, dash="dot")
    return made.update(
        mode="lines", hoverinfo="skip", hovertemplate=None, customdata=None, meta=made.meta | {"mark": True}
    )


def spot(
    x: Any, y: Any, name: str, *, panel: int = 0, shown: dict[str, int], about: str, meaning: Any = None
) -> go.Scatter:
    """Return points that mark places on lines."""
    made = line(x, y, name, panel=panel, meaning=meaning or MARKED, shown=shown, about=about)
    marker = {"symbol": "diamond", "size": 11, "line": {"width": 1.5}}
    return made.update(mode="markers", marker=marker, meta=made.meta | {"mark": True})


def band(
    x: Any, low: Any, high: Any, *, panel: int, meaning: dict[str, Any], shown: dict[str, int], group: str
) -> go.Scatter:
    """Return the area between two lines, where both have values."""
    import numpy as np

    there = np.isfinite(low) & np.isfinite(high)
    around = np.concatenate([np.asarray(x)[there], np.asarray(x)[there][::-1]])
    edge = np.concatenate([np.asarray(high)[there], np.asarray(low)[there][::-1]])
    return go.Scatter(
        x=around, y=edge, fill="toself", fillcolor=faded(colour(meaning), 0.18), mode="lines", line={"width": 0},
        hoverinfo="skip", showlegend=False, legendgroup=label(group),
        xaxis=f"x{suffix(panel)}", yaxis=f"y{suffix(panel)}",
        meta={"colour": meaning, "shown": shown, "quiet": True, "band": True},
    )  # fmt: skip
