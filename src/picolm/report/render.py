"""Templates of the page. All values are escaped; only templates and `section.html` put text into a page."""

import json
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

ASSETS = files("picolm.report") / "page"


def asset(name: str) -> str:
    """Return the text of a file of the page: page.js, page.css, a template."""
    return (ASSETS / name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    templates = {
        item.name: item.read_text(encoding="utf-8") for item in ASSETS.iterdir() if item.name.endswith(".html")
    }
    made = Environment(
        loader=DictLoader(templates), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.filters["dotted"] = lambda key: Markup(".<wbr>").join(key.split("."))
    made.filters["yaml"] = lambda value: value if isinstance(value, str) else json.dumps(value, default=str)
    return made


def render(template: str, **values: Any) -> Markup:
    """Return a template, filled with values, as HTML."""
    return Markup(_environment().get_template(template).render(**values))
