"""Select the readings of probes from the long table, and say in words what they are.

A reading is `probe.reading` in the column `metric`; where a probe could not be run at all, the metric is the name of the probe
alone.
"""

import math
import re
from collections.abc import Iterator

import numpy as np
import pandas as pd

from picolm.errors import PicoError
from picolm.registry import did_you_mean
from picolm.report.plot.series import gaps, matters, named, of_probes

DIGEST = 12  # characters of a digest that are shown
MOST_NOTES = 6  # of more notes only one is told


def probe_of(metric: str) -> str:
    """Return the probe of a metric: that of `calibration.ece` is `calibration`, that of `my.file:mine.depth` `my.file:mine`."""
    file, colon, rest = metric.rpartition(":")
    return file + colon + rest.partition(".")[0]


def reading_of(metric: str) -> str:
    """Return the name of the reading of a metric; empty for a probe that could not be run."""
    return metric[len(probe_of(metric)) + 1 :]


def probes(table: pd.DataFrame) -> list[tuple[str, str]]:
    """Return the probes of a table with their options, in order."""
    own = table.loc[of_probes(table), ["metric", "options"]].fillna("").drop_duplicates()
    return list(dict.fromkeys((probe_of(metric), options) for metric, options in zip(own["metric"], own["options"])))


def select_probe(table: pd.DataFrame, probe: str, options: str | None = None) -> pd.DataFrame:
    """Return the rows of a probe. Raises PicoError, with the possible choices, as `series.select` does for a metric."""
    found = probes(table)
    there, known = [words for name, words in found if name == probe], list(dict.fromkeys(name for name, _ in found))
    if not there:
        raise PicoError(
            f"the table has no probe {probe!r}{did_you_mean(probe, known)} (there are: {', '.join(known) or 'none'})"
        )
    if options is None and len(there) > 1:
        raise PicoError(
            f"the table has {probe} with several options; choose one with options=: {', '.join(map(repr, there))}"
        )
    own = table["metric"].map({metric: probe_of(metric) for metric in table["metric"].unique()}) == probe
    asked = table["options"].fillna("") == (there[0] if options is None else options)
    return table[own & asked & of_probes(table)]


def read(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of readings, without those that say that the probe could not be run."""
    return rows[rows["value"].notna() | (rows["metric"].map(reading_of) != "")]


def reading(table: pd.DataFrame, metric: str, options: str | None = None) -> pd.DataFrame:
    """Return the rows of one reading, `probe.reading`. Raises PicoError if the table lacks it, or has it with several options."""
    rows = select_probe(table, probe_of(metric), options)
    known = list(rows["metric"].unique())
    if metric not in known:
        raise PicoError(
            f"the table has no reading {metric!r}{did_you_mean(metric, known)} (there are: {', '.join(known)})"
        )
    return rows[rows["metric"] == metric]


def title_of(rows: pd.DataFrame, metric: str) -> str:
    """Return a probe or one of its readings with its options, as the title of a figure."""
    return named(metric, rows["options"].fillna("").iloc[0])


def panels_of(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the rows of each panel with its title: a reading, and what it is compared with. Both of a split if there are two."""
    splits = rows["split"].fillna("").nunique() > 1
    for metric, own in rows.groupby("metric", sort=False):
        for matter, group in matters(own):
            words = (reading_of(str(metric)) or str(metric), matter.split if splits else "", matter.against)
            yield " · ".join(filter(None, words)), group


def units_of(rows: pd.DataFrame) -> str:
    """Return the units of a reading, or else its name, as the title of an axis."""
    metric = str(rows["metric"].iloc[0])
    return next((units for units in rows["units"].dropna() if units), "") or reading_of(metric) or metric


def depth(rows: pd.DataFrame) -> pd.Series:
    """Return for each row what it belongs to: "model", "layer" or "bin" (of the model or a layer)."""
    place = rows["layer"].notna().map({True: "layer", False: "model"})
    return place.mask(rows["bin"].fillna("") != "", "bin")


def shape_of(rows: pd.DataFrame) -> str:
    """Return what the rows of one reading belong to: "bin", "layer" or "model", the finest that there is."""
    there = set(depth(rows))
    return next((name for name in ("bin", "layer") if name in there), "model")


def chance_of(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray] | None:
    """Return (steps, chance level at each), where all rows of a step have the same one; None if it is not known, or differs."""
    known = rows[np.isfinite(rows["chance"].to_numpy(dtype=float))].groupby("step")["chance"].agg(["min", "max"])
    low, high = known["min"].to_numpy(), known["max"].to_numpy()
    if known.empty or not np.allclose(low, high, rtol=1e-6, atol=0):
        return None
    return known.index.to_numpy(), low


def terms(rows: pd.DataFrame) -> list[tuple[str, str]]:
    """Return (reading, what it is) for each reading: its definition, its units, its chance level; and what they were asked on."""
    made, asked = [], dict[str, str]()
    for metric, own in rows.groupby("metric", sort=False):
        name = reading_of(str(metric)) or str(metric)
        definition, units = (
            next((words for words in own[column].dropna() if words), "") for column in ("definition", "units")
        )
        said = [definition, f"in {units}" if units else "", _chance(own)]
        made.append((name, "; ".join(filter(None, said)) + "."))
        asked[name] = _asked_on(own)
    sets = [
        (words, [name for name in asked if asked[name] == words]) for words in dict.fromkeys(asked.values()) if words
    ]
    for words, names in sets:
        made.append(("asked on" if len(names) == len(asked) else f"{', '.join(names)} asked on", words + "."))
    return made


def _chance(rows: pd.DataFrame) -> str:
    known = rows["chance"].to_numpy(dtype=float)
    known = known[np.isfinite(known)]
    if not known.size:
        return ""
    low, high = known.min(), known.max()
    return f"by chance {low:.3g}" if math.isclose(low, high, rel_tol=1e-3) else f"by chance {low:.3g} to {high:.3g}"


def _asked_on(rows: pd.DataFrame) -> str:
    digests = list(dict.fromkeys(digest for digest in rows["rows"].dropna() if digest))
    if not digests:
        return ""
    shown = f"rows {digests[0][:DIGEST]}"
    return shown if len(digests) == 1 else f"{shown} and {len(digests) - 1} other sets of rows"


def told(rows: pd.DataFrame) -> str:
    """Return what readers have to know of values: notes, with the number of values that have them, and gaps."""
    noted = rows[rows["note"].fillna("") != ""]
    before = (noted["metric"].map(reading_of) + ": ") if rows["metric"].nunique() > 1 else ""
    notes = (before + noted["note"].astype(str)).value_counts()
    if len(notes) > MOST_NOTES:
        return " ".join(
            filter(None, [gaps(rows), f"The table has notes on {len(noted):,} values, such as: {notes.index[0]}."])
        )
    said = (
        f"{note} ({'all' if count == len(rows) else f'{count:,} of {len(rows):,}'} values)."
        for note, count in notes.items()
    )
    return " ".join(filter(None, [gaps(rows), *said]))


def logged(rows: pd.DataFrame) -> str:
    """Return "x" if the steps lie so that most of them are in the first quarter, as with logarithmic schedules, else nothing."""
    steps = np.unique(rows["step"])
    return "x" if len(steps) > 4 and np.median(steps) * 4 <= steps.max() else ""


def natural(name: str) -> tuple[tuple[int, float, str], ...]:
    """Return a key that sorts names by the numbers in them: 9 before 10, 0.5-1 after 0-0.5."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)", name)
    return tuple((0, float(part), "") if place % 2 else (1, 0.0, part) for place, part in enumerate(parts) if part)
