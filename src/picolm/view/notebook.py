"""The microscope in a notebook: the saved page of a text, in a frame that can reach nothing."""

import html
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlencode

from picolm.errors import PicoError
from picolm.store import Run
from picolm.store.files import disk_errors, write_atomically
from picolm.view import saved
from picolm.view.session import Row, Session

STEPS = 16  # that are shown where none are named


class Page:
    """A page with its answers. Shown by a notebook where it is the last value of a cell."""

    def __init__(self, text: str, height: int):
        self.html, self.height = text, height

    def save(self, path: str | Path) -> Path:
        """Write the page to a file, and return its path. Raises PicoError where that cannot be."""
        with disk_errors("the page", Path(path)):
            write_atomically(Path(path), self.html.encode(errors="backslashreplace"))
        return Path(path)

    def _repr_html_(self) -> str:
        return (
            f'<iframe sandbox="allow-scripts allow-downloads" srcdoc="{html.escape(self.html)}" '
            f'style="width: 100%; height: {self.height}px; border: 0"></iframe>'
        )


def show(
    run: "str | Path | Run",
    text: str | None = None,
    steps: Sequence[int] | None = None,
    *,
    row: int = 0,
    panels: Sequence[str] = ("text", "heads", "layers", "training"),
    analyses: Sequence[str] = (),
    height: int = 900,
) -> Page:
    """Return the page of a text over the steps of a run.

    text: what the model reads; without one, a held-out row that the run keeps (`row`). steps: which (default: 16 of all, at equal
    distances). Raises PicoError for a place without a run, for steps that are not there, and for a run without rows or a text.
    """
    from picolm.report.sections.text import spread

    session = Session([str(run.path) if isinstance(run, Run) else str(run)], analyses=analyses)
    there = session.runs[0].steps()
    chosen = list(steps) if steps is not None else spread(list(there), STEPS)
    asked = {"text": text, "row": None} if text is not None else {"text": None, "row": _held_out(session, row)}
    row_of = asked["row"]
    what = {"row": f"val:{row_of.step}:{row_of.index}"} if isinstance(row_of, Row) else {"text": text}
    start = {"run": 0, "step": chosen[-1] if chosen else 0} | what
    save = saved.Save.model_validate(
        {"run": 0, "steps": chosen, "panels": list(panels), "state": urlencode(start), **asked}
    )
    viewed, read = session.read(save)
    found = {(kind, step): session.answer(kind, viewed, step, read.ids) for kind, step in saved.wanted(session, save)}
    return Page(saved.page(session, save, found), height)


def _held_out(session: Session, index: int) -> Row:
    for step, each in session.runs[0].steps().items():
        if "val" in each.splits:
            return Row(split="val", step=step, index=index)
    raise PicoError(f'{session.runs[0].run.path}: keeps no held-out rows; say which text to read: view(run, text="…")')
