"""Metrics: functions that take one or two matrices and return a number. Call them from Python: `metrics.cka(x, y)`.

They take torch tensors, numpy arrays or `Matrix` objects (which cache intermediate results), compute in float64, and
raise `Undefined` with the reason where there is no value. A metric is one decorated function; `METRICS` finds it by
name.
"""

from picolm.analyze.matrix import Undefined
from picolm.analyze.metrics.metric import DATA_TYPES, METRICS, Metric, Option, as_metric, find_metric, metric
from picolm.analyze.metrics.norms import cosine, norm, relative_change
from picolm.analyze.metrics.similarity import (
    cca,
    cka,
    neighbour_overlap,
    procrustes,
    pwcca,
    rsa,
    subspace_overlap,
    svcca,
)
from picolm.analyze.metrics.sparsity import gini, hoyer, kurtosis, near_zero_fraction
from picolm.analyze.metrics.spectrum import (
    condition_number,
    effective_rank,
    participation_ratio,
    per,
    spectral_alpha,
    stable_rank,
)

__all__ = [
    "DATA_TYPES",
    "METRICS",
    "Metric",
    "Option",
    "Undefined",
    "as_metric",
    "cca",
    "cka",
    "condition_number",
    "cosine",
    "effective_rank",
    "find_metric",
    "gini",
    "hoyer",
    "kurtosis",
    "metric",
    "near_zero_fraction",
    "neighbour_overlap",
    "norm",
    "participation_ratio",
    "per",
    "procrustes",
    "pwcca",
    "relative_change",
    "rsa",
    "spectral_alpha",
    "stable_rank",
    "subspace_overlap",
    "svcca",
]
