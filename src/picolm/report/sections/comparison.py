"""Section: comparison of several runs."""

from picolm.report import plot
from picolm.report.material import Material
from picolm.report.plot.series import matters, select
from picolm.report.plot.series import metrics as metrics_of
from picolm.report.section import SECTIONS, Drawing, Section
from picolm.report.sections.metrics import call, summary


@SECTIONS.add("comparison")
def comparison(material: Material) -> Section | None:
    """Return a figure per metric: a line per group of runs, with a confidence interval if it has several seeds."""
    drawings = []
    for analysis in material.analyses:
        if analysis.table["run"].nunique() < 2:
            continue
        for metric, options in metrics_of(analysis.table):
            if any(True for _ in matters(select(analysis.table, metric, options))):
                made = plot.compare(analysis.table, metric, options, groups=material.groups)
                drawings.append(Drawing(made, call("compare", analysis, metric, options), summary(metric)))
    lead = (
        "The mean over layers and heads of each run, or one layer at a time. Runs that differ only in their seeds are one line: "
        "their mean, with a 95 % interval (Student's t)."
    )
    return Section("Runs side by side", drawings, lead) if drawings else None
