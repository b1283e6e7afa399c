"""What each safeguard costs: determinism, capture, saving beside the training, digests of the weights.

    python benchmarks/safeguards.py [--shape tiny|mid] [--rounds 7] [--every 10]

One process holds a run per variant, which differ in one switch each. They take turns, block by block: a block is `every` steps
with one checkpoint (weights, optimizer, captures) and one line of metrics, a hundred times denser than by default. Printed are
medians, the ratio to the run with every safeguard on, and what one event costs.
"""

import argparse
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from trainer import SHAPES

from picolm.schema import load
from picolm.train import devices
from picolm.train.build import build
from picolm.train.config import schema_for
from picolm.train.failure import StopSignal
from picolm.train.job import Due, Job, Schedule
from picolm.train.loop import train

CONFIG = """
data: {{dataset: {{name: "embedded:python"}}, dataloader: {{batch_size: 8}}, tokenizer: {{vocab_size: 4096}}}}
model: {{d_model: {width}, activation_hidden_dim: {hidden}, vocab_size: 4096, max_seq_len: {length}}}
training: {{max_steps: 1000000, optimization: {{gradient_accumulation_steps: 1}}}}
checkpointing: {{runs_dir: {folder}, save_every_n_steps: {every}, learning_dynamics: {{eval_data: null}},
  keep: {{weights: last 2, optimizer: last 2, dynamics: last 2}}}}
evaluation: {{metrics: null}}
monitoring: {{logging: {{log_level: WARNING, log_every_n_steps: {every}}}}}
"""
VARIANTS = {
    "every safeguard on": "training.deterministic=true",
    "training.deterministic=false": "training.deterministic=false",
    "no capture": "checkpointing.save_learning_dynamics=last",
    "save_in_background=false": "checkpointing.save_in_background=false",
    "no digests": "monitoring.logging.digest_every_n_steps=0",
    "no checkpoints": "checkpointing.save_every_n_steps=1000000",
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--shape", choices=SHAPES, default="tiny")
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--every", type=int, default=10)
    chosen = arguments.parse_args()
    width, hidden, length = SHAPES[chosen.shape]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        file = Path(folder) / "safeguards.yaml"
        file.write_text(CONFIG.format(width=width, hidden=hidden, length=length, folder=folder, every=chosen.every))
        stop = stack.enter_context(StopSignal())
        jobs = {
            name: build(load(file, schema_for, [switch, f"checkpointing.run_name=variant{number}"]), stop, stack)
            for number, (name, switch) in enumerate(VARIANTS.items())
        }
        seconds: dict[str, list[float]] = {name: [] for name in jobs}
        for turn in range(chosen.rounds + 1):
            for name, job in jobs.items():
                seconds[name].append(block(job, turn, chosen.every))
    base = statistics.median(seconds["every safeguard on"][1:])
    print(
        f"{chosen.shape}: d_model {width}, 12 layers, 8 x 512 tokens; blocks of {chosen.every} steps, {chosen.rounds} rounds"
    )
    for name, measured in seconds.items():
        typical = statistics.median(measured[1:])
        print(
            f"{name:32} {typical:7.3f} s  x {typical / base:.3f}  {1000 * (base - typical):+8.1f} ms a block less than with it"
        )


class Stretch:
    """The plan of a job up to `last`, where nothing is due: the next stretch begins there."""

    def __init__(self, original: Schedule, last: int):
        self.original, self.last = original, last

    def due(self, step: int) -> Due:
        return self.original.due(step) if step < self.last else Due()

    def when_stopping(self, step: int) -> Due:
        return Due()


def block(job: Job, turn: int, steps: int) -> float:
    """Seconds of `steps` updates and one forward and backward pass more; the first step is saved and logged."""
    devices.set_determinism(bool(job.config.training.deterministic))
    original, job.plan = job.plan, Stretch(job.plan, (turn + 1) * steps)
    start = time.perf_counter()
    train(job)
    elapsed = time.perf_counter() - start
    job.plan = original
    job.state.model.zero_grad()
    return elapsed


if __name__ == "__main__":
    main()
