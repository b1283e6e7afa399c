"""Layer or head by step, layer by layer, step by step."""

from picolm.errors import PicoError
from picolm.report import plot
from picolm.report.material import Material
from picolm.report.plot.series import metrics as metrics_of
from picolm.report.section import SECTIONS, Drawing, Section
from picolm.report.sections.metrics import call, summary

KINDS = (("layers", plot.layers), ("steps", plot.steps), ("heatmap", plot.heatmap))


@SECTIONS.add("heatmaps")
def heatmaps(material: Material) -> Section | None:
    """Every heatmap that the tables have the values for."""
    drawings = []
    for analysis in material.analyses:
        for metric, options in metrics_of(analysis.table):
            for function, make in KINDS:
                try:
                    made = make(analysis.table, metric, options)
                except PicoError:
                    continue  # the table compares nothing of this kind
                drawings.append(Drawing(made, call(function, analysis, metric, options), summary(metric)))
    lead = "Where in the model, and when. Cells are equally wide whatever lies between the steps."
    return Section("Heatmaps", drawings, lead) if drawings else None
