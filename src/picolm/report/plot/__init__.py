"""Functions from a table to a figure, for notebooks and for the report.

They take the long table of an analysis (`picolm.analyze.load`) or the log of runs (`log_table`) and return a plotly
figure. `figure.layout.meta` lists what readers can change in it.
"""

from picolm.report.plot.behaviour import acquisition, canaries, induction, memorization, ngrams, phase_change
from picolm.report.plot.comparison import compare
from picolm.report.plot.heatmaps import heatmap, layers, steps
from picolm.report.plot.landscape import interpolation, sharpness
from picolm.report.plot.metrics import metric
from picolm.report.plot.probes import bins, probe, probe_heatmap, probe_layers, reliability
from picolm.report.plot.tasks import tasks
from picolm.report.plot.training import log_table, loss, training

__all__ = [
    "acquisition", "bins", "canaries", "compare", "heatmap", "induction", "interpolation", "layers", "log_table", "loss",
    "memorization", "metric", "ngrams", "phase_change", "probe", "probe_heatmap", "probe_layers", "reliability", "sharpness",
    "steps", "tasks", "training",
]  # fmt: skip
