"""Analysis: read runs, compute metrics of their tensors, and return one long table of values.

picolm.analyze.load("analysis_results/demo")        the long table as a pandas data frame
from picolm.analyze import metrics                  the functions alone: metrics.cka(x, y)
"""

from typing import Any

__all__ = ["aggregate", "load", "metrics"]


def __getattr__(name: str) -> Any:  # so that importing one part does not load torch and pandas for the others
    import importlib

    if name == "metrics":
        return importlib.import_module("picolm.analyze.metrics")
    if name == "aggregate":
        return importlib.import_module("picolm.analyze.intervals").aggregate
    if name == "load":
        return importlib.import_module("picolm.analyze.table").load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
