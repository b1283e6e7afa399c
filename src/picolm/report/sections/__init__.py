"""The sections of this package, in their order in a report."""

# isort: off
from picolm.report.sections import run, training, probes, metrics, heatmaps, comparison, text, values  # noqa: F401

# isort: on
