"""Runs on disk. The store knows no schema, model or training: it keeps {Address: Tensor} and metadata."""

from picolm.store import hub, legacy_run  # noqa: F401  (each registers its formats for `Run.open`)
from picolm.store.checkpoint import Checkpoint, Missing
from picolm.store.manifest import Directories
from picolm.store.run import Run

__all__ = ["Checkpoint", "Directories", "Missing", "Run"]
