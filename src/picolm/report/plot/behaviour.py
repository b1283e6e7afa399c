"""Pictures of single probes of behaviour: when induction heads form, n-grams, memorization, tokens."""

import math
import re
from collections.abc import Mapping
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from picolm.errors import PicoError
from picolm.report.look import label
from picolm.report.plot.comparison import one_run
from picolm.report.plot.heatmaps import cells, map_figure
from picolm.report.plot.panels import Control, Panel, band, figure, mark, spot
from picolm.report.plot.probes import MOST_BINS, chance_line, some
from picolm.report.plot.readings import logged, natural, reading, select_probe, terms, title_of, told, units_of
from picolm.report.plot.series import by_step, gaps

STEEP = 2  # a phase change is at least so many times as steep as the whole curve
LEVEL = 0.025  # of the one-sided test that a drop is no noise, over all intervals together


def phase_change(steps: Any, losses: Any, errors: Any = None) -> tuple[int, int] | None:
    """Return the two steps between which a loss drops most steeply against the logarithm of the step; None without such a drop.

    errors: standard errors of the losses; where one is missing, the noise is estimated from the second differences of the curve.
    A drop counts if it is larger than noise (normal, level 0.025 over all intervals by Bonferroni), and if it is at least twice
    as steep as the whole curve: a steady decline has no phase change. Step 0, which has no logarithm, is left out.
    """
    at, values = np.asarray(steps, dtype=float), np.asarray(losses, dtype=float)
    spread = np.full(len(at), math.nan) if errors is None else np.asarray(errors, dtype=float)
    there = (at > 0) & np.isfinite(values)
    at, values, spread = at[there], values[there], spread[there]
    if len(at) < 3:
        return None
    drops, widths = -np.diff(values), np.diff(np.log(at))
    noise = np.hypot(spread[:-1], spread[1:])
    if not np.isfinite(noise).all():
        # a second difference of independent noise has 6 times its variance, a first one twice
        noise = np.full(len(drops), np.median(np.abs(np.diff(values, 2))) / 0.6745 * math.sqrt(2 / 6))
    least = NormalDist().inv_cdf(1 - LEVEL / len(drops)) * noise
    whole = max(0.0, float(values[0] - values[-1])) / math.log(at[-1] / at[0])
    slopes = np.where((drops > least) & (drops / widths >= STEEP * whole), drops / widths, 0.0)
    place = int(np.argmax(slopes))
    return (int(at[place]), int(at[place + 1])) if slopes[place] > 0 else None


def induction(table: pd.DataFrame, options: str | None = None) -> go.Figure:
    """Return a figure of how induction comes about: the loss on the second copy of random tokens beside that on the first, the
    heads that look most at the previous token and at what followed before, and prefix matching of all heads.

    The phase change of the induction loss is marked, see `phase_change`. All panels have the steps at equal distances. Raises
    PicoError if the table lacks the loss.
    """
    rows = select_probe(table, "induction", options)
    losses = {name: reading(table, f"induction.{name}", options) for name in ("induction_loss", "first_copy_loss")}
    heads = {
        name: own
        for name in ("previous_token", "prefix_matching")
        for own in [rows[(rows["metric"] == f"induction.{name}") & rows["value"].notna()]]
        if len(own)
    }
    runs, traces, told_of = list(dict.fromkeys(rows["run"])), list[Any](), list[str]()
    for place, run in enumerate(runs):
        shown = {"run": place}
        own_losses = {name: own[own["run"] == run].sort_values("step") for name, own in losses.items()}
        for number, (name, own) in enumerate(own_losses.items()):
            traces += one_run(own, name, panel=0, meaning={"category": number}, shown=shown)
        traces += chance_line(own_losses["induction_loss"], 0, shown)
        own_heads = {name: own[own["run"] == run] for name, own in heads.items()}
        for number, (name, own) in enumerate(own_heads.items()):
            traces += _best_head(own, name, shown, number + 2)
        map_of = _heads_map(own_heads.get("prefix_matching"), shown)
        traces += map_of
        loss = own_losses["induction_loss"]
        change = phase_change(loss["step"], loss["value"], loss["standard_error"])
        told_of.append(_words(run, change))
        traces += _marked(traces, change, shown) if change else []
    panels = [Panel("loss on repeated tokens", "nats")]
    panels += [Panel("strongest heads", "share of attention")] if heads else []
    panels += [Panel("prefix matching of each head", "")] if "prefix_matching" in heads else []
    drawn = pd.concat([*losses.values(), *heads.values()])
    made = figure(
        f"{title_of(rows, 'Induction')}: losses and heads", _as_categories(traces), panels,
        controls=[Control("run", "Run", runs)], height=300, note=" ".join([*told_of, told(drawn)]).strip(), terms=terms(drawn),
    )  # fmt: skip
    made.update_xaxes(type="category", showgrid=False)
    return made.update_yaxes(selector={"anchor": "x3"}, type="category", showgrid=False)


