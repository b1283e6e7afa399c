"""Write the report of runs and tables: call the sections in order, and fill a template with what they return.

The page contains everything: the plotting library and all data, compressed, and unpacked when needed. Its content
security policy allows no address, and only the two scripts in the page, by their digests. So it makes no request, and
text of a run that looks like a script is not executed.
"""

import base64
import gzip
import hashlib
import json
import logging
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from markupsafe import Markup

from picolm import __version__
from picolm.errors import PicoError
from picolm.report import sections  # noqa: F401  # registers the sections of this package
from picolm.report.export import export
from picolm.report.look import themes
from picolm.report.material import Material, gather
from picolm.report.render import asset, render
from picolm.report.section import SECTIONS, Drawing, Section, Sheet, described, html
from picolm.store.files import write_atomically

log = logging.getLogger("picolm")

SCRIPTS = ("figures.js", "tables.js", "page.js")  # the last one starts the page


def write(
    runs: Sequence[str],
    analyses: Sequence[str] = (),
    out: str | Path = "report.html",
    *,
    own: Sequence[str] = (),
    figures: str | Path | None = None,
) -> Path:
    """Write the report of runs and analyses as one HTML file, and return its path. own: further sections,
    `my_lab.module:function`.

    figures: a folder; each figure is also written there as SVG, PDF and PNG. Raises PicoError for what is not a run or
    a table, and if a file cannot be written.
    """
    return save(gather(runs, analyses, own), Path(out), own=own, figures=figures)


def save(material: Material, out: Path, *, own: Sequence[str] = (), figures: str | Path | None = None) -> Path:
    """Write the report of material that is already read; see `write`."""
    chosen = compose(material, own)
    if figures is not None:
        export((item for section in chosen for item in section.items if isinstance(item, Drawing)), Path(figures))
    text = page(material, chosen)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, text.encode(errors="backslashreplace"))
    except OSError as error:
        raise PicoError(f"{out}: the report cannot be written ({error})") from error
    return out


def compose(material: Material, own: Sequence[str] = ()) -> list[Section]:
    """Return the sections that have content, in order. A user's own sections come before the tables of all values, or
    before all others if they are marked as `first`. Raises PicoError if there are none.
    """
    names = [name for name in SECTIONS if name != "values"]
    made = [SECTIONS.get(name)(material) for name in [*names, *own, "values"]]
    found = [section for section in made if section is not None]
    for problem in material.problems:
        log.warning("%s", problem)
    if found and material.problems:
        items = [html("<p class='notice'>{}</p>", problem) for problem in material.problems]
        found.append(Section("Left out", items, "What could not be read."))
    if not found:
        raise PicoError("there is nothing to show yet: the runs have no log and no checkpoint, and no table was given")
    return sorted(found, key=lambda section: not section.first)


def page(material: Material, chosen: Sequence[Section]) -> str:
    """Return the page of the report as HTML."""
    script, (library, library_digest) = "\n".join(map(asset, SCRIPTS)), _plotly()
    names = list(material.named) or [analysis.name for analysis in material.analyses]
    return render(
        "page.html",
        title=material.title or ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else ""),
        sections=[_numbered(section, place) for place, section in enumerate(chosen)],
        css=Markup(asset("page.css")),
        script=Markup(script),
        digests=[_digest(script), library_digest],
        plotly=library,
        themes=pack(themes()),
        command=material.command,
        version=__version__,
    )


@cache
def _plotly() -> tuple[Markup, str]:
    """Return the plotting library, packed, and its digest."""
    from plotly.offline import get_plotlyjs

    return pack_text(get_plotlyjs()), _digest(get_plotlyjs())


def _digest(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _numbered(section: Section, place: int) -> dict[str, Any]:
    """Return what the template needs of a section."""
    items = [_item(item, f"s{place}-{number}") for number, item in enumerate(section.items)]
    return {"id": f"s{place}", "title": section.title, "lead": section.lead, "entries": items}


def _item(item: Drawing | Sheet | Markup, name: str) -> dict[str, Any]:
    if isinstance(item, Drawing):
        figure = json.loads(item.figure.to_json())
        figure["layout"].pop("template", None)  # the page has one for each theme
        for trace in figure["data"]:
            if trace.get("customdata") == trace.get("z", trace.get("y")):
                del trace["customdata"]  # a copy of the values, for hovering: the page restores it
        meta = figure["layout"].get("meta") or {}
        return {
            "kind": "drawing", "id": name, "title": item.title, "file": item.name, "code": item.code, "caption": item.caption,
            "height": figure["layout"].get("height", 400), "note": meta.get("note", ""),
            "terms": meta.get("terms", []), "described": described(item.figure), "data": pack(figure),
        }  # fmt: skip
    if isinstance(item, Sheet):
        return {"kind": "sheet", "id": name, "title": item.name, "rows": len(item.frame), "data": pack(columns(item))}
    if isinstance(item, Markup):
        return {"kind": "html", "html": item}
    raise PicoError(
        f"a section holds a {type(item).__name__}; it may hold Drawing, Sheet, and what picolm.report.html returns"
    )


def columns(sheet: Sheet) -> dict[str, Any]:
    """Return a table by columns: numbers as they are, text as indices into its distinct words. Missing values are null;
    empty columns are left out.
    """
    made: dict[str, Any] = {}
    for name in sheet.frame.columns:
        values = sheet.frame[name]
        if values.dtype.kind in "iufb" or str(values.dtype).startswith("Int"):
            plain = [
                None if value != value else value
                for value in values.astype(object).where(values.notna(), None).tolist()
            ]
            made[name] = {"values": [_number(value) for value in plain]}
        else:
            codes, words = values.astype("string").fillna("").factorize()
            made[name] = {"codes": codes.tolist(), "words": list(map(str, words))}
    kept = {name: column for name, column in made.items() if _says_something(column)}
    return {"name": sheet.name, "rows": len(sheet.frame), "columns": kept}


def _says_something(column: dict[str, Any]) -> bool:
    return any(column["words"]) if "words" in column else any(value is not None for value in column["values"])


def _number(value: Any) -> Any:
    """Return the number; infinity, which JSON does not have, as text that JavaScript reads as the number."""
    infinite = isinstance(value, float) and math.isinf(value)
    return ("Infinity" if value > 0 else "-Infinity") if infinite else value


def pack(value: Any) -> Markup:
    """Return a JSON value, compressed, as characters that are valid anywhere in a page."""
    return pack_text(json.dumps(value, separators=(",", ":"), ensure_ascii=False))


def pack_text(text: str) -> Markup:
    return Markup(base64.b64encode(gzip.compress(text.encode(errors="backslashreplace"), 6, mtime=0)).decode())
