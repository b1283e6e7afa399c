"""`pico suite`, from its file to its report: what is missing is trained, then all of it is analyzed."""

import logging
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from picolm.console import LEAST_WIDTH, duration, say, screen
from picolm.errors import PicoError
from picolm.logs import configure_logging
from picolm.schema import dump
from picolm.store.files import write_atomically
from picolm.suite.comparison import REPORT, analyze_members, write_report
from picolm.suite.config import Member, Suite, load_suite
from picolm.suite.forecast import forecast, remarks, table, work_left
from picolm.suite.local import Failure, train_locally
from picolm.suite.standing import Standing, standings
from picolm.trusted import refuse_links

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
    """Train what is missing of a suite, analyze all, write the report; returns the exit code.

    jobs: members that are trained at the same time on this machine. Raises PicoError for a suite that cannot be run.
    """
    if executor not in EXECUTORS:
        raise PicoError(f"unknown executor {executor!r} (there are: {', '.join(EXECUTORS)})")
    suite = load_suite(file, overrides)
    found = standings(suite.members)
    if dry_run:
        _preview(suite, found)
        return 0
    suite.config.folder.mkdir(parents=True, exist_ok=True)
    configure_logging("INFO", suite.config.folder / "suite.log")
    failures, stopped = _train(suite, found, executor, jobs)
    if stopped is not None:
        log.info("Stopped; every run is saved. To go on: give the same command again.")
        return 128 + stopped
    finished = [standing.member for standing in standings(suite.members) if standing.state == "finished"]
    if finished:
        _conclude(suite, finished, jobs, report)
    return _tell(failures, len(suite.members))


def _preview(suite: Suite, found: list[Standing]) -> None:
    forecasts = forecast(suite.config, found)
    console = screen()
    console.width = max(console.width, LEAST_WIDTH)  # wrapped by the terminal rather than cut off
    console.print(table(forecasts))
    say(remarks(suite.config, suite.members, forecasts))


def _train(suite: Suite, found: list[Standing], executor: str, jobs: int) -> tuple[list[Failure], int | None]:
    """Train the members that are not finished; those that another process trains are left to it."""
    _say(suite, found)
    # A job of the cluster that is running is known by its number, and waited for.
    others = [s for s in found if s.state == "running" and executor != "slurm"]
    elsewhere = [Failure(s.member.name, "another process is training it; wait for it to end") for s in others]
    missing = [s for s in found if s.state != "finished" and s not in others]
    if not missing:
        return elsewhere, None
    members = [standing.member for standing in missing]
    files, progress = _written(suite, members), Progress(missing)
    if executor == "slurm":
        from picolm.suite.cluster import train_on_cluster

        return elsewhere + train_on_cluster(suite.config, members, files, progress.done), None
    failures, stopped = train_locally(members, files, suite.config.folder / "logs", jobs, progress.done)
    return elsewhere + failures, stopped


def _say(suite: Suite, found: list[Standing]) -> None:
    """How far the suite is."""
    states = Counter(standing.state for standing in found)
    counted = ", ".join(f"{count} {state}" for state, count in states.items())
    log.info("%s: %d runs: %s.", suite.config.suite_name, len(found), counted)
    for standing in found:
        if standing.saved_otherwise:
            keys = ", ".join(standing.saved_otherwise)
            log.warning("%s was saved with other %s; it stays as it is.", standing.member.name, keys)


def _written(suite: Suite, members: list[Member]) -> list[Path]:
    """The configuration of each member as a file that `pico train` reads."""
    folder = suite.config.folder / "configs"
    refuse_links(folder, suite.config.folder)
    folder.mkdir(exist_ok=True)
    files = [folder / f"{member.name}.yaml" for member in members]
    for member, file in zip(members, files):
        refuse_links(file, suite.config.folder)
        write_atomically(file, dump(member.config).encode())
    return files


class Progress:
    """Says after each member how many are left, and how long they will take at the pace so far."""

    def __init__(self, missing: list[Standing]):
        self.work = {standing.member.name: work_left(standing) for standing in missing}
        self.began, self.behind = time.monotonic(), 0.0

    def done(self, member: Member, seconds: float) -> None:
        self.behind += self.work.pop(member.name, 0.0)
        ahead = sum(self.work.values()) / self.behind * (time.monotonic() - self.began) if self.behind else 0.0
        rest = f"{len(self.work)} to go, about {duration(ahead)}" if self.work else "the last one"
        log.info("%s: trained in %s; %s.", member.name, duration(seconds), rest)


def _conclude(suite: Suite, members: list[Member], jobs: int, report: bool) -> None:
    """Analyze the members that are finished and write the report."""
    log.info("Analyzing %d runs.", len(members))
    outcome, changed = analyze_members(suite, members, workers=jobs)
    if outcome is not None:
        log.info("%d values, %d of them computed now.", len(outcome.rows), outcome.computed)
        for line in outcome.absent:
            log.warning("Skipped: %s", line)
    if report:
        page = suite.config.folder / REPORT
        log.info(
            "The report is %s.", write_report(suite, members) if changed or not page.exists() else f"{page}, as it was"
        )
    log.info("Tables are in %s.", suite.config.folder)


def _tell(failures: list[Failure], members: int) -> int:
    """Failures at the end, where they are seen."""
    for failure in failures:
        log.error("Not finished: %s: %s", *failure)
    if failures:
        log.error("%d of %d runs are not finished. The same command tries them again.", len(failures), members)
    return 1 if failures else 0