def _words(run: str, change: tuple[int, int] | None) -> str:
    if change is None:
        why = "no drop of the induction loss is both larger than its noise and twice as steep as the whole curve"
        return f"{run}: no phase change is marked: {why}."
    first, last = change
    return f"{run}: the induction loss drops most steeply, against the logarithm of the step, from step {first:,} to {last:,}."


def _best_head(rows: pd.DataFrame, name: str, shown: dict[str, int], colour: int) -> list[go.Scatter]:
    """Return the line of the head that has the highest value at any step, and its chance level."""
    if rows.empty:
        return []
    best = rows.loc[rows["value"].idxmax()]
    own = rows[(rows["layer"] == best["layer"]) & (rows["head"] == best["head"])]
    words = f"{name}: layer {best['layer']}, head {best['head']}"
    chance = chance_line(own, 1, shown, about=f"chance of {name}")
    return [*one_run(own, words, panel=1, meaning={"category": colour}, shown=shown), *chance]


def _heads_map(rows: pd.DataFrame | None, shown: dict[str, int]) -> list[go.Heatmap]:
    if rows is None or rows.empty:
        return []
    steps, each = np.sort(rows["step"].unique()), list(rows.groupby(["layer", "head"], sort=True))
    values = np.array([by_step(own, steps) for _, own in each])
    made = cells(steps, [f"{layer}.{head}" for (layer, head), _ in each], values, shown, "prefix matching, layer.head")
    return [made.update(xaxis="x3", yaxis="y3", zmin=0)]


def _marked(traces: list[Any], change: tuple[int, int], shown: dict[str, int]) -> list[go.Scatter]:
    """Return the outline of the steps of a phase change, in each panel of one run."""
    made = []
    for panel, axis in enumerate(("y", "y2", "y3")):
        own = [trace for trace in traces if (trace.yaxis or "y") == axis and trace.meta["shown"] == shown]
        if not own:
            continue
        of_map = own[0].type == "heatmap"
        values = np.concatenate([np.asarray(trace.y, dtype=object if of_map else float) for trace in own])
        low, high = (values[0], values[-1]) if of_map else (np.nanmin(values), np.nanmax(values))
        made.append(
            mark([change[0], change[0], change[1], change[1]], [low, high, high, low], "phase change", panel, shown)
        )
        if not of_map:
            made.append(
                band(
                    np.array(change), np.array([low] * 2), np.array([high] * 2), panel=panel, meaning={"category": 1},
                    shown=shown, group="phase change",
                )
            )  # fmt: skip
    return made


def _as_categories(traces: list[Any]) -> list[Any]:
    """Return the traces with steps as categories, which stand at equal distances."""
    return [trace.update(x=[str(at) for at in trace.x]) for trace in traces]


def ngrams(table: pd.DataFrame, options: str | None = None) -> go.Figure:
    """Return a figure of the KL divergences of n-grams from the model over steps. Where the model leaves the n-grams of one order
    for those of the next, the curves cross, which is marked. Raises PicoError if the table has not two of them.
    """
    rows = select_probe(table, "ngram", options)
    orders = {f"{order}gram": rows[rows["metric"] == f"ngram.{order}gram_kl"] for order in ("uni", "bi", "tri")}
    curves = {name: own for name, own in orders.items() if own["value"].notna().any()}
    if len(curves) < 2:
        raise PicoError("the table has no KL divergence of two orders of n-grams")
    runs, traces, told_of = list(dict.fromkeys(rows["run"])), list[go.Scatter](), list[str]()
    for place, run in enumerate(runs):
        shown = {"run": place}
        own = {name: curve[curve["run"] == run].sort_values("step") for name, curve in curves.items()}
        for number, (name, curve) in enumerate(own.items()):
            traces += one_run(curve, name, panel=0, meaning={"category": number}, shown=shown)
        for low, high in pairwise(own):
            for step, value in crossings(own[low], own[high]):
                about = f"{low} and {high} cross"
                traces.append(spot([step], [value], "crossing", shown=shown, about=about))
                told_of.append(f"{run}: the curves of {low} and {high} cross at about step {step:,.0f}.")
    drawn = pd.concat(curves.values())
    title, note = title_of(rows, "N-grams: KL divergence from the model"), " ".join([*told_of, told(drawn)]).strip()
    control, panel = Control("run", "Run", runs), Panel("", "nats")
    return figure(
        title,
        traces,
        [panel],
        controls=[control],
        log="xy",
        logged=logged(drawn),
        height=380,
        note=note,
        terms=terms(drawn),
    )


