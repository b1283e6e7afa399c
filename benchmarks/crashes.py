"""Kill a training at random moments, let it go on, and look whether anything was lost, torn or changed.

    python benchmarks/crashes.py --kills 200

Small runs are killed by SIGKILL, half of the times anywhere (also while they start), half of the times within milliseconds of
the beginning of a save, and started again until they finish; then the next run begins. Most lives are forked from this process,
which has imported everything and computed nothing, and train with `run_training`; some are `pico train` in a new interpreter.
All the while a reader in another process opens each run and recomputes the digests of its steps. In the end each run is
compared with one that nobody disturbed. SIGKILL ends a process, not the machine: what a power cut does is not seen here.
"""

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", GOMP_SPINCOUNT="10000")

import picolm.train.build
import picolm.train.loop  # noqa: F401  (imported once, for all the lives that are forked)
from picolm.errors import StoreError
from picolm.schema import load
from picolm.store import Checkpoint, Run
from picolm.store.checkpoint import SealedCheckpoint
from picolm.train import run_training
from picolm.train.config import schema_for
from picolm.train.state import resumable

STEPS, CADENCE = 60, 3
NEWEST = 3  # steps that the reader verifies again at each look
SAME = ("train/loss", "grad_norm", "weight_norm", "weights_digest", "paloma")


@dataclass
class Figures:
    """What is reported, over all runs."""

    kills: int = 0
    kills_in_saving: int = 0
    lives_by_command: int = 0
    continued: int = 0
    runs: int = 0
    steps_done_again: list[int] = field(default_factory=list)
    looks: int = 0
    verified: int = 0
    torn: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)


def prepare(folder: Path) -> Path:
    """A corpus of 96 + 8 rows and the configuration of a small run on it, saved often, with retention; the path of the latter."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    chance = np.random.default_rng(0)
    for split, rows in (("train", 96), ("val", 8)):
        tokens = chance.integers(0, 64, (rows, 17)).astype(np.int32)
        pq.write_table(pa.table({"input_ids": list(tokens)}), folder / f"{split}-00000-of-00001.parquet")
    file = folder / "run.yaml"
    file.write_text(f"""
data: {{dataset: {{name: {folder}}}, dataloader: {{batch_size: 8}}, tokenizer: {{vocab_size: 64}}}}
model: {{d_model: 24, n_layers: 2, attention_n_heads: 4, attention_n_kv_heads: 2, activation_hidden_dim: 48,
  vocab_size: 64, max_seq_len: 16}}
training:
  max_steps: {STEPS}
  fabric: {{accelerator: cpu, precision: 32-true}}
  optimization: {{lr: 0.01, lr_warmup_steps: 2, gradient_accumulation_steps: 1}}
checkpointing:
  runs_dir: {folder}/runs
  save_every_n_steps: {CADENCE}
  save_in_background: true
  keep: {{weights: all, optimizer: last 3, dynamics: last 5}}
evaluation: {{every_n_steps: 20}}
monitoring: {{logging: {{log_every_n_steps: 1, log_level: WARNING}}}}
""")
    return file


class Life:
    """One process that trains: forked from here, or the command in an interpreter of its own."""

    def __init__(self, config: Path, name: str, by_command: bool):
        self.log = config.with_name("lives.log")
        override = f"checkpointing.run_name={name}"
        if by_command:
            command = [sys.executable, "-m", "picolm", "train", str(config), override]
            log = (os.POSIX_SPAWN_OPEN, 1, str(self.log), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            self.pid = os.posix_spawn(
                sys.executable, command, os.environ, file_actions=[log, (os.POSIX_SPAWN_DUP2, 1, 2)]
            )
        else:
            self.pid = fork(lambda: run_training(load(config, schema_for, [override])), self.log)
        self.code: int | None = None

    def ended(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None

    def lasts(self, until: Callable[[], bool], seconds: float) -> bool:
        """Wait for whichever comes first; whether it is still alive."""
        deadline = time.perf_counter() + seconds
        while not self.ended() and not until() and time.perf_counter() < deadline:
            time.sleep(0.0003)
        return not self.ended()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        self.code = os.waitstatus_to_exitcode(status)


def fork(work: Callable[[], Any], log: Path) -> int:
    """A child that does `work` and ends with what it returns; its words go to `log`."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = work() or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def read_all_the_while(place: Path, told: Path, stop: Path) -> None:
    """Look at the run until `stop` is there, and once more; leave in `told` what was seen."""
    verified: set[int] = set()
    seen: dict[str, Any] = {"looks": 0, "verified": 0, "torn": [], "lost": []}
    last = False
    while not last:
        last = stop.exists()
        with suppress(StoreError):  # before its first moment there is no run
            look(Run.open(place), verified, seen, everything=last)
        time.sleep(0.002)
    told.write_text(json.dumps(seen))


def look(run: Run, verified: set[int], seen: dict[str, Any], everything: bool) -> None:
    steps = run.step_directories()
    seen["looks"] += 1
    seen["lost"] += [f"step {step} was there" for step in verified - set(steps)]
    if steps and not (run.checkpoints_path / "latest" / "manifest.json").exists() and run.steps[1:]:
        seen["torn"].append("latest leads nowhere")
    for step in steps:
        if everything or step not in verified or step in steps[-NEWEST:]:
            seen["torn"] += run.problems(step)
            seen["verified"] += 1
            verified.add(step)


def unfinished(place: Path) -> set[str]:
    """Directories of steps that are being written, or were when their writer was killed."""
    with suppress(OSError):
        return {name for name in os.listdir(place / "checkpoints") if name.startswith(".step_")}
    return set()


