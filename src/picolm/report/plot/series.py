"""From the long table to what is drawn: one panel per matrix, one series per layer and head; what is missing stays missing."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd

from picolm.address import Address
from picolm.errors import PicoError
from picolm.registry import did_you_mean

STEP = "step (updates)"


class Matter(NamedTuple):
    """What a panel shows: a matrix of each layer, or of the whole model, and what it is compared with."""

    component: str
    module: str
    kind: str
    split: str
    against: str

    @property
    def title(self) -> str:
        """`attention.o_proj · gradients (train) · with step 300`; a circuit is called by its own name."""
        name = self.module if self.component in ("simple", self.module) else f"{self.component} {self.module}"
        kind = f"{self.kind} ({self.split})" if self.split else self.kind
        return " · ".join(filter(None, (name, kind, self.against)))


def named(metric: str, options: str) -> str:
    """A metric and its options as one name: `norm (norm_type=nuclear)`."""
    return f"{metric} ({options})" if options else metric


def metrics(table: pd.DataFrame) -> list[tuple[str, str]]:
    """The metrics of a table with their options, in order."""
    pairs = table[["metric", "options"]].fillna("").drop_duplicates()
    return list(zip(pairs["metric"], pairs["options"]))


def select(table: pd.DataFrame, metric: str, options: str | None = None) -> pd.DataFrame:
    """The rows of a metric. Raises PicoError that names what there is; without `options`, where there are several."""
    there = [found for name, found in metrics(table) if name == metric]
    if not there:
        known = list(table["metric"].unique())
        raise PicoError(
            f"the table has no metric {metric!r}{did_you_mean(metric, known)} (there are: {', '.join(known)})"
        )
    if options is None and len(there) > 1:
        raise PicoError(
            f"the table has {metric} with several options; choose one with options=: {', '.join(map(repr, there))}"
        )
    return table[
        (table["metric"] == metric) & (table["options"].fillna("") == (there[0] if options is None else options))
    ]


def matters(rows: pd.DataFrame) -> Iterator[tuple[Matter, pd.DataFrame]]:
    """The rows of one metric by panel, without matrices of layers or of steps (see `pairs`)."""
    own = rows.assign(part=_parts(rows), relation=_relations(rows)).query("relation == 'one'")
    own = own.assign(against=_against(own))
    keys = ["component", "part", "kind", "split", "against"]
    for key, group in own.groupby(keys, sort=False, dropna=False):
        yield Matter(*map(_word, key)), group


def pairs(rows: pd.DataFrame, relation: str) -> Iterator[tuple[Matter, pd.DataFrame]]:
    """The rows that compare every layer with every layer (`relation` "layers"), or every step with every step ("steps")."""
    several = rows.assign(part=_parts(rows), relation=_relations(rows))
    several = several[several["relation"] == relation]
    keys = ["component", "part", "kind", "split", "run", "against_run"]
    for key, group in several.groupby(keys, sort=False, dropna=False):
        component, part, kind, split, run, other = map(_word, key)
        yield Matter(component, part, kind, split, f"with {other}" if other not in ("", run) else ""), group


def _word(value: object) -> str:
    """Text of a cell; empty where it is missing."""
    return "" if pd.isna(value) else str(value)


def _parts(rows: pd.DataFrame) -> pd.Series:
    """The name of the matrix within its layer."""
    known = {module: Address("", "", module).suffix or "block" for module in rows["module"].unique()}
    return rows["module"].map(known)


def _relations(rows: pd.DataFrame) -> pd.Series:
    """Per row: "layers" or "steps" where the same matrix is compared with several of them, else "one"."""
    keys = ["run", "step", "split", "component", "kind", "module", "head", "against_run"]
    groups = rows.groupby(keys, dropna=False, sort=False)
    layers, steps = (groups[name].transform("nunique") for name in ("against_layer", "against_step"))
    return pd.Series(np.select([layers > 1, steps > 2], ["layers", "steps"], "one"), index=rows.index)


def _against(rows: pd.DataFrame) -> pd.Series:
    """Per row, the partner in words; empty for metrics of one tensor."""
    other_run = rows["against_run"].fillna("").where(rows["against_run"] != rows["run"], "")
    keys = ["run", "component", "kind", "split", "against_step"]
    fixed = rows.groupby(keys, dropna=False)["step"].transform("nunique") > 1
    last = rows.groupby("run")["step"].transform("max")
    moving = rows["against_step"].notna() & ~fixed & (rows["against_step"] != rows["step"])
    step = ("with step " + rows["against_step"].astype("string")).where(fixed, "").fillna("")
    if last.nunique() > 1:  # runs of different length: what they are compared with has one name
        step = step.mask(fixed & (rows["against_step"] == last).fillna(False), "with the last step")
    step = step.mask(moving, "with the step before").where(other_run == "", "")
    layer = (
        ("layer " + rows["against_layer"].astype("string")).where(rows["against_layer"] != rows["layer"], "").fillna("")
    )
    words = step + other_run.map(lambda run: f"with {run}" if run else "")
    return (words + " " + layer).str.strip()


def by_step(rows: pd.DataFrame, steps: np.ndarray) -> np.ndarray:
    """The value at each of `steps`; the mean over heads where there are several, without those that are not finite."""
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
    """What cannot be drawn, in words: how many values are missing and why, how many are infinite."""
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
