"""`pico suite`, from its file to its report: train what is missing, then analyze all of it."""

import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from rich import box
from rich.table import Table

from picolm.console import LEAST_WIDTH, configure_logging, say, screen
from picolm.errors import PicoError
from picolm.registry import trust_names
from picolm.schema import dump
from picolm.store.files import disk_errors, write_atomically
from picolm.suite.comparison import REPORT, analyze_members, write_report
from picolm.suite.config import Member, Suite, differing, load_suite
from picolm.suite.local import Failure, train_locally
from picolm.suite.standing import Standing, standings
from picolm.train.preview import estimate, rounded_bytes
from picolm.trusted import make_folder, refuse_links

log = logging.getLogger("picolm")

EXECUTORS = ("local", "slurm")


def run_suite(
    file: Path,
    overrides: Iterable[str] = (),
    *,
    executor: str = "local",
    jobs: int = 1,
    dry_run: bool = False,
    report: bool = True,
) -> int:
    """Train what is missing of a suite, analyze all, write the report. Return the exit code.

    jobs: number of members to train at the same time on this machine. Raises PicoError for a suite that cannot be run.
    """
    if executor not in EXECUTORS:
        raise PicoError(f"unknown executor {executor!r} (there are: {', '.join(EXECUTORS)})")
    suite = load_suite(file, overrides)
    found = standings(suite.members)
    if dry_run:
        _preview(suite.members, found)
        return 0
    make_folder(suite.config.folder)
    configure_logging("INFO", suite.config.folder / "suite.log")
    _tell_standings(suite, found)
    failures, stopped = _train(suite, found, executor, jobs)
    if stopped is not None:
        log.info("Stopped; every run is saved. To go on: give the same command again.")
        return 128 + stopped
    finished = [standing.member for standing in standings(suite.members) if standing.state == "finished"]
    if finished:
        _conclude(suite, finished, jobs, report)
    for failure in failures:  # at the end, where they are seen
        log.error("Not finished: %s: %s", *failure)
    if failures:
        log.error("%d of %d runs are not finished. The same command tries them again.", len(failures), len(found))
    return 1 if failures else 0


def _preview(members: list[Member], found: list[Standing]) -> None:
    """Print a line per member with its size and costs, the sums, and what differs between members."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("run", no_wrap=True)
    for heading in ("state", "parameters", "tokens", "FLOP", "disk"):
        shown.add_column(heading, justify="right", no_wrap=True)
    figures = [estimate(member.config) for member in members]
    for standing, own in zip(found, figures):
        step = f", step {standing.step}" if standing.state in ("interrupted", "running") else ""
        numbers = (f"{own.parameters:,}", f"{own.tokens:,}", f"{own.flops:.2e}", rounded_bytes(own.disk_bytes))
        shown.add_row(standing.member.name, standing.state + step, *numbers)
    tokens, flops, disk = (sum(getattr(own, name) for own in figures) for name in ("tokens", "flops", "disk_bytes"))
    shown.add_section()
    shown.add_row(f"{len(members)} runs", "", "", f"{tokens:,}", f"{flops:.2e}", rounded_bytes(disk))
    console = screen()
    console.width = max(console.width, LEAST_WIDTH)  # wrapped by the terminal rather than cut off
    console.print(shown)
    say(f"Members differ in {', '.join(differing(members)) or 'nothing'}; everything else is the same.")


def _tell_standings(suite: Suite, found: list[Standing]) -> None:
    """Log the progress of the suite, and which finished runs were saved with other settings."""
    states = Counter(standing.state for standing in found)
    counted = ", ".join(f"{count} {state}" for state, count in states.items())
    log.info("%s: %d runs: %s.", suite.config.suite_name, len(found), counted)
    for standing in found:
        if standing.saved_otherwise:
            keys = ", ".join(standing.saved_otherwise)
            log.warning("%s was saved with other %s; it stays as it is.", standing.member.name, keys)


def _train(suite: Suite, found: list[Standing], executor: str, jobs: int) -> tuple[list[Failure], int | None]:
    """Train the members that are not finished. Return those that failed, and the signal that asked to stop, or None.

    Members that another process is training are left to it, and returned as failed. With SLURM, a running job is found
    by its id instead.
    """
    others = [s.member for s in found if s.state == "running" and executor != "slurm"]
    elsewhere = [Failure(member.name, "another process is training it; wait for it to end") for member in others]
    members = [s.member for s in found if s.state != "finished" and s.member not in others]
    if not members:
        return elsewhere, None
    files = _written(suite, members)
    if executor == "slurm":
        from picolm.suite.cluster import train_on_cluster

        return elsewhere + train_on_cluster(suite.config, members, files), None
    failures, stopped = train_locally(files, suite.config.folder / "logs", jobs)
    return elsewhere + failures, stopped


def _written(suite: Suite, members: list[Member]) -> dict[str, Path]:
    """Write the configuration of each member to a file for `pico train`. Return the files by name."""
    folder = suite.config.folder / "configs"
    refuse_links(folder, suite.config.folder)
    make_folder(folder)
    files = {member.name: folder / f"{member.name}.yaml" for member in members}
    for member in members:
        refuse_links(files[member.name], suite.config.folder)
        with disk_errors("a configuration", folder):
            write_atomically(files[member.name], dump(member.config).encode())
    return files


def _conclude(suite: Suite, members: list[Member], jobs: int, report: bool) -> None:
    """Analyze the finished members, and write the report."""
    log.info("Analyzing %d runs.", len(members))
    trust_names(member.config.model.model_type for member in members)  # the suite's own file names them
    outcome, changed = analyze_members(suite, members, workers=jobs)
    if outcome is not None:
        log.info("%d values, %d of them computed now.", len(outcome.rows), outcome.computed)
        for line in outcome.absent:
            log.warning("Skipped: %s", line)
    page = suite.config.folder / REPORT
    if report and (changed or not page.exists()):
        log.info("The report is %s.", write_report(suite, members))
    elif report:
        log.info("The report is %s, as it was.", page)
    log.info("Tables are in %s.", suite.config.folder)
