"""What a suite will take: parameters, tokens, time and disk of each member, before anything is trained."""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from rich import box
from rich.table import Table

from picolm.console import duration
from picolm.errors import PicoError
from picolm.store import Run
from picolm.suite.config import Member, SuiteConfig, differing
from picolm.suite.standing import Standing
from picolm.train import devices
from picolm.train.preview import Estimate, estimate, rounded_bytes

# A model of width d comes to roughly d / (d + HALFWAY) of the rate of large matrix products: on CPUs at widths 36 to 384 from
# 0.12 to 0.65 was measured. More than MOST is rare on any device.
HALFWAY, MOST = 200, 0.65


class Speed(NamedTuple):
    """Model FLOP/s of one device, and where that number is from."""

    flops_per_s: float
    source: str


class Forecast(NamedTuple):
    """One member: how far it is, its figures, and the seconds that are left, None where nothing is known of the speed."""

    standing: Standing
    figures: Estimate
    left_s: float | None


def forecast(config: SuiteConfig, standings: list[Standing]) -> list[Forecast]:
    """The figures of every member. Times come from members that have been trained, else from `flops_per_s` of the suite, else
    from the speed of this machine, if it has what the member asks for.
    """
    figures = [estimate(standing.member.config) for standing in standings]
    speeds = list(_speeds(config, standings, figures))
    return [
        Forecast(standing, own, None if speed is None else _left(standing, own, speed))
        for standing, own, speed in zip(standings, figures, speeds)
    ]


def _left(standing: Standing, own: Estimate, speed: Speed) -> float:
    fabric = standing.member.config.training.fabric
    flops_per_s = speed.flops_per_s * fabric.num_devices * fabric.num_nodes
    return share_left(standing) * (own.flops + own.beside_flops) / flops_per_s


def share_left(standing: Standing) -> float:
    """The part of the steps of a member that are still to be made."""
    last = max(1, standing.member.config.training.max_steps)
    return 0.0 if standing.state == "finished" else max(0.0, 1 - standing.step / last)


def _speeds(config: SuiteConfig, standings: list[Standing], figures: list[Estimate]) -> Iterator[Speed | None]:
    measured = [(own.parameters, speed) for s, own in zip(standings, figures) if (speed := _measured(s, own))]
    for standing, own in zip(standings, figures):
        size = own.parameters
        nearest = min(measured, key=lambda found: abs(math.log(found[0] / size)), default=None)
        if nearest is not None and (nearest[0] == size or config.flops_per_s is None):
            yield nearest[1]
        elif config.flops_per_s is not None:
            yield Speed(config.flops_per_s, "flops_per_s")
        else:
            yield _here(standing.member)


def _measured(standing: Standing, own: Estimate) -> Speed | None:
    """FLOP of captures and evaluations included, per second of the log: what is foretold is wall time."""
    if standing.state == "new":
        return None
    config, run = standing.member.config, Run.open(standing.member.path)
    per_step = config.data.dataloader.batch_size * config.model.max_seq_len
    lines = [
        (entry["step"], entry["tokens_per_s"])
        for entry in run.read_metrics(("tokens_per_s",))
        if "tokens_per_s" in entry
    ]
    seconds = sum((step - before) * per_step / speed for (before, _), (step, speed) in pairwise(lines))
    steps = lines[-1][0] - lines[0][0] if lines else 0
    if not seconds:
        return None
    flops = (own.flops + own.beside_flops) * steps / max(1, config.training.max_steps)
    count = config.training.fabric.num_devices * config.training.fabric.num_nodes
    return Speed(flops / seconds / count, f"measured by {standing.member.name}")


def _here(member: Member) -> Speed | None:
    fabric = devices.resolve(member.config.training.fabric)
    try:
        devices.check_available(fabric)
    except PicoError:
        return None
    kind = "cuda" if fabric.accelerator == "gpu" else fabric.accelerator
    peak = devices.matmul_peak(torch.device(kind), devices.compute_dtype(fabric.precision))
    return Speed(usual_share(member) * peak, "matrix products of this machine, and a share of that by width")


def usual_share(member: Member) -> float:
    """The part of the rate of large matrix products that a model of that width comes to."""
    width = getattr(member.config.model, "d_model", HALFWAY)
    return min(MOST, width / (width + HALFWAY))


def work_left(standing: Standing) -> float:
    """What is left to do of a member, in numbers that are in proportion to time on one device."""
    own = estimate(standing.member.config)
    return share_left(standing) * (own.flops + own.beside_flops) / usual_share(standing.member)


def table(forecasts: list[Forecast]) -> Table:
    """For a terminal: a line per member, and the sum of what is left to do."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("run", no_wrap=True)
    for heading in ("state", "parameters", "tokens", "FLOP", "time left", "disk"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for standing, own, left_s in forecasts:
        state = (
            f"{standing.state}, step {standing.step}"
            if standing.state in ("interrupted", "running")
            else standing.state
        )
        time = "?" if left_s is None else "" if standing.state == "finished" else duration(left_s)
        shown.add_row(
            standing.member.name,
            state,
            f"{own.parameters:,}",
            f"{own.tokens:,}",
            f"{own.flops:.2e}",
            time,
            rounded_bytes(own.disk_bytes),
        )
    times = [left_s for *_, left_s in forecasts]
    total = "?" if None in times else duration(sum(left_s or 0 for left_s in times))
    sums = [sum(getattr(own, name) for _, own, _ in forecasts) for name in ("tokens", "flops", "disk_bytes")]
    shown.add_section()
    shown.add_row(f"{len(forecasts)} runs", "", "", f"{sums[0]:,}", f"{sums[1]:.2e}", total, rounded_bytes(sums[2]))
    return shown


def remarks(config: SuiteConfig, members: list[Member], forecasts: list[Forecast]) -> str:
    """What differs between members, and what the estimates rest on."""
    keys = differing(members)
    lines = ["Members differ in " + (", ".join(keys) or "nothing") + "; everything else is the same."]
    sources = {
        speed.source
        for speed in _speeds(config, [f.standing for f in forecasts], [f.figures for f in forecasts])
        if speed
    }
    if sources:
        lines.append(f"Times are estimates, one member after the other; speeds: {'; '.join(sorted(sources))}.")
    if any(left_s is None for *_, left_s in forecasts):
        lines.append("Of devices that are not here the speed is not known: give flops_per_s=… (of one device).")
    return "\n".join(lines)
