"""Threads are chosen by what the process may use, and a machine that others use is told."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from picolm.train import resources
from picolm.train.resources import Pace, threads_for, usable_cpus

V2 = "0::/system.slice/job.service\n"
V1 = "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n"


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 64),
        ({"proc/self/cgroup": V2}, 64),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/system.slice/job.service/cpu.max": "max 100000\n"}, 64),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/system.slice/job.service/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/system.slice/cpu.max": "400000 100000\n"}, 4),  # of a cgroup above
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),  # a container sees its own root only
        ({"proc/self/cgroup": "0::/../..\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 0.5),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            64,
        ),
        ({"proc/self/cgroup": "nonsense\n\n0:\n", "sys/fs/cgroup/cpu.max": "x y z\n"}, 64),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/cpu.max": "100000 0\n"}, 64),
    ],
)
def test_the_quota_of_the_control_group_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: float
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert usable_cpus(tree(tmp_path, files)) == expected


def test_the_affinity_counts_where_the_system_has_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 7, 9}, raising=False)
    assert usable_cpus(tmp_path) == 3
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS, Windows
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert usable_cpus(tmp_path) == 12
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cpus(tmp_path) == 1


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity of processes")
def test_a_real_process_on_one_cpu_computes_with_one_thread() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "import torch; torch.set_num_threads(4)\n"
        "from picolm.train.config import Fabric\n"
        "from picolm.train import devices\n"
        "devices.choose_threads(Fabric()); print(torch.get_num_threads())"
    )
    environment = {key: value for key, value in os.environ.items() if key not in resources.SET_BY_USER}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]
    kept = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"OMP_NUM_THREADS": "4"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert kept.stdout.split() == ["4"]


@pytest.mark.parametrize(
    ("usable", "processes", "default", "environment", "threads"),
    [
        (64.0, 1, 32, {}, 32),  # never more than torch would take: cores, not hardware threads
        (1.5, 1, 32, {}, 1),
        (0.5, 1, 2, {}, 1),
        (8.0, 4, 8, {}, 2),
        (2.0, 8, 2, {}, 1),
        (1.0, 1, 16, {"OMP_NUM_THREADS": "16"}, 16),
        (1.0, 1, 16, {"MKL_NUM_THREADS": "16"}, 16),
        (1.0, 1, 16, {"OMP_NUM_THREADS": ""}, 1),
    ],
)
def test_threads(usable: float, processes: int, default: int, environment: dict[str, str], threads: int) -> None:
    assert threads_for(usable, processes, default, environment) == threads


def steady(pace: Pace, intervals: int = 6) -> Pace:
    for _ in range(intervals):
        assert pace.observe(0.1, 1.9, 2.0, 2.0) is None
    return pace


def test_slow_steps_on_a_shared_machine_are_told_with_what_to_set() -> None:
    for cpus, load in ((0.8, None), (1.9, 30.0), (0.8, 30.0)):
        told = steady(Pace()).observe(0.34, cpus, load, 2.0)
        assert told is not None
        assert told.startswith("Steps take 3.4 times their usual time, because this machine is shared")
        assert "set OMP_NUM_THREADS=1" in told
        assert (load is None) is ("processes want to run" not in told)


@pytest.mark.parametrize(
    ("step_s", "cpus", "load"),
    [
        (0.29, 0.8, 30.0),  # not several times as long
        (0.9, 1.9, 2.0),  # slow by itself: it has all of the CPUs, and nobody else wants them
        (math.nan, math.nan, None),
    ],
)
def test_other_slow_steps_are_not(step_s: float, cpus: float, load: float | None) -> None:
    assert steady(Pace()).observe(step_s, cpus, load, 2.0) is None


def test_what_is_usual_takes_some_intervals_and_slow_ones_do_not_become_it() -> None:
    assert steady(Pace(), 4).observe(10.0, 0.1, 99.0, 2.0) is None
    pace = steady(Pace())
    assert all(pace.observe(0.5, 0.5, 99.0, 2.0) for _ in range(50))
