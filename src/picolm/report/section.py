"""Sections, the parts of a report. Each is a registered function that takes the material and returns a section, or
None.

    @SECTIONS.add("notes")
    def notes(material: Material) -> Section | None:
        return Section("Notes", [html("<p>{}</p>", material.runs[0].name)])

A user's own function, outside of this package, is named on the command line: `--section my_lab.module:function`.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from picolm.registry import Registry

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from picolm.report.material import Material


def html(template: str, *values: object, **named: object) -> Markup:
    """Return HTML with the escaped values in place of `{}`. Only this and the page's templates put text into a page."""
    return Markup(template).format(*values, **named)


@dataclass
class Drawing:
    """A figure and its texts. code: the Python call that draws it alone. caption: what to look for."""

    figure: "go.Figure"
    code: str = ""
    caption: str = ""

    @property
    def title(self) -> str:
        """The title as plain text; the figure holds it as HTML."""
        return Markup(self.figure.layout.title.text or "Figure").striptags()

    @property
    def name(self) -> str:
        """A file name, from the title."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")[:80] or "figure"


@dataclass
class Sheet:
    """A table of any length that readers can sort, filter and save as CSV."""

    name: str
    frame: "pd.DataFrame"


@dataclass
class Section:
    """A heading and its content: drawings, sheets, and HTML made by `html` or a template. lead: a sentence below the
    heading.

    first: whether it is placed before all others.
    """

    title: str
    items: Sequence[Drawing | Sheet | Markup]
    lead: str = ""
    first: bool = False


SECTIONS: Registry[Callable[["Material"], Section | None]] = Registry("report section")


def described(figure: "go.Figure") -> str:
    """Return a description of a figure for readers who cannot see it: what its axes show, how many lines, the range of
    the values.
    """
    import numpy as np

    traces = [
        trace
        for trace in figure.data
        if trace.visible is not False and not {"band", "mark"} & (trace.meta or {}).keys()
    ]
    if not traces:
        return "Nothing is drawn."
    maps, lines = ([t for t in traces if (t.type == "heatmap") is wanted] for wanted in (True, False))
    values = np.concatenate(
        [np.asarray(t.z if t.type == "heatmap" else t.y, dtype=float).ravel() for t in [*maps, *lines]]
    )
    finite = values[np.isfinite(values)]
    parts = [f"Heatmap of {len(trace.y)} rows and {len(trace.x)} columns" for trace in maps[:1]]
    what = "; ".join([*parts, *([_lines(figure, lines)] if lines else [])])
    if not finite.size:
        return f"{what}; no finite values."
    gaps = f", {values.size - finite.size} missing or infinite" if values.size > finite.size else ""
    return f"{what}. {finite.size} values from {finite.min():.4g} to {finite.max():.4g}{gaps}."


def _lines(figure: "go.Figure", traces: Sequence[Any]) -> str:
    panels = [Markup(note.text).striptags() for note in figure.layout.annotations]
    across = figure.layout.xaxis.title.text or ""
    where = f" in {len(panels)} panels ({', '.join(panels)})" if panels else ""
    names = list(dict.fromkeys(Markup(trace.name or "").striptags() for trace in traces))
    return f"{len(traces)} lines over {across}{where}: {', '.join(names[:12])}" + (
        " and more" if len(names) > 12 else ""
    )
