"""Two series of small trained models, with values that independent code computed from their weights.

`reference/` is a copy of data made without this project: a Llama and a GPT-NeoX trained on the State of the Union, rows, and for
each checkpoint the values of behaviour and landscape in float64 numpy. Tolerances are those of float32.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from tests.fox import fox, make_run, state_space_run  # noqa: F401

from picolm.analyze import table
from picolm.analyze.command import analyze_runs

REFERENCE = Path(__file__).parent / "reference"
SERIES = ("llama_s0", "neox_s0")


def expected(series: str, step: int) -> dict[str, Any]:
    """Return the reference values of a checkpoint."""
    return json.loads((REFERENCE / f"{series}-step_{step}.json").read_text())


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """Return files of rows of token ids by name: those of probes.npz, and of the corpus as corpus_train, corpus_val."""
    folder, found = tmp_path_factory.mktemp("rows"), {}
    for archive, prefix in (("probes.npz", ""), ("corpus.npz", "corpus_")):
        with np.load(REFERENCE / archive) as arrays:
            for name in arrays:
                np.save(folder / f"{prefix}{name}.npy", arrays[name].astype(np.int64))
                found[f"{prefix}{name}"] = str(folder / f"{prefix}{name}.npy")
    return found


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Return the place of a series with the model of 1,112 parameters at step 300, and that of its rows."""
    folder = tmp_path_factory.mktemp("tiny")
    shutil.copytree(REFERENCE / "tiny", folder / "tiny" / "step_300", ignore=shutil.ignore_patterns("*.npz", "ref*"))
    with np.load(REFERENCE / "tiny" / "rows.npz") as rows:
        np.save(folder / "probe.npy", rows["probe"].astype(np.int64))
    return str(folder / "tiny"), str(folder / "probe.npy")


Measure = Callable[..., pd.DataFrame]


@pytest.fixture
def measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measure:
    """A function that runs an analysis of probes through its YAML file, and returns the long table.

    probes: entries of the configuration. runs: places, or names of the series here. Other keys go into the file.
    """
    monkeypatch.chdir(tmp_path)

    def run(*probes: Mapping[str, Any], runs: tuple[str, ...] = ("llama_s0",), **keys: Any) -> pd.DataFrame:
        text = yaml.safe_dump({"analysis_name": "measured", **keys, "probes": [dict(probe) for probe in probes]})
        (tmp_path / "analysis.yaml").write_text(text)
        places = [str(REFERENCE / "checkpoints" / run) if run in SERIES else run for run in runs]
        analyze_runs(tmp_path / "analysis.yaml", [], places)
        return table.load(tmp_path / "analysis_results" / "measured")

    return run


def value(found: pd.DataFrame, metric: str, step: int | None = None, **where: Any) -> float:
    """Return the one value of a metric in a table. where: layer, head, bin, …"""
    chosen = found[found["metric"] == metric]
    if step is not None:
        chosen = chosen[chosen["step"] == step]
    for key, wanted in where.items():
        chosen = chosen[chosen[key] == wanted]
    assert len(chosen) == 1, (metric, step, where, len(chosen))
    return float(chosen["value"].iloc[0])


def by_head(found: pd.DataFrame, metric: str, step: int) -> np.ndarray:
    """Return the values of a metric at a step, [layers, heads]."""
    chosen = found[(found["metric"] == metric) & (found["step"] == step)].sort_values(["layer", "head"])
    return chosen["value"].to_numpy(float).reshape(chosen["layer"].nunique(), -1)
