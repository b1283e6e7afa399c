"""Section: heatmaps of layer or head by step, layer by layer, step by step."""

from contextlib import suppress

from picolm.errors import PicoError
from picolm.report import plot
from picolm.report.material import Material
from picolm.report.plot.series import metrics as metrics_of
from picolm.report.section import SECTIONS, Drawing, Section
from picolm.report.sections.metrics import call, summary

PAIRS = (("layers", plot.layers), ("steps", plot.steps))


@SECTIONS.add("heatmaps")
def heatmaps(material: Material) -> Section | None:
    """Return all heatmaps for which the tables have values."""
    drawings = []
    for analysis in material.analyses:
        with suppress(PicoError):  # there is only one layer, or one step
            made = plot.heatmap(analysis.table)
            drawings.append(Drawing(made, f"plot.heatmap(load({analysis.place!r}))"))
        for metric, options in metrics_of(analysis.table):
            for function, make in PAIRS:
                with suppress(PicoError):  # the table compares nothing of this kind
                    made = make(analysis.table, metric, options)
                    drawings.append(Drawing(made, call(function, analysis, metric, options), summary(metric)))
    lead = "Where in the model, and when. Cells are equally wide whatever lies between the steps; empty cells are missing values."
    return Section("Heatmaps", drawings, lead) if drawings else None
