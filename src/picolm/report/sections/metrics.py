"""Section: each metric of an analysis over steps."""

from collections.abc import Iterator

from picolm.analyze.metrics import METRICS
from picolm.errors import PicoError
from picolm.report import plot
from picolm.report.material import Analysis, Material
from picolm.report.plot.series import metrics as metrics_of
from picolm.report.section import SECTIONS, Drawing, Section


def summary(metric: str) -> str:
    """Return the summary of a metric, from its docstring."""
    return METRICS.get(metric).summary if metric in METRICS else ""


def call(function: str, analysis: Analysis, metric: str, options: str) -> str:
    """Return the Python call that draws a figure alone."""
    return f"plot.{function}(load({analysis.place!r}), {metric!r}" + (f", {options!r})" if options else ")")


@SECTIONS.add("metrics")
def metrics(material: Material) -> Section | None:
    """Return a figure per metric: lines are layers, panels are matrices."""
    drawings = list(_drawings(material))
    lead = "One line per layer, dark to bright from the first to the last; one panel per matrix."
    return Section("Metrics over steps", drawings, lead) if drawings else None


def _drawings(material: Material) -> Iterator[Drawing]:
    for analysis in material.analyses:
        for metric, options in metrics_of(analysis.table):
            try:
                made = plot.metric(analysis.table, metric, options)
            except PicoError:
                continue  # all rows compare layers or steps with each other: see the heatmaps
            yield Drawing(made, call("metric", analysis, metric, options), summary(metric))
