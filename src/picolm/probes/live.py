"""Probes as evaluations of the model in training: `evaluation.metrics: [induction]`."""

import logging
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from picolm.errors import PicoError
from picolm.observe.config import Observe
from picolm.observe.live import LiveSubject
from picolm.observe.rows import Rows, rows_of
from picolm.probes.probe import Probe, Reading
from picolm.store import Run
from picolm.train.evaluate import Evaluation

log = logging.getLogger("picolm")


class ProbeEvaluation:
    """A probe as an evaluation. Its results are `probe.reading`, `probe.reading/3` of layer 3, `probe.reading/3.1` of its head 1.
    Readings by bin are left out: `pico analyze` has them all.

    It computes in the precision of the weights, as an analysis does, and takes the held-out rows of the run.
    """

    def __init__(self, probe: Probe):
        self.probe = probe

    def problems(self, options: Mapping[str, Any]) -> dict[str, str]:
        """Return what is wrong with options of the probe, by name."""
        return self.probe.options.problems(options)

    def __call__(self, evaluation: Evaluation) -> dict[str, float]:
        model = getattr(evaluation.model, "module", evaluation.model)  # inside of the wrapper of Fabric
        options = {} if evaluation.settings is None else evaluation.settings.probes.get(self.probe.name, {})
        try:
            if evaluation.run is None:
                raise PicoError("nothing of this run is saved, so it has no held-out rows to ask about")
            subject = LiveSubject(model, evaluation.run, evaluation.step)
            with (
                torch.autocast(evaluation.device.type, enabled=False),
                torch.random.fork_rng(devices=[]),
                torch.enable_grad(),
            ):
                readings = _readings(self.probe, subject, options)
        except PicoError as error:
            _warn_once(self.probe.name, str(error))
            return {self.probe.name: math.nan}
        return {_name(self.probe, reading): _number(reading) for reading in readings if not reading.bin}


def _readings(probe: Probe, subject: LiveSubject, options: Mapping[str, Any]) -> list[Reading]:
    given: dict[str, Any] = {"subject": subject, "stated": None}
    if "rows" in probe.given:
        given["rows"] = _held_out(subject.run, subject.architecture.context, subject.architecture.outline.row_length(0))
    return probe(*(given[key] for key in probe.given), **options)


@cache
def _held_out(run: Run, context: int, ahead: int) -> Rows:
    return rows_of(Observe(), {run.name: run}, {run.name: context}, {run.name: ahead})[run.name]


def _name(probe: Probe, reading: Reading) -> str:
    where = ".".join(str(number) for number in (reading.layer, reading.head) if number is not None)
    return f"{probe.name}.{reading.name}" + (f"/{where}" if where else "")


def _number(reading: Reading) -> float:
    return math.nan if reading.value is None else reading.value


@cache
def _warn_once(name: str, why: str) -> None:
    log.warning("%s has no value: %s", name, why)
