"""Figures of the log of a run: loss by source, and the state of training."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from picolm.errors import PicoError
from picolm.report.look import COLOURS, DASHES, colours_of
from picolm.report.plot.panels import Control, Panel, figure, line
from picolm.store.listing import BOUND

UNITS = ("nats per token", "perplexity", "bits per byte")
TRAINED = ("train/loss", "train/perplexity", "train/bits_per_byte")
TRAINING, BOUNDED = "training batches", "bound of training batches"
VALIDATED = re.compile(
    r"val/(?!lm_eval/|minimal_pairs)(?P<name>[^/]+)(?:/(?P<source>.+?))??(?:/(?P<unit>(?:bound_)?(?:nats_per_token|bits_per_byte)))?$"
)
PROGRESS = {
    "lr": Panel("Learning rate", "learning rate"),
    "grad_norm": Panel("Gradient norm", "L2 norm before clipping"),
    "clip_coefficient": Panel("Clipping", "factor on the gradient"),
    "update_ratio": Panel("Update ratio", "‖update‖ / ‖weights‖"),
    "noise_scale": Panel("Gradient noise scale", "batch size (sequences)"),
    "weight_norm": Panel("Weight norm", "L2 norm"),
    "tokens_per_s": Panel("Speed", "tokens per second"),
}


def log_table(runs: dict[str, Iterable[dict[str, object]]]) -> pd.DataFrame:
    """Return the logged numbers of runs as a long table: run, step, name, value; the last line of a step counts.

    runs: name -> the lines of its metrics.jsonl, as `Run.metrics()` returns them.
    """
    rows = [
        (run, entry["step"], name, float(value))
        for run, entries in runs.items()
        for entry in entries
        for name, value in entry.items()
        if name != "step" and isinstance(value, int | float)
    ]
    table = pd.DataFrame(rows, columns=["run", "step", "name", "value"]).astype({"step": "int64", "value": "float64"})
    return table.drop_duplicates(["run", "step", "name"], keep="last", ignore_index=True)


def loss(log: pd.DataFrame, *, groups: Mapping[str, str] | None = None) -> go.Figure:
    """Return a figure of loss, perplexity and bits per byte, of training and of each source of the held-out rows.

    log: see `log_table`. One run: a colour per source; several: a colour per run, or, if there are more runs than
    colours, per group (run -> its group), of one source at a time. Bounds of the loss are sources of their own. Raises PicoError
    if no loss was logged.
    """
    bounded = log.loc[log["name"] == BOUND, "run"].unique()
    log = log[~(log["run"].isin(bounded) & (log["name"] == TRAINED[0]))]  # it is the bound under another name
    runs = colours_of(log["run"].unique(), groups)
    many = len(runs) > COLOURS
    evaluated = losses_among(log["name"].unique())
    curves = [curve for name in log["name"].unique() if (curve := _curve(name, evaluated)) is not None]
    if not curves:
        raise PicoError("nothing was logged of a loss")
    sources = sorted(
        dict.fromkeys(source for _, source, _ in curves), key=lambda source: source not in (TRAINING, BOUNDED)
    )
    traces = []
    for name, source, unit in sorted(curves, key=lambda curve: sources.index(curve[1])):
        for run, place in runs.items():
            own = log[(log["run"] == run) & (log["name"] == name)].sort_values("step")
            number = sources.index(source)
            meaning, dash = (
                ({"category": number}, "solid") if len(runs) == 1 else ({"category": place}, DASHES[number % 5])
            )
            words = source if len(runs) == 1 else f"{run}, {source}"
            style: dict[str, Any] = {
                "meaning": meaning,
                "dash": dash,
                "shown": {"unit": unit} | ({"source": number} if many else {}),
            }
            traces.append(line(own["step"].to_numpy(), own["value"].to_numpy(), words, **style))
    of_training = {"source": sources.index(TRAINING)} if many and TRAINING in sources else {}
    traces += [spike for run in runs for spike in _spikes(log[log["run"] == run], run, of_training)]
    controls = [Control("unit", "Unit", UNITS, y=("loss (nats per token)", "perplexity", "loss (bits per byte)"))]
    controls += [Control("source", "Of", tuple(sources))] if many else []
    return figure("Loss", traces, [Panel("", "loss (nats per token)")], controls=controls, log="xy", height=380)


def losses_among(names: Iterable[str]) -> set[str]:
    """Return the evaluations that are losses: `paloma`, and each that logs nats per token. Others log other numbers."""
    found = (
        name.removeprefix("val/").rpartition("/")[0].split("/")[0]
        for name in names
        if name.endswith(("/nats_per_token", "/bound_nats_per_token")) and name.startswith("val/")
    )
    return {"paloma", *found}


def _curve(name: str, evaluated: set[str]) -> tuple[str, str, int] | None:
    """Return (name, source, index in UNITS) of a loss; None for other quantities. evaluated: see `losses_among`."""
    if name == BOUND:
        return name, BOUNDED, 0
    if name in TRAINED:
        return name, TRAINING, TRAINED.index(name)
    found = VALIDATED.match(name)
    if found is None or found["name"] not in evaluated or name.endswith(("/standard_error", "/draws")):
        return None
    unit = {"nats_per_token": 0, None: 1, "bits_per_byte": 2}[found["unit"] and found["unit"].removeprefix("bound_")]
    words = "bound, held out:" if found["name"].endswith("_bound") else "held out:"
    return name, f"{words} {found['source'] or 'all'}", unit


def _spikes(log: pd.DataFrame, run: str, shown: dict[str, int]) -> list[go.Scatter]:
    """Return marks where the count of loss spikes or of skipped updates grew since the previous logged line."""
    wide = log.pivot(index="step", columns="name", values="value")
    marks = []
    for name, words, symbol in (
        ("loss_spikes", "loss spikes", "triangle-down"),
        ("skipped_updates", "skipped updates", "x"),
    ):
        if name not in wide or "train/loss" not in wide:
            continue
        counts = wide[[name, "train/loss"]].dropna()
        grown = counts[counts[name].diff().fillna(counts[name]) > 0]
        if grown.empty:
            continue
        for unit, column in enumerate(column for column in TRAINED[:2] if column in wide):
            mark = line(
                grown.index.to_numpy(), wide.loc[grown.index, column].to_numpy(), f"{run}: {words}", shown={"unit": unit} | shown,
                about=f"{words} since the line before",
            )  # fmt: skip
            marks.append(
                mark.update(mode="markers", marker={"symbol": symbol, "size": 10}, customdata=grown[name].to_numpy())
            )
    return marks


def training(log: pd.DataFrame, *, groups: Mapping[str, str] | None = None) -> go.Figure:
    """Return a figure of learning rate, gradient norm and clipping, update ratios, noise scale, weight norm, and speed.

    Colours as in `loss`. Raises PicoError if none of these was logged.
    """
    runs = colours_of(log["run"].unique(), groups)
    logged = {name.partition("/")[0] for name in log["name"].unique()}
    there = {name: panel for name, panel in PROGRESS.items() if name in logged}
    if not there:
        raise PicoError("nothing was logged of how training went")
    traces = []
    for number, prefix in enumerate(there):
        names = [name for name in log["name"].unique() if name == prefix or name.startswith(prefix + "/")]
        for part, name in enumerate(names):
            traces += [_progress(log, run, name, number, (part, place), len(runs) == 1) for run, place in runs.items()]
    return figure("How training went", traces, list(there.values()), log="xy")


def _progress(log: pd.DataFrame, run: str, name: str, panel: int, places: tuple[int, int], alone: bool) -> go.Scatter:
    """Return one line. places: of the group of tensors among the groups, and of the run among the colours."""
    own = log[(log["run"] == run) & (log["name"] == name)].sort_values("step")
    prefix, _, group = name.partition("/")
    part, place = places
    shade = part if alone and group else place  # several runs: a colour each, and dashes for their groups of tensors
    dash = DASHES[part % 5] if group and not alone else "dot" if part > 6 else "solid"
    return line(
        own["step"].to_numpy(), own["value"].to_numpy(), group or run, panel=panel, meaning={"category": shade}, dash=dash,
        about="\n".join(filter(None, (run, PROGRESS[prefix].title, group))), quiet=alone != bool(group),
    )  # fmt: skip
