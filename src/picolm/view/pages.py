"""The files of the page, which come with the package."""

from functools import cache
from importlib.resources import files

from picolm.report.render import asset

PAGE = files("picolm.view") / "page"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


@cache
def page_files() -> dict[str, bytes]:
    """Return the files of the page by name, with the styles of the report. Nothing else is ever served."""
    found = {item.name: item.read_bytes() for item in PAGE.iterdir() if item.is_file()}
    return found | {"report.css": asset("page.css").encode()}
