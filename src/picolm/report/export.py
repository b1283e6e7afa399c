"""Write figures as files for a paper: SVG, PDF and PNG, drawn by plotly in a browser that kaleido starts (extra
`figures`).
"""

from collections.abc import Iterable
from pathlib import Path

from picolm.errors import PicoError
from picolm.report.browser import find
from picolm.report.section import Drawing
from picolm.trusted import make_folder

FORMATS = ("svg", "pdf", "png")


def export(drawings: Iterable[Drawing], folder: Path) -> list[Path]:
    """Write each drawing, as first shown, to `<name>.svg`, `.pdf` and `.png` (at double resolution), and return the
    paths.

    Raises PicoError if kaleido or a browser is missing, and if a figure cannot be written.
    """
    figures = _numbered(drawings)
    kaleido = _kaleido()
    make_folder(folder)
    made = [folder / f"{name}.{kind}" for name in figures for kind in FORMATS]
    jobs = [
        {
            "fig": drawing.figure,
            "path": folder / f"{name}.{kind}",
            "opts": {"format": kind, "scale": 2 if kind == "png" else 1},
        }
        for name, drawing in figures.items()
        for kind in FORMATS
    ]
    try:
        kaleido.write_fig_from_object_sync(jobs, kopts={"n": 1, "path": find(), "mathjax": False})
    except Exception as error:
        raise PicoError(f"the figures cannot be written to {folder}: {type(error).__name__}: {error}") from error
    return made


def _numbered(drawings: Iterable[Drawing]) -> dict[str, Drawing]:
    figures: dict[str, Drawing] = {}
    for drawing in drawings:
        name, number = drawing.name, 2
        while name in figures:
            name, number = f"{drawing.name}-{number}", number + 1
        figures[name] = drawing
    return figures


def _kaleido():  # type: ignore[no-untyped-def]
    try:
        import kaleido
    except ImportError as error:
        raise PicoError("figures as files need kaleido: pip install 'picolm[figures]'") from error
    return kaleido
