"""What a training left: its log, its evaluations, and the tables of analyses that lie there, as series over steps."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from picolm.analyze.table import RESULTS
from picolm.errors import PicoError
from picolm.schema import flatten
from picolm.store import Run

if TYPE_CHECKING:
    import pandas as pd

UNITS = {
    "nats_per_token": "nats per token", "bits_per_byte": "bits per byte", "loss": "nats per token", "tokens": "tokens",
    "tokens_per_s": "tokens per second", "flops_per_s": "FLOP per second", "share_of_peak": "share", "lr": "",
}  # fmt: skip
MOST_SERIES = 400  # of an analysis and a metric: the heads of large models
_OF_A_SERIES = ("metric", "options", "component", "kind", "split", "module", "layer", "head", "bin", "target")
Series = dict[str, Any]


def training(run: Run, analyses: Sequence[str] = ()) -> dict[str, Any]:
    """Return all series of a run. Of several values of one step the last counts, as everywhere."""
    entries = run.read_metrics()
    return {
        "series": list(_series(entries)),
        "evaluations": list(_series(_evaluated(run))),
        "analyses": [found for place in analyses_of(analyses) for found in _of_analysis(place, run.name)],
    }


def _series(entries: Any) -> Iterator[Series]:
    values: dict[str, dict[int, Any]] = {}
    for entry in entries:
        for name, value in entry.items():
            if name != "step" and isinstance(value, int | float):
                values.setdefault(name, {})[entry["step"]] = value if math.isfinite(value) else None
    for name, by_step in values.items():
        steps = sorted(by_step)
        yield {"name": name, "unit": _unit(name), "steps": steps, "values": [by_step[step] for step in steps]}


def _unit(name: str) -> str:
    last = name.rpartition("/")[2]
    return UNITS.get(last, "seconds" if last.endswith("_s") else "")


def _evaluated(run: Run) -> Iterator[dict[str, Any]]:
    for step in run.evaluated_steps():
        try:
            yield {"step": step} | flatten(run.evaluation(step) or {})
        except PicoError:
            continue  # `pico verify` tells what is damaged


def analyses_of(places: Sequence[str]) -> list[Path]:
    """Return the folders of analyses: those that are named, and those in `analysis_results` of the working folder."""
    beside = sorted(Path("analysis_results").glob(f"*/{RESULTS}"))
    return list(dict.fromkeys([*map(Path, places), *(file.parent for file in beside)]))


def _of_analysis(place: Path, run: str) -> Iterator[dict[str, Any]]:
    """Yield each metric of a table with its series, one for each layer, head, module and so on; None where there is no value."""
    from picolm.analyze.table import load

    try:
        table = load(place)
    except (PicoError, OSError, ValueError, KeyError):
        return  # it is no table, or another program is writing it
    table = table[(table["run"] == run) & table["step"].notna()]
    for metric, rows in table.groupby("metric", sort=False):
        varying = [name for name in _OF_A_SERIES[1:] if rows[name].nunique(dropna=False) > 1]
        groups = rows.groupby(varying, dropna=False, sort=False) if varying else [((), rows)]
        series = [_labelled(varying, key, group) for key, group in groups][:MOST_SERIES]
        yield {"place": place.name, "metric": str(metric), "series": series}


def _labelled(names: Sequence[str], key: Any, rows: "pd.DataFrame") -> Series:
    import pandas as pd

    words = [
        f"{name} {int(value) if isinstance(value, float) else value}" if name in ("layer", "head") else str(value)
        for name, value in zip(names, key if isinstance(key, tuple) else (key,))
        if not pd.isna(value) and value != ""
    ]
    last = rows.drop_duplicates("step", keep="last").sort_values("step")
    values = [None if pd.isna(value) or math.isinf(value) else float(value) for value in last["value"]]
    return {"label": ", ".join(words), "steps": [int(step) for step in last["step"]], "values": values}
