"""The command `pico analyze`, from its configuration to its table."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from picolm.analyze import table
from picolm.analyze.config import AnalysisConfig
from picolm.analyze.engine import analyze, plan
from picolm.analyze.groups import alike, config_of
from picolm.analyze.intervals import aggregate
from picolm.analyze.work import Outcome
from picolm.console import can_redraw, configure_logging, say, screen
from picolm.schema import dump, load, plain
from picolm.store import Run
from picolm.store.files import LOCK, RunLock
from picolm.tracking import Session
from picolm.trusted import make_folder, refuse_links

log = logging.getLogger("picolm")


def analyze_runs(
    config_path: Path,
    overrides: Iterable[str],
    places: list[str],
    *,
    workers: int = 1,
    backend: str = "loky",
    strict: bool = False,
    keep_downloads: int | None = None,
    csv: bool = False,
    aggregated: bool = False,
    dry_run: bool = False,
) -> Outcome | None:
    """Run the analysis of a YAML file on the runs at `places` (default: those in the file), and write the results.

    csv, aggregated: also write results.csv, aggregated.parquet. dry_run: only print the plan, and return None. strict:
    raise PicoError if anything is missing. keep_downloads: see `engine.analyze`.
    """
    config = load(config_path, AnalysisConfig, overrides)
    places = places or list(config.runs)
    if dry_run:
        say(dump(config) + "\n" + plan(config, places))
        return None
    folder = Path(config.monitoring.output_dir) / config.analysis_name
    refuse_links(folder, folder.parent)
    make_folder(folder)
    with RunLock(folder / LOCK, "analysis", "analysis_name").held():
        configure_logging("INFO", folder / "analysis.log")
        options: dict[str, Any] = {"workers": workers, "backend": backend, "keep_downloads": keep_downloads}
        outcome = _with_bar(config, places, strict=strict, **options)
        path = table.write(outcome.rows, folder, csv)
        if aggregated:
            _write_aggregated(folder, places)
    if left_out := sum(table.only_in_table(outcome.rows).values()):
        log.info(
            "%d values compare with several layers or steps: they are in the table only, not in the JSON files%s.",
            left_out, " or Weights & Biases" if config.monitoring.save_to_wandb else "",
        )  # fmt: skip
    if config.monitoring.save_to_wandb:
        _to_wandb(config, outcome.rows)
    console = screen()
    console.print(table.summary(outcome.rows, console.width))
    log.info(
        "%d values, %d of them computed now from %d tensors; %d things were missing. The table is %s.",
        len(outcome.rows), outcome.computed, outcome.read, len(outcome.absent), path,
    )  # fmt: skip
    return outcome


def _write_aggregated(folder: Path, places: list[str]) -> None:
    """Write means and confidence intervals over runs that differ only in seeds and names; log what is left out."""
    groups, sentences = alike({run.name: config_of(run) for run in map(Run.open, places)})
    pooled = aggregate(table.load(folder), groups)
    for sentence in (*sentences, *pooled.attrs["left_out"]):
        log.warning("--aggregate: %s", sentence)
    table.seal(folder, table.AGGREGATED, table.to_parquet(pooled))


def _with_bar(config: AnalysisConfig, places: list[str], **options: Any) -> Outcome:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = screen(error=True)
    columns = (TextColumn("analyzing", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not can_redraw(console)) as bar:
        task = bar.add_task("", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        return analyze(config, places, progress=show, **options)


def _to_wandb(config: AnalysisConfig, rows: list[dict[str, Any]]) -> None:
    """Log the values of the JSON files by step, as pico-analyze does; no result is lost if the server is down."""
    chosen, folder = config.monitoring.wandb, Path(config.monitoring.output_dir) / config.analysis_name
    session = Session(chosen.project, chosen.entity, config.analysis_name, folder, plain(config))
    for name, values in sorted(table.json_files(rows).items(), key=lambda item: _step(item[0])):
        metric = name.rsplit("/", 1)[-1].removesuffix(".json")
        session.log({f"{metric}/{key}": value for key, value in values.items() if value is not None}, _step(name))
    session.close()


def _step(name: str) -> int:
    return int(name.split("step_", 1)[1].split("/")[0])
