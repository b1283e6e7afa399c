"""The same analysis on a cluster: a real one of two processes on this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from picolm.analyze import engine
from picolm.analyze.command import analyze_runs
from picolm.analyze.table import load
from picolm.errors import PicoError

ANALYSIS = """
metrics: [{metric_name: norm, components: [{layer_suffixes: w_2}]}, {metric_name: per}, {metric_name: cka}]
monitoring: {output_dir: %s}
"""
CLUSTER = """
import os, subprocess, sys
from distributed import LocalCluster
if __name__ == "__main__":
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        environment = {**os.environ, "DASK_SCHEDULER_ADDRESS": cluster.scheduler_address}
        sys.exit(subprocess.run(sys.argv[1:], env=environment).returncode)
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["dask", "ray"])
def test_a_cluster_gives_the_same_table(runs: dict[str, Path], tmp_path: Path, backend: str) -> None:
    """Dask on a scheduler that the environment names; Ray on the one that it starts where none is named."""
    pytest.importorskip({"dask": "distributed", "ray": "ray"}[backend])
    for name in ("here", "there"):
        (tmp_path / f"{name}.yaml").write_text(ANALYSIS % (tmp_path / name))
    analyze_runs(tmp_path / "here.yaml", [], [str(runs["narrow"])])
    (tmp_path / "cluster.py").write_text(CLUSTER)
    pico = [sys.executable, "-c", "from picolm.cli import main; main()", "analyze", str(tmp_path / "there.yaml")]
    words = ["--run", str(runs["narrow"]), "--workers", "-1", "--backend", backend]
    launcher = [sys.executable, str(tmp_path / "cluster.py")] if backend == "dask" else []
    command = [*launcher, *pico, *words]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    pd.testing.assert_frame_equal(load(tmp_path / "here" / "analysis"), load(tmp_path / "there" / "analysis"))


def test_an_unknown_backend_is_told(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(ANALYSIS % tmp_path)
    with pytest.raises(PicoError, match=r"unknown backend 'spark' \(there are: loky, dask, ray\)"):
        analyze_runs(tmp_path / "a.yaml", [], [str(runs["narrow"])], backend="spark")


def test_small_matrices_are_analyzed_with_one_thread_and_the_number_before_comes_back(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.yaml").write_text(ANALYSIS % tmp_path)
    chosen: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    analyze_runs(tmp_path / "a.yaml", [], [str(runs["narrow"])])
    assert chosen == [1, 5]


@pytest.mark.slow
def test_layers_computed_beside_each_other_give_the_same_bits(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for width in (1, 10_000):  # at a time, or one after the other
        monkeypatch.setattr(engine, "WIDE", width)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
        (tmp_path / "a.yaml").write_text(ANALYSIS % (tmp_path / str(width)))
        analyze_runs(tmp_path / "a.yaml", [], [str(runs["narrow"])])
        found.append(load(tmp_path / str(width) / "analysis"))
    pd.testing.assert_frame_equal(*found, check_exact=True)
