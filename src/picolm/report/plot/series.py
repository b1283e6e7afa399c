"""Select what is drawn from the long table: one panel per matrix, one series per layer and head, gaps for missing
values.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd

from picolm.address import Address
from picolm.errors import PicoError
from picolm.registry import did_you_mean
from picolm.report.plot.targets import Target, targets

STEP = "step (updates)"
FAMILIES = ("behaviour", "landscape")  # the kinds of rows that a probe gave


class Matter(NamedTuple):
    """What a panel shows: a matrix of each layer, or of the whole model, and what it is compared with."""

    component: str
    module: str
    kind: str
    split: str
    against: str

    @property
    def title(self) -> str:
        """`attention.out · gradients (train) · with step 300`; a circuit has its own name, a probe asks the whole model."""
        own = self.component in ("simple", self.module) or not self.module
        name = self.module if own else f"{self.component} {self.module}"
        kind = f"{self.kind} ({self.split})" if self.split else self.kind
        return " · ".join(filter(None, (name, kind, self.against)))


def named(metric: str, options: str) -> str:
    """Return a metric and its options as one name: `norm (norm_type=nuclear)`."""
    return f"{metric} ({options})" if options else metric


def of_probes(table: pd.DataFrame) -> pd.Series:
    """Return which rows are readings of probes; the others are metrics of tensors."""
    return table["kind"].isin(FAMILIES) & (table["component"] == "model")


def metrics(table: pd.DataFrame) -> list[tuple[str, str]]:
    """Return the metrics of tensors of a table with their options, in order; for those of probes see `readings.probes`."""
    pairs = table.loc[~of_probes(table), ["metric", "options"]].fillna("").drop_duplicates()
    return list(zip(pairs["metric"], pairs["options"]))


def select(table: pd.DataFrame, metric: str, options: str | None = None) -> pd.DataFrame:
    """Return the rows of a metric. Raises PicoError, with the possible choices, if the table lacks it, or has it with
    several options and `options` is not given; and for a reading of a probe that has bins.
    """
    there = list(table.loc[table["metric"] == metric, "options"].fillna("").unique())
    if not there:
        known = list(table["metric"].unique())
        raise PicoError(
            f"the table has no metric {metric!r}{did_you_mean(metric, known)} (there are: {', '.join(known)})"
        )
    if options is None and len(there) > 1:
        raise PicoError(
            f"the table has {metric} with several options; choose one with options=: {', '.join(map(repr, there))}"
        )
    rows = table[
        (table["metric"] == metric) & (table["options"].fillna("") == (there[0] if options is None else options))
    ]
    if (rows["bin"].fillna("") != "").any():
        raise PicoError(f"{metric} has a value for each bin, whose mean says nothing; plot.bins draws them")
    return rows


def matters(rows: pd.DataFrame) -> Iterator[tuple[Matter, pd.DataFrame]]:
    """Yield the rows of one metric by panel and target, without comparisons of all layers or steps (see `pairs`)."""
    own = _with_targets(rows)
    own = own[~own["of_layers"] & ~own["of_steps"]]
    for key, group in own.groupby(["component", "part", "kind", "split", "against"], sort=False, dropna=False):
        yield Matter(*map(_word, key)), group


def pairs(rows: pd.DataFrame, relation: str) -> Iterator[tuple[Matter, pd.DataFrame]]:
    """Yield the rows that compare every layer with every layer (`relation` "layers"), or every step with every step
    ("steps").

    If the target has both, only layers of the same step, or steps of the same layer.
    """
    several = _with_targets(rows)
    same = {"layers": several["against_step"] == several["step"], "steps": several["against_layer"] == several["layer"]}
    other = "of_steps" if relation == "layers" else "of_layers"
    several = several[several[f"of_{relation}"] & (~several[other] | same[relation].fillna(True).astype(bool))]
    for (*key, words), group in several.groupby(
        ["component", "part", "kind", "split", "run", "against"], sort=False, dropna=False
    ):
        component, part, kind, split, _ = map(_word, key)
        yield Matter(component, part, kind, split, words), group


def _with_targets(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows with their part of a layer and with their target, in words and by kind."""
    asked = targets(rows)
    known = {words: Target.parse(words) for words in asked.unique()}
    return rows.assign(
        part=_parts(rows),
        against=asked.map(
            {
                words: (target._replace(step="") if target.step == "all" else target).words
                for words, target in known.items()
            }
        ),
        of_layers=asked.map({words: target.layer == "all" for words, target in known.items()}).astype(bool),
        of_steps=asked.map({words: target.step == "all" for words, target in known.items()}).astype(bool),
    )


def _word(value: object) -> str:
    """Return the text of a cell; empty if it is missing."""
    return "" if pd.isna(value) else str(value)


def _parts(rows: pd.DataFrame) -> pd.Series:
    """Return the name of the matrix within its layer, for each row."""
    known = {module: Address("", "", module).suffix or "block" for module in rows["module"].unique()}
    return rows["module"].map(known).mask(of_probes(rows), "")


def by_step(rows: pd.DataFrame, steps: np.ndarray) -> np.ndarray:
    """Return the value at each of `steps`; the mean of the finite values over heads if there are several."""
    values, at = rows["value"].to_numpy(dtype=float), np.searchsorted(steps, rows["step"].to_numpy())
    drawn = np.full(len(steps), np.nan)
    if len(np.unique(at)) == len(at):
        drawn[at] = values
        return drawn
    finite = np.isfinite(values)
    counts = np.bincount(at[finite], minlength=len(steps))
    sums = np.bincount(at[finite], values[finite], minlength=len(steps))
    return np.divide(sums, counts, out=drawn, where=counts > 0)


def gaps(rows: pd.DataFrame) -> str:
    """Return what cannot be drawn, in words: how many values are missing and why, how many are infinite."""
    values = rows["value"].to_numpy(dtype=float)
    missing, infinite = int(np.isnan(values).sum()), int(np.isinf(values).sum())
    words = []
    if missing:
        reasons = rows.loc[np.isnan(values), "reason"].dropna().value_counts()
        why = (
            f" ({'; '.join(f'{reason}: {count:,}' for reason, count in reasons.head(3).items())})"
            if len(reasons)
            else ""
        )
        words.append(f"{missing:,} of {len(rows):,} values are missing{why}: gaps in the lines.")
    if infinite:
        words.append(f"{infinite:,} values are infinite and have no place in the figure; the table has them.")
    return " ".join(words)
