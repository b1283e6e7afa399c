"""What the figures of the standing experiments share: lines with their 95 % bands over runs, and cells of tables."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd

from picolm.analyze.intervals import difference, interval

HERE = Path(__file__).parent
COLORS = ["#d9a514", "#35b779", "#2d708e", "#482677"]  # small to large; printed in grey, light to dark
matplotlib.use("svg")
matplotlib.rcParams |= {
    "svg.hashsalt": "pico", "svg.fonttype": "none", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlesize": 10,
}  # fmt: skip


def band(frame: pd.DataFrame, value: str) -> pd.DataFrame:
    """Mean and 95 % interval over runs, by step; what a run has several of (layers) is averaged within it first."""
    each = frame.groupby(["step", "run"])[value].mean()
    rows = [(step, *interval(part.tolist())[:3]) for step, part in each.groupby("step")]
    return pd.DataFrame(rows, columns=["step", "mean", "low", "high"])


def lines(
    axes: Any, frame: pd.DataFrame, groups: Sequence[str], value: str, labels: Sequence[str], **style: Any
) -> None:
    """A line with its band per group, and a thin one per run."""
    for color, group, label in zip(COLORS, groups, labels):
        own = frame[frame["group"] == group]
        for _, run in own.groupby(["run", "step"])[value].mean().groupby("run"):
            axes.plot(run.index.get_level_values("step"), run, color=color, linewidth=0.6, alpha=0.6)
        line = band(own, value)
        axes.plot(line["step"], line["mean"], color=color, label=label, linewidth=1.6, **style)
        axes.fill_between(line["step"], line["low"], line["high"], color=color, alpha=0.2, linewidth=0)


def save(figure: Any, name: str) -> None:
    figure.savefig(HERE / f"{name}.svg", metadata={"Date": None})


def cell(found: tuple[float, ...], digits: int = 3) -> str:
    """Return (mean, low, high, n) as text."""
    mean, low, high, n = found
    if not n or math.isnan(mean):
        return "not in every layer"
    spread = "" if math.isnan(high) else f" ± {(high - low) / 2:.{digits}f}"
    return f"{mean:.{digits}f}{spread}" + ("" if n == 3 else f" (n = {n:.0f})")


def apart(one: pd.Series, other: pd.Series) -> str:
    """The difference of two means over runs with its 95 % interval (Welch); empty where a run has no value."""
    if one.isna().any() or other.isna().any():
        return ""
    found, low, high = difference(one.tolist(), other.tolist())
    return f"{found:+.3f} ± {(high - low) / 2:.3f}"
