"""The input of a report: runs, and the tables of analyses, each read once."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from picolm.analyze.groups import alike, config_of
from picolm.analyze.table import RESULTS, load
from picolm.errors import PicoError, StoreError
from picolm.schema import flatten
from picolm.store import Run

if TYPE_CHECKING:
    import pandas as pd


@dataclass
class Analysis:
    """The table of an analysis, and where it was read from. Its name is that of its folder."""

    place: str
    table: "pd.DataFrame"

    @property
    def name(self) -> str:
        return Path(self.place).resolve().name


@dataclass
class Material:
    """Everything that a section can use. command: the command line that makes this report again. title: of the page.

    problems: sentences on what could not be read and is left out. labels: for each run, the name of its group of runs
    that differ only in seeds; if empty, the configurations of the runs decide.
    """

    runs: list[Run]
    analyses: list[Analysis]
    places: list[str] = field(default_factory=list)
    command: str = ""
    title: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @cached_property
    def log(self) -> "pd.DataFrame":
        """The logged numbers of all runs: run, step, name, value. Results of `pico evaluate` replace logged ones."""
        from picolm.report.plot import log_table

        return log_table({name: [*run.read_metrics(), *self._evaluated(run)] for name, run in self.named.items()})

    def _evaluated(self, run: Run) -> Iterator[dict[str, Any]]:
        """Yield the results in eval_results/ as entries of the log, with the names `val/…`."""
        for step in run.evaluated_steps():
            try:
                results = flatten(run.evaluation(step) or {})
            except StoreError as error:
                self.tell(f"The results of an evaluation are left out: {error}")
                continue
            yield {"step": step} | {f"val/{name}": value for name, value in results.items()}

    def tell(self, problem: str) -> None:
        """Add a sentence to `problems`, once; `pico report` logs it, and the report shows it under "Left out"."""
        if problem not in self.problems:
            self.problems.append(problem)

    @cached_property
    def named(self) -> dict[str, Run]:
        """The runs by name; by place if two runs have the same name."""
        names = [run.name for run in self.runs]
        return {
            run.name if names.count(run.name) == 1 else place: run
            for run, place in zip(self.runs, self.places, strict=True)
        }

    @cached_property
    def groups(self) -> dict[str, str]:
        """For each run, the name of its group: runs that differ only in seeds and names."""
        if self.labels:
            return self.labels
        return alike({name: config_of(run) for name, run in self.named.items()})[0]


def gather(places: Sequence[str], analyses: Sequence[str], own: Sequence[str] = ()) -> Material:
    """Open runs and read tables. Raises PicoError that names the place and what is wrong with it."""
    tables = [Analysis(str(place), _table(place)) for place in analyses]
    if not places and not tables:
        raise PicoError("a report of what? pico report RUN… [--analysis DIR…]")
    runs = [Run.open(place) for place in places]
    options = [("--analysis", str(place)) for place in analyses] + [("--section", name) for name in own]
    command = shlex.join(["pico", "report", *places, *(word for option in options for word in option)])
    return Material(runs, tables, list(map(str, places)), command)


def _table(place: str) -> "pd.DataFrame":
    path = Path(place)
    if not (path / RESULTS if path.is_dir() else path).is_file():
        raise PicoError(f"{place}: no table here; expected {RESULTS} of an analysis, which pico analyze writes")
    try:
        return load(path)
    except (OSError, ValueError, KeyError) as error:
        raise PicoError(f"{place}: cannot be read as the table of an analysis ({error})") from error
