"""Pictures of single probes of the landscape: sharpness with its stability line, the loss between two sets of weights."""

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from picolm.errors import PicoError
from picolm.report.plot.comparison import one_run
from picolm.report.plot.panels import Control, Panel, figure, line
from picolm.report.plot.probes import MOST_STEPS, some
from picolm.report.plot.readings import (
    logged,
    natural,
    panels_of,
    reading,
    reading_of,
    select_probe,
    terms,
    title_of,
    told,
    units_of,
)

LINES = ("stability_line", "adaptive_stability_line")
TITLES = {"hessian": "Sharpness", "adam_hessian": "Sharpness as Adam sees it"}


def sharpness(table: pd.DataFrame, options: str | None = None, *, name: str = "hessian") -> go.Figure:
    """Return a figure of the largest eigenvalues of the Hessian over steps, and the line above which the optimizer is unstable.

    name: `hessian`, with the line of plain gradient descent, or `adam_hessian`, preconditioned, with that of Adam. Raises
    PicoError if the table has no eigenvalue.
    """
    rows = select_probe(table, name, options)
    values = reading(table, f"{name}.largest_eigenvalue", options)
    others = rows[
        (rows["metric"] == f"{name}.eigenvalue") & rows["bin"].astype(str).str.fullmatch(r"\d+") & (rows["bin"] != "1")
    ]
    limits = rows[rows["metric"].isin([f"{name}.{line}" for line in LINES]) & rows["value"].notna()]
    if values["value"].isna().all():
        raise PicoError(f"{name}: there is no eigenvalue in the table")
    numbers, runs = sorted(map(str, others["bin"].unique()), key=natural), list(dict.fromkeys(rows["run"]))
    curves = {"largest eigenvalue": values} | {f"eigenvalue {bin}": others[others["bin"] == bin] for bin in numbers}
    traces = []
    for place, run in enumerate(runs):
        shown = {"run": place}
        for number, (words, curve) in enumerate(curves.items()):
            own = curve[curve["run"] == run]
            traces += one_run(own, words, panel=0, meaning={"category": number}, shown=shown) if len(own) else []
        own = limits[limits["run"] == run].sort_values("step")
        if len(own):
            at, limit = own["step"].to_numpy(), own["value"].to_numpy(dtype=float)
            traces.append(line(at, limit, "stability line", shown=shown, dash="dash"))
    drawn = pd.concat([values, others, limits])
    title, control = title_of(rows, TITLES.get(name, name)), Control("run", "Run", runs)
    panel = Panel("", units_of(values))
    return figure(
        title,
        traces,
        [panel],
        controls=[control],
        log="xy",
        logged=logged(drawn) + "y",
        height=380,
        note=told(drawn),
        terms=terms(drawn),
    )


def interpolation(table: pd.DataFrame, options: str | None = None) -> go.Figure:
    """Return the loss on the straight line between two sets of weights, a line for each pair; a panel for each target.

    Of many pairs some are shown. Raises PicoError if the table has no such loss.
    """
    every = select_probe(table, "barrier", options)
    rows = every[every["metric"].isin(["barrier.interpolated_loss", "barrier.aligned_interpolated_loss"])]
    rows = rows[rows["value"].notna()]
    found, runs = _between(rows), list(dict.fromkeys(rows["run"]))
    if not found:
        raise PicoError("there is no loss between two sets of weights in the table")
    traces = []
    for panel, (_, group) in enumerate(found):
        for place, run in enumerate(runs):
            pairs = list(
                group[group["run"] == run].groupby(["step", "against_run", "against_step"], dropna=False, sort=True)
            )
            chosen = some(pairs, MOST_STEPS)
            for number, ((step, other, partner), own) in enumerate(chosen):
                at = own.assign(alpha=own["bin"].astype(float)).sort_values("alpha")
                with_ = f"step {partner}" if other == run else f"{other}, step {partner}"
                style: dict[str, Any] = {
                    "panel": panel,
                    "shown": {"run": place},
                    "about": f"from step {step} to {with_}",
                }
                style |= {"meaning": {"depth": number / max(1, len(chosen) - 1)}}
                alpha, values = at["alpha"].to_numpy(), at["value"].to_numpy(dtype=float)
                traces.append(line(alpha, values, f"step {step}", **style))
    panels = [Panel(title, units_of(group), "alpha") for title, group in found]
    title, control = title_of(rows, "Loss between two sets of weights"), Control("run", "Run", runs)
    return figure(title, traces, panels, controls=[control], height=320, note=told(rows), terms=terms(rows))


def _between(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Return the panels: readings and their targets; comparisons of all steps with each other are shown as well."""
    found = list(panels_of(rows))
    rest = rows[~rows.index.isin([place for _, group in found for place in group.index])]
    of_all = [
        (f"{reading_of(str(metric))} · with every step", own) for metric, own in rest.groupby("metric", sort=False)
    ]
    return [*found, *of_all]