def crossings(one: pd.DataFrame, other: pd.DataFrame) -> list[tuple[float, float]]:
    """Return (step, value) where two curves cross, by straight lines between the steps that both have."""
    both = one[["step", "value"]].merge(other[["step", "value"]], on="step").dropna()
    steps, values, others = (both[name].to_numpy(dtype=float) for name in ("step", "value_x", "value_y"))
    apart = values - others
    found = []
    for before in np.flatnonzero(apart[:-1] * apart[1:] < 0):
        share = apart[before] / (apart[before] - apart[before + 1])
        step, value = (line[before] + share * (line[before + 1] - line[before]) for line in (steps, values))
        found.append((float(step), float(value)))
    return found


def memorization(table: pd.DataFrame, options: str | None = None) -> go.Figure:
    """Return a figure of the loss of training rows by the batches that they were first seen in, beside rows not seen. A thick
    part of a line marks the steps at which its rows are seen. Raises PicoError if the table has no such rows.
    """
    bands = reading(table, "memorization.band_loss", options)
    rows = select_probe(table, "memorization", options)
    unseen = rows[rows["metric"] == "memorization.unseen_loss"]
    labels, runs = sorted(map(str, bands["bin"].unique()), key=natural), list(dict.fromkeys(rows["run"]))
    traces = list[go.Scatter]()
    for place, run in enumerate(runs):
        shown = {"run": place}
        for number, batches in enumerate(labels):
            own = bands[(bands["run"] == run) & (bands["bin"] == batches)].sort_values("step")
            meaning = {"depth": number / max(1, len(labels) - 1)}
            words = f"batches {batches}" if "-" in batches else f"batch {batches}"
            traces.append(
                one_run(own, words, panel=0, meaning=meaning, shown=shown)[-1]
            )  # so many bands would hide each other
            traces += _seen_here(own, batches, meaning, shown)
        own = unseen[unseen["run"] == run]
        traces += [
            trace.update(line_dash="dash") for trace in one_run(own, "not seen", panel=0, meaning={}, shown=shown)
        ]
    drawn = pd.concat([bands, unseen])
    return figure(
        title_of(rows, "Memorization: loss by when rows were seen"), traces, [Panel("", units_of(bands))],
        controls=[Control("run", "Run", runs)], log="xy", logged=logged(drawn), height=420, note=gaps(drawn), terms=terms(drawn),
    )  # fmt: skip


def _seen_here(rows: pd.DataFrame, batches: str, meaning: dict[str, Any], shown: dict[str, int]) -> list[go.Scatter]:
    """Return a thick line from the first to after the last batch of a range, along the curve. A checkpoint of step S has seen the
    batches 0 to S - 1.
    """
    numbers = [int(number) for number in re.findall(r"\d+", batches)]
    known = rows[rows["value"].notna()]
    if not numbers or known.empty:
        return []
    steps, values = known["step"].to_numpy(dtype=float), known["value"].to_numpy(dtype=float)
    first, end = max(numbers[0], steps[0]), min(numbers[-1] + 1, steps[-1])
    if end < first:
        return []
    at = np.unique([first, *steps[(steps > first) & (steps < end)], end])
    made = mark(at, np.interp(at, steps, values), "seen here", 0, shown, meaning)
    return [made.update(line={"dash": "solid", "width": 7})]


CANARY = re.compile(r"(?:(?P<group>.*): )?(?:in batches (?P<batches>\d+(?:, \d+)*)|never seen)")


