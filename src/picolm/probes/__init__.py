"""Probes: behaviour and landscape of the model of a checkpoint. A probe is one decorated function, found by name in `PROBES`.

Each file of this folder registers its probes when it is imported.
"""

import importlib
import pkgutil

from picolm.probes.live import ProbeEvaluation
from picolm.probes.probe import (
    PROBES,
    Answer,
    Ask,
    Found,
    Probe,
    Quantity,
    Reading,
    Rows,
    Steps,
    Subject,
    find_probe,
    probe,
)
from picolm.train.evaluate import EVALUATIONS

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"picolm.probes.{_file.name}")

for _name in PROBES:
    if not PROBES.get(_name).compares:
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
