"""Runs on disk. The store knows no schema, model or training: it keeps {Address: Tensor} and what goes with them."""

from picolm.store import hub, legacy_run  # noqa: F401  (each adds its formats to those that `Run.open` knows)
from picolm.store.checkpoint import Checkpoint, Missing
from picolm.store.layout import Directories
from picolm.store.run import Run

__all__ = ["Checkpoint", "Directories", "Missing", "Run"]
