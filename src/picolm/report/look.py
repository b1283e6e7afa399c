"""The look of figures in a light and a dark theme: colours that colour-blind readers can tell apart, one template each.

Depth is shown on the scale viridis, without the end that has no contrast with the background; magnitudes on cividis;
categories in the colours of Okabe and Ito (2008). A trace states what its colour means (`meta.colour`), so that the
page can change the theme.
"""

import html
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

SHADES = 64  # colours of the depth scale, in the page
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
THEMES: dict[str, dict[str, Any]] = {
    "light": {
        "ink": "#1d2433", "faint": "#5b6478", "grid": "#e4e8ef", "paper": "#ffffff", "depth": ("Viridis", 0.0, 0.86),
        "category": ["#0072b2", "#d55e00", "#009e73", "#a8518a", "#b07a00", "#3a93c9", "#1d2433"],
    },
    "dark": {
        "ink": "#e6eaf2", "faint": "#9aa4b8", "grid": "#2b3342", "paper": "#171c26", "depth": ("Viridis", 0.32, 1.0),
        "category": ["#56b4e9", "#f0854a", "#2fc79a", "#e39ac6", "#e9b949", "#9fd3f2", "#e6eaf2"],
    },
}  # fmt: skip
COLOURS = len(THEMES["light"]["category"])
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")


def label(text: object) -> str:
    """Return text of a run, escaped for a figure: plotly interprets some HTML and `%{…}`; here they are text."""
    return html.escape(str(text), quote=False).replace("{", "&#123;").replace("\n", "<br>")


def colour(meaning: dict[str, Any] | None, theme: str = "light") -> str:
    """Return the colour for `{"depth": 0 to 1}` or `{"category": index}`; a faint one for neither."""
    look = THEMES[theme]
    if meaning and "depth" in meaning:
        return shades(theme)[round(meaning["depth"] * (SHADES - 1))]
    if meaning and "category" in meaning:
        return look["category"][meaning["category"] % len(look["category"])]
    return look["faint"]


@cache
def shades(theme: str) -> list[str]:
    """Return the colours of the depth scale, from the first layer to the last."""
    name, low, high = THEMES[theme]["depth"]
    return sample_colorscale(name, [low + (high - low) * i / (SHADES - 1) for i in range(SHADES)])


def colours_of(runs: Iterable[str], groups: Mapping[str, str] | None = None) -> dict[str, int]:
    """Return the number of the colour of each run: its own if there are enough colours, else that of its group."""
    own = dict.fromkeys(runs)
    shared = (groups or {}) if len(own) > COLOURS else {}
    names = {run: shared.get(run, run) for run in own}
    order = list(dict.fromkeys(names.values()))
    return {run: order.index(name) for run, name in names.items()}


def faded(shade: str, opacity: float) -> str:
    """Return a colour with an opacity, for a band around a line."""
    if shade.startswith("rgb("):
        return shade.replace("rgb(", "rgba(").replace(")", f", {opacity})")
    red, green, blue = (int(shade[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {opacity})"


def template(theme: str = "light") -> go.layout.Template:
    """Return the part of a layout that all figures share."""
    look = THEMES[theme]
    axis = {
        "gridcolor": look["grid"], "linecolor": look["grid"], "zeroline": False, "ticks": "", "automargin": True,
        "exponentformat": "power", "title": {"font": {"size": 12, "color": look["faint"]}, "standoff": 6},
        "tickfont": {"size": 11, "color": look["faint"]},
    }  # fmt: skip
    layout = {
        "font": {"family": FONT, "size": 13, "color": look["ink"]},
        "title": {"x": 0, "xref": "paper", "y": 1, "yanchor": "top", "pad": {"t": 10}, "font": {"size": 16}},
        "paper_bgcolor": look["paper"], "plot_bgcolor": look["paper"], "colorway": look["category"],
        "colorscale": {"sequential": "Cividis", "diverging": "RdBu"},
        "xaxis": axis, "yaxis": axis, "hovermode": "closest", "margin": {"l": 62, "r": 14, "t": 40, "b": 52},
        "hoverlabel": {"bgcolor": look["paper"], "bordercolor": look["faint"], "font": {"color": look["ink"], "size": 12}},
        "legend": {
            "orientation": "h", "x": 0, "xref": "container", "xanchor": "left", "y": 1, "yref": "container", "yanchor": "top",
            "font": {"size": 12}, "maxheight": 1, "tracegroupgap": 0,
        },
        "annotationdefaults": {"font": {"color": look["ink"], "size": 12}, "align": "left"},
    }  # fmt: skip
    return go.layout.Template(layout=layout)


def themes() -> dict[str, Any]:
    """Return what the page needs to draw figures in either theme."""
    return {
        name: {
            "template": template(name).to_plotly_json(),
            "depth": shades(name),
            "category": THEMES[name]["category"],
            "faint": THEMES[name]["faint"],
        }
        for name in THEMES
    }
