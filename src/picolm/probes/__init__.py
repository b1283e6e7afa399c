"""Probes: behaviour and landscape of the model of a checkpoint. A probe is one decorated function, found by name in `PROBES`.

Each file of this folder registers its probes when it is imported.
"""

from picolm.observe.passes import Answer, Ask
from picolm.observe.rows import Rows
from picolm.observe.subject import Subject
from picolm.probes import (  # noqa: F401
    agreement,
    attention,
    barrier,
    calibration,
    circuits,
    dormant,
    gradient_noise,
    hessian,
    in_context,
    induction,
    llc,
    logit_lens,
    memorization,
    ngram,
    overfitting,
    path,
    state_space,
    token_curves,
)
from picolm.probes.live import ProbeEvaluation
from picolm.probes.probe import PROBES, Found, Probe, Quantity, Reading, Steps, find_probe, probe
from picolm.train.evaluate import EVALUATIONS

for _name in PROBES:
    if not {"other", "earlier"} & set(PROBES.get(_name).given):  # it asks one model, as training has one
        EVALUATIONS.add(_name)(ProbeEvaluation(PROBES.get(_name)))

__all__ = [
    "PROBES",
    "Answer",
    "Ask",
    "Found",
    "Probe",
    "Quantity",
    "Reading",
    "Rows",
    "Steps",
    "Subject",
    "find_probe",
    "probe",
]
