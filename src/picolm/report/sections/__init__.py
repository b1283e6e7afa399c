"""The sections that come with Pico, in the order in which they stand in a report."""

# isort: off
from picolm.report.sections import run, training, metrics, heatmaps, comparison, text, values  # noqa: F401

# isort: on
