"""Pictures of single probes of the landscape: sharpness with its stability line, the loss between two sets of weights."""

import pandas as pd
import plotly.graph_objects as go

from picolm.errors import PicoError
from picolm.report.plot.comparison import one_run
from picolm.report.plot.panels import Control, Panel, figure, line
from picolm.report.plot.probes import MOST_STEPS, some
from picolm.report.plot.readings import natural, panels_of, reading, select_probe, terms, title_of, told, units_of

TITLES = {"hessian": "Sharpness", "adam_hessian": "Sharpness as Adam sees it"}


def sharpness(table: pd.DataFrame, options: str | None = None, *, name: str = "hessian") -> go.Figure:
    """Return a figure of the largest eigenvalues of the Hessian over steps, with the line above which the optimizer is not stable.

    name: `hessian`, with the line of plain gradient descent, or `adam_hessian`, preconditioned, with that of Adam. Raises
    PicoError if the table has no eigenvalue.
    """
    rows = select_probe(table, name, options)
    values = reading(table, f"{name}.largest_eigenvalue", options)
    limits = rows[rows["metric"].isin([f"{name}.stability_line", f"{name}.adaptive_stability_line"]) & rows["value"].notna()]
    if values["value"].isna().all():
        raise PicoError(f"{name}: there is no eigenvalue in the table")
    numbers, runs = sorted(map(str, values["bin"].fillna("").unique()), key=natural), list(dict.fromkeys(rows["run"]))
    traces = []
    for place, run in enumerate(runs):
        shown = {"run": place}
        for number, bin in enumerate(numbers):
            own = values[(values["run"] == run) & (values["bin"].fillna("") == bin)]
            words = f"eigenvalue {bin}" if bin else "largest eigenvalue"
            traces += one_run(own, words, panel=0, meaning={"category": number}, shown=shown)
        own = limits[limits["run"] == run].sort_values("step")
        if len(own):
            at, limit = own["step"].to_numpy(), own["value"].to_numpy(dtype=float)
            traces.append(line(at, limit, "stability line", shown=shown, dash="dash"))
    drawn = pd.concat([values, limits])
    title, control = title_of(rows, TITLES.get(name, name)), Control("run", "Run", runs)
    panel = Panel("", units_of(values))
    return figure(title, traces, [panel], controls=[control], log="xy", height=380, note=told(drawn), terms=terms(drawn))


def interpolation(table: pd.DataFrame, options: str | None = None) -> go.Figure:
    """Return the loss on the straight line between two sets of weights, a line for each pair; a panel for each target.

    Of many pairs some are shown. Raises PicoError if the table has no such loss.
    """
    rows = reading(table, "barrier.interpolated_loss", options)
    rows = rows[rows["value"].notna()]
    found, runs = _between(rows), list(dict.fromkeys(rows["run"]))
    if not found:
        raise PicoError("there is no loss between two sets of weights in the table")
    traces = []
    for panel, (_, group) in enumerate(found):
        for place, run in enumerate(runs):
            pairs = list(group[group["run"] == run].groupby(["step", "against_run", "against_step"], dropna=False, sort=True))
            chosen = some(pairs, MOST_STEPS)
            for number, ((step, other, partner), own) in enumerate(chosen):
                at = own.assign(alpha=own["bin"].astype(float)).sort_values("alpha")
                with_ = f"step {partner}" if other == run else f"{other}, step {partner}"
                traces.append(
                    line(
                        at["alpha"].to_numpy(), at["value"].to_numpy(dtype=float), f"step {step}", panel=panel, shown={"run": place},
                        meaning={"depth": number / max(1, len(chosen) - 1)}, about=f"from step {step} to {with_}",
                    )
                )  # fmt: skip
    panels = [Panel(title, units_of(group), "alpha") for title, group in found]
    title, control = title_of(rows, "Loss between two sets of weights"), Control("run", "Run", runs)
    return figure(title, traces, panels, controls=[control], height=320, note=told(rows), terms=terms(rows))


def _between(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Return the panels: targets, of which the one with all steps is shown as well."""
    found = list(panels_of(rows))
    rest = rows[~rows.index.isin([place for _, group in found for place in group.index])]
    return [*found, *([("with every step", rest)] if len(rest) else [])]
