"""Reports: figures and tables of runs and analyses, in one HTML file that needs no network.

from picolm.report import plot                 functions from a table to a plotly figure, for a notebook
plot.metric(table, "cka")
picolm.report.write(["runs/demo"], ["analysis_results/demo"], "report.html")
"""

from typing import Any

__all__ = ["SECTIONS", "Drawing", "Section", "Sheet", "html", "plot", "write"]


def __getattr__(name: str) -> Any:  # so that a figure in a notebook does not load torch
    import importlib

    if name == "plot":
        return importlib.import_module("picolm.report.plot")
    if name == "write":
        return importlib.import_module("picolm.report.assembly").write
    if name in ("SECTIONS", "Drawing", "Section", "Sheet", "html"):
        return getattr(importlib.import_module("picolm.report.section"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
