"""Pico: train language models, record how they learn, and analyze it."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from picolm import view
    from picolm.recorder import Recorder

__version__ = "0.1.0"
__all__ = ["Recorder", "__version__", "view"]


def __getattr__(name: str) -> Any:
    if name == "Recorder":  # imported when it is used: it needs torch, and `pico --help` does not
        from picolm.recorder import Recorder

        return Recorder
    if name == "view":
        import importlib

        return importlib.import_module("picolm.view")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
