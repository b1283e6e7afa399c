"""A change that should change nothing changes no byte: three short runs on stored rows, and an analysis of each.

golden/expected.json holds, for each run, digests under the machine that computed them, and values. Floating-point results
differ between processors and versions of torch: on a machine without digests of its own only the values are compared, within
a tolerance. `OMP_NUM_THREADS=1 python -m tests.test_golden` adds the digests of this machine; run it at a commit whose
results are right.
"""

import hashlib
import json
import tarfile
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = GOLDEN / "expected.json"
RUNS = ("demo", "muon", "adamw")
KEYS = ["step", "split", "component", "kind", "layer", "head", "module", "metric", "against_step"]
TOLERANCE = {"demo": 1e-3, "muon": 1e-3, "adamw": 5e-2}  # adamw computes in bfloat16


def machine() -> str:
    """What decides the bits of a result: the processor, its instructions, the threads and the version of torch."""
    from picolm.train.devices import hardware

    capability = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, {capability}, {hardware()['cpu']}, {torch.get_num_threads()} threads"


def processor() -> str:
    """What decides the bits of the linear algebra of numpy, which has kernels for each generation of processors."""
    path = Path("/proc/cpuinfo")
    lines = [line.partition(":") for line in path.read_text().splitlines()] if path.is_file() else []
    found = {name.strip(): value.strip() for name, _, value in reversed(lines)}
    return f"family {found.get('cpu family')}, model {found.get('model')}"


def compute(name: str, folder: Path) -> tuple[dict[str, str], dict[str, float]]:
    """Train and analyze the run `name` in `folder`, and return the digests of all that it left and some of the values."""
    from picolm.analyze.command import analyze_runs
    from picolm.analyze.table import load as load_table
    from picolm.schema import load
    from picolm.store import Run
    from picolm.train import run_training
    from picolm.train.config import schema_for

    with tarfile.open(GOLDEN / "rows.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    overrides = [f"data.dataset.name={folder}/rows", f"checkpointing.runs_dir={folder}"]
    run_training(load(GOLDEN / f"{name}.yaml", schema_for, overrides))
    run = Run.open(folder / name)
    digests, values = of_checkpoints(run)
    analyze_runs(GOLDEN / "analysis.yaml", [f"monitoring.output_dir={folder}"], [str(run.path)])
    table = load_table(folder / "golden").sort_values(KEYS, ignore_index=True)
    digests[f"analysis, {processor()}"] = sha256([table[KEYS].to_csv(), *map(repr, table.value)])
    for (step, component, kind, metric), value in (
        table.groupby(["step", "component", "kind", "metric"]).value.mean().items()
    ):
        values[f"analysis/{step}/{component}/{kind}/{metric}"] = value
    return digests, {key: float(f"{value:.7g}") for key, value in values.items()}


def of_checkpoints(run: Any) -> tuple[dict[str, str], dict[str, float]]:
    """Return a digest of each kind of tensor at each step, and the loss, the evaluation and the norm of each kind."""
    digests, values = {}, {}
    for step in run:
        checkpoint, by_kind = run[step], defaultdict(list)
        for address in sorted(checkpoint):
            by_kind[f"{step}/{address.kind}/{address.split}".rstrip("/")].append(address)
        for kind, addresses in by_kind.items():
            digests[kind] = sha256([f"{address} {checkpoint.digest(address)}" for address in addresses])
            values[kind] = float(sum(checkpoint[address].double().square().sum() for address in addresses)) ** 0.5
        results = run.evaluation(step) or {}
        digests[f"{step}/evaluation"] = sha256([f"{name} {value!r}" for name, value in sorted(results.items())])
        values |= {f"{step}/{name}": value for name, value in results.items()}
    values |= {f"{line['step']}/train/loss": line["train/loss"] for line in run.read_metrics(("train/loss",))}
    return digests, values


def sha256(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_and_its_analysis_are_the_same_bytes_as_ever(name: str, tmp_path: Path) -> None:
    expected = json.loads(EXPECTED.read_text())[name]
    digests, values = compute(name, tmp_path)
    assert values == pytest.approx(expected["values"], rel=TOLERANCE[name], nan_ok=True)
    known = expected["digests"].get(machine(), {})
    assert {key: digests.get(key) for key in known if of_here(key)} == {
        key: known[key] for key in known if of_here(key)
    }
    assert not known or {key for key in digests if not key.startswith("analysis")} <= set(known)


def of_here(key: str) -> bool:
    """Return whether a digest is not that of an analysis on another processor."""
    return not key.startswith("analysis") or key == f"analysis, {processor()}"


def record() -> None:
    """Write the digests of this machine, and the values where there are none."""
    expected = json.loads(EXPECTED.read_text()) if EXPECTED.is_file() else {}
    for name in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            digests, values = compute(name, Path(folder))
        entry = expected.setdefault(name, {"digests": {}, "values": values})
        entry["digests"].setdefault(machine(), {}).update(digests)
    EXPECTED.write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    record()