def newest(place: Path) -> int | None:
    """The step that training would go on from."""
    with suppress(StoreError):
        accepted: Callable[[Checkpoint], bool] = resumable
        checkpoint, _ = Run.open(place).latest_whole(accept=accepted)
        return checkpoint.step if checkpoint else None
    return None


def progress(place: Path) -> tuple[int, int]:
    """Which metrics file it is, and its last step; a life that goes on replaces the file first, which may leave it empty."""
    with suppress(OSError, StoreError, IndexError):
        return os.stat(place / "metrics.jsonl").st_ino, Run.open(place).metrics()[-1]["step"]
    return 0, -1


def disturb(config: Path, place: Path, chance: random.Random, pace: tuple[float, float], figures: Figures) -> bool:
    """One life: killed at a random moment, unless it ends before. Whether it ended. pace: seconds of start and of training."""
    by_command = chance.random() < 0.08
    start, training = pace
    before, aimed, left = progress(place), chance.random() < 0.5, unfinished(place)
    life = Life(config, place.name, by_command)
    figures.lives_by_command += by_command
    alive = life.lasts(lambda: False, chance.uniform(0, start + training / 4 + (4 if by_command else 0)))
    if alive and aimed:
        alive = life.lasts(lambda: bool(unfinished(place) - left), 60) and life.lasts(
            lambda: False, chance.uniform(0, 0.012)
        )
    if not alive:
        if life.code:
            raise SystemExit(
                f"a life ended by itself with {life.code}; see {life.log}:\n{life.log.read_text()[-3000:]}"
            )
        return True
    life.kill()
    figures.kills_in_saving += bool(unfinished(place) - left)
    figures.kills += 1
    after, kept = progress(place), newest(place)
    figures.continued += kept is not None
    figures.steps_done_again.append(max(0, after[1] - (kept or 0) + 1) if after[0] != before[0] else 0)
    return False


def one_run(config: Path, number: int, chance: random.Random, pace: tuple[float, float], figures: Figures) -> Path:
    """A run from its first life to its end, with a reader beside it."""
    place = config.parent / "runs" / f"killed_{number}"
    told, stop = config.with_name(f"told_{number}"), config.with_name(f"stop_{number}")
    reader = fork(lambda: read_all_the_while(place, told, stop), config.with_name("reader.log"))
    try:
        while not disturb(config, place, chance, pace, figures):
            pass
    finally:
        stop.touch()
        os.waitpid(reader, 0)
    seen = json.loads(told.read_text())
    figures.runs += 1
    figures.looks += seen["looks"]
    figures.verified += seen["verified"]
    figures.torn += seen["torn"]
    figures.lost += seen["lost"]
    return place


def undisturbed(config: Path) -> tuple[Run, tuple[float, float]]:
    """The run that nobody kills, after one that warms the caches; and its seconds until the first step, and from there on."""
    for name in ("warm", "whole"):
        place, begin = config.parent / "runs" / name, time.perf_counter()
        life = Life(config, name, by_command=False)
        life.lasts(lambda: (place / "checkpoints" / "step_0").exists(), 120)  # noqa: B023  (called within the turn)
        start = time.perf_counter() - begin
        if life.lasts(lambda: False, 600) or life.code:
            raise SystemExit(f"the undisturbed run failed; see {life.log}:\n{life.log.read_text()[-3000:]}")
    return Run.open(place), (start, time.perf_counter() - begin - start)


def differences(run: Run, whole: Run) -> list[str]:
    """Where a run is not the undisturbed one: steps, bytes of weights, optimizer and captures, lines of metrics."""
    found = [] if run.steps == whole.steps else [f"{run.name}: steps {run.steps}"]
    for step in run.steps:
        ours, theirs = (SealedCheckpoint(one.step_path(step)).files for one in (run, whole))
        changed = {name for name, _ in set(ours.items()) ^ set(theirs.items())}
        found += [f"{run.name}: step {step}: {name}" for name in sorted(changed)]
    lines, expected = ([_essence(line) for line in one.metrics()] for one in (run, whole))
    if lines != expected:
        found.append(f"{run.name}: its metrics are not the same lines, each once")
    return found


def _essence(line: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics without what a clock measured."""
    return {"step": line["step"]} | {key: value for key, value in line.items() if key.startswith(SAME)}


def crash(kills: int, seed: int) -> Figures:
    """Kill until there were that many kills and the last run ended."""
    figures, chance = Figures(), random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        config = prepare(Path(folder))
        whole, pace = undisturbed(config)
        while figures.kills < kills:
            place = one_run(config, figures.runs, chance, pace, figures)
            figures.different += differences(Run.open(place), whole)
    return figures


def table(figures: Figures) -> str:
    again = figures.steps_done_again
    rows = {
        "kills": f"{figures.kills}, {figures.kills_in_saving} of them while a step was being written",
        "lives that ended by a kill and left a checkpoint to go on from": figures.continued,
        "lives started with the command `pico train`": figures.lives_by_command,
        "runs, each killed until it ended": figures.runs,
        "steps done again after a kill": f"mean {statistics.mean(again):.2f}, most {max(again)} (a save every {CADENCE})",
        "looks of the reader, steps verified": f"{figures.looks:,}, {figures.verified:,}",
        "torn states seen": len(figures.torn),
        "steps that had been seen and were gone": len(figures.lost),
        "files or lines of metrics that differ from the undisturbed run": len(figures.different),
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="all figures, for a program")
    chosen = parser.parse_args()
    began = time.perf_counter()
    result = crash(chosen.kills, chosen.seed)
    print(json.dumps(vars(result)) if chosen.json else table(result))
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)
    for fault in [*result.torn, *result.lost, *result.different][:20]:
        print(fault, file=sys.stderr)
    sys.exit(bool(result.torn or result.lost or result.different))
