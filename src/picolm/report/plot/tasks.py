"""Figures of tasks over training: minimal pairs, tasks of lm-evaluation-harness, and a user's own evaluations.

Each metric has a panel.
"""

from collections.abc import Mapping
from typing import NamedTuple

import pandas as pd
import plotly.graph_objects as go

from picolm.errors import PicoError
from picolm.report.look import DASHES, colours_of
from picolm.report.plot.panels import Panel, figure, line
from picolm.report.plot.training import losses_among

PAIRS, HARNESS = "val/minimal_pairs", "val/lm_eval/"


class _Curve(NamedTuple):
    name: str
    metric: str
    task: str


def tasks(log: pd.DataFrame, *, groups: Mapping[str, str] | None = None) -> go.Figure:
    """Return a figure of accuracy on minimal pairs (in all and by phenomenon), all metrics of all tasks, other
    evaluations.

    log: see `log_table`. One run: a colour per task; several: as in `loss`. Raises PicoError if no task was logged.
    """
    runs = colours_of(log["run"].unique(), groups)
    losses = losses_among(log["name"].unique())
    curves = [curve for name in log["name"].unique() if (curve := _curve(name, losses)) is not None]
    if not curves:
        raise PicoError("nothing was logged of tasks")
    metrics = list(dict.fromkeys(curve.metric for curve in curves))
    traces = []
    for metric in metrics:
        for part, curve in enumerate(curve for curve in curves if curve.metric == metric):
            for run, place in runs.items():
                own = log[(log["run"] == run) & (log["name"] == curve.name)].sort_values("step")
                words = curve.task if len(runs) == 1 else f"{run}, {curve.task}"
                meaning, dash = (
                    ({"category": part}, "solid") if len(runs) == 1 else ({"category": place}, DASHES[part % 5])
                )
                traces.append(
                    line(
                        own["step"].to_numpy(),
                        own["value"].to_numpy(),
                        words,
                        panel=metrics.index(metric),
                        meaning=meaning,
                        dash=dash,
                    )
                )
    return figure("Tasks", traces, [Panel(metric, metric) for metric in metrics], log="x")


def _curve(name: str, losses: set[str]) -> _Curve | None:
    """Return the curve of a logged name: `val/lm_eval/TASK/METRIC`, `val/minimal_pairs` and
    `val/minimal_pairs/PHENOMENON`, `val/OTHER` and `val/OTHER/PART`.

    None for losses, and for quantities of training.
    """
    if name == PAIRS or name.startswith(PAIRS + "/"):
        return _Curve(name, "minimal pairs: share right", name.removeprefix(PAIRS).lstrip("/") or "all pairs")
    if name.startswith(HARNESS):
        task, _, metric = name.removeprefix(HARNESS).rpartition("/")
        return _Curve(name, metric, task)
    evaluation, _, part = name.removeprefix("val/").partition("/")
    if not name.startswith("val/") or evaluation in losses:
        return None
    return _Curve(name, evaluation, part or evaluation)