def canaries(table: pd.DataFrame, options: str | None = None) -> go.Figure:
    """Return a figure of the loss of planted canaries over steps, with marks where they were shown, and of their exposure. A
    group of canaries has one colour. Raises PicoError if the table has none.
    """
    losses = reading(table, "memorization.canary_loss", options)
    rows = select_probe(table, "memorization", options)
    exposure = rows[(rows["metric"] == "memorization.exposure") & rows["value"].notna()]
    told_of = {bin: CANARY.match(note) for bin, note in zip(losses["bin"], losses["note"].fillna(""))}
    names = {bin: (found and found["group"]) or f"canary {bin}" for bin, found in told_of.items()}
    groups, runs, traces = list(dict.fromkeys(names.values())), list(dict.fromkeys(rows["run"])), list[go.Scatter]()
    for place, run in enumerate(runs):
        for panel, of_panel in enumerate((losses, exposure)):
            mine = of_panel[of_panel["run"] == run]
            for bin in sorted(map(str, mine["bin"].unique()), key=natural):
                own, name = mine[mine["bin"] == bin].sort_values("step"), names.get(bin, f"canary {bin}")
                style: dict[str, Any] = {
                    "panel": panel,
                    "meaning": {"category": groups.index(name)},
                    "shown": {"run": place},
                }
                traces += one_run(own, name, about=f"canary {bin}, {name}", **style)
                traces += _shown_here(own, told_of.get(bin), bin, **style) if panel == 0 else []
            traces += chance_line(mine, panel, {"run": place})
    panels = [Panel("loss", units_of(losses)), *([Panel("exposure", units_of(exposure))] if len(exposure) else [])]
    drawn = pd.concat([losses, exposure])
    title, control = title_of(rows, "Canaries"), Control("run", "Run", runs)
    return figure(
        title,
        traces,
        panels,
        controls=[control],
        log="xy",
        logged=logged(drawn),
        height=340,
        note=gaps(drawn),
        terms=terms(drawn),
    )


def _shown_here(rows: pd.DataFrame, found: "re.Match[str] | None", bin: str, **style: Any) -> list[go.Scatter]:
    """Return marks on the curve of a canary, at the batches that held it as far as the curve goes."""
    known = rows[rows["value"].notna()]
    if found is None or not found["batches"] or known.empty:
        return []
    steps, values = known["step"].to_numpy(dtype=float), known["value"].to_numpy(dtype=float)
    at = np.array([batch for batch in map(int, found["batches"].split(", ")) if steps[0] <= batch <= steps[-1]])
    return (
        [spot(at, np.interp(at, steps, values), "shown here", about=f"canary {bin}: shown", **style)] if len(at) else []
    )


def acquisition(
    table: pd.DataFrame, options: str | None = None, *, words: Mapping[str, str] | None = None
) -> go.Figure:
    """Return a map of the surprisal of tokens over steps, sorted by the age at which they are acquired, earliest at the top.

    Of many tokens some are shown, at equal distances in this order. words: token id -> its text, for the labels. Raises PicoError
    if the table has no surprisal.
    """
    rows, everything = reading(table, "token_curves.surprisal", options), select_probe(table, "token_curves", options)
    ages = everything[(everything["metric"] == "token_curves.age_of_acquisition")]
    runs, traces, told_of = list(dict.fromkeys(rows["run"])), list[go.Heatmap](), list[str]()
    for place, run in enumerate(runs):
        own = rows[(rows["run"] == run) & (rows["bin"].fillna("") != "")]
        of_run = ages[(ages["run"] == run) & ages["value"].notna()].set_index("bin")["value"]
        tokens = sorted(map(str, own["bin"].unique()), key=lambda token: (of_run.get(token, math.inf), natural(token)))
        shown = some(tokens, MOST_BINS)[::-1]
        if len(shown) < len(tokens):
            told_of.append(
                f"{run}: {len(shown)} of {len(tokens):,} tokens are shown, at equal distances in the order of their age."
            )
        steps, by_token = np.sort(own["step"].unique()), dict(list(own.groupby("bin")))
        values = np.array([by_step(by_token[token], steps) for token in shown])
        names = [f"{(words or {})[token]!r} {token}" if token in (words or {}) else f"token {token}" for token in shown]
        traces.append(cells(steps, list(map(label, names)), values, {"matter": 0, "run": place}))
    drawn = pd.concat([rows, ages])
    return map_figure(
        title_of(rows, "Tokens by age of acquisition"), traces, Panel("", y="token"), [Control("run", "Run", runs)],
        " ".join(filter(None, [*told_of, told(drawn)])), terms(drawn),
    )  # fmt: skip
