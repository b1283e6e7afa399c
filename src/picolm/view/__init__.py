"""The microscope: a local page in which a person drags a slider through training and sees the model think at that step.

`pico view RUN…` starts it. `picolm.view(run, text="…")` shows the same panels in a notebook: this module can be called.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from picolm.view.notebook import Page


class _View(ModuleType):
    """A module that can be called: `picolm.view(…)` is `picolm.view.notebook.show(…)`, imported then."""

    def __call__(self, *args: Any, **options: Any) -> "Page":
        from picolm.view.notebook import show

        return show(*args, **options)


sys.modules[__name__].__class__ = _View
