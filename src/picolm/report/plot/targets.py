"""What the rows of a table are compared with: the requested target, and its name in titles.

Tables of version 0.1.0 do not contain the requested target; it is inferred from what the rows were compared with.
"""

import re
from typing import NamedTuple

import numpy as np
import pandas as pd

_TARGET = re.compile(
    r"(?:(?P<step>first|last|previous|all|\d+)(?: |$))?"
    r"(?:run (?P<run>.+?)(?: (?=layer (?:all|\d+)$)|$))?"
    r"(?:layer (?P<layer>all|\d+))?"
)
_STEPS = {"": "", "first": "with the first step", "last": "with the last step", "previous": "with the step before"}
SUBJECT = ["run", "component", "kind", "split", "module", "head", "bin"]


class Target(NamedTuple):
    """A target in its parts: step (`last`, `300`, `all`, …), run, layer (`2`, `all`). A part is empty if it is the
    same.
    """

    step: str
    run: str
    layer: str

    @classmethod
    def parse(cls, words: str) -> "Target":
        """Return the parts of a value of the column `target`; an unknown one is kept whole, as a run."""
        match = _TARGET.fullmatch("" if words == "same" else words)
        return cls(*(match[name] or "" for name in cls._fields)) if match else cls("", words, "")

    @property
    def words(self) -> str:
        """The target in titles: `with step 300`, `with the step before`, `with the last step of wide layer 2`."""
        step = _STEPS.get(self.step, "with every step" if self.step == "all" else f"with step {self.step}")
        run = f"{step} of {self.run}" if step and self.run else f"with {self.run}" if self.run else step
        return " ".join(filter(None, (run, f"layer {self.layer}" if self.layer not in ("", "all") else "")))


def targets(rows: pd.DataFrame) -> pd.Series:
    """Return the requested target of each row, as in the column `target`; empty for metrics of one tensor."""
    asked = rows["target"].fillna("").astype(str)
    unsaid = (asked == "") & rows["against_step"].notna()
    return asked.mask(unsaid, _inferred(rows)) if unsaid.any() else asked


def _inferred(rows: pd.DataFrame) -> pd.Series:
    other_run = rows["against_run"].fillna("").where(rows["against_run"] != rows["run"], "")
    run = ("run " + other_run).where(other_run != "", "")
    step = _inferred_step(rows).where(other_run == "", "")
    each = rows.groupby([*SUBJECT, "step", "against_run", "against_step"], dropna=False, sort=False)
    layer = (
        ("layer " + rows["against_layer"].astype("string")).where(rows["against_layer"] != rows["layer"], "").fillna("")
    )
    layer = layer.mask(each["against_layer"].transform("nunique") > 1, "layer all")
    return (step + " " + run + " " + layer).str.split().str.join(" ")


def _inferred_step(rows: pd.DataFrame) -> pd.Series:
    """Return `all` if each step is compared with every other, `previous` if each has its own partner, else the number
    or `last`.
    """
    against, matter = rows["against_step"], ["run", "component", "kind", "split", "against_run"]
    there = rows.groupby(matter, dropna=False)["step"].transform("nunique")
    met = rows.groupby([*SUBJECT, "step", "against_run"], dropna=False, sort=False)["against_step"].transform("nunique")
    used = rows.groupby([*matter, "against_step"], dropna=False)["step"].transform("nunique")
    steps = {
        run: np.unique(np.concatenate([own["step"], own["against_step"].dropna()]).astype(int))
        for run, own in rows.groupby("run")
    }
    before = pd.Series([_before(steps[run], step) for run, step in zip(rows["run"], rows["step"])], index=rows.index)
    moving = (used == 1) & (against == before).fillna(False)
    alone = moving.groupby([rows[name] for name in matter], dropna=False).transform("sum") == 1
    last = rows.groupby("run")["step"].transform("max")
    named = (
        against.astype("string").fillna("").mask(against == rows["step"], "").mask(used > 1, against.astype("string"))
    )
    if last.nunique() > 1:  # runs of different lengths: their last steps get one name
        named = named.mask((used > 1) & (against == last).fillna(False), "last")
    return named.mask(moving & ~alone, "previous").mask((met > 2) & (met == there), "all").astype(str)


def _before(steps: np.ndarray, step: int) -> int:
    place = int(np.searchsorted(steps, step))
    return int(steps[place - 1]) if place else -1
