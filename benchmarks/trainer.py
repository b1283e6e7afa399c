"""What the trainer costs beyond the bare step, what capture costs, and how long a start takes.

    python benchmarks/trainer.py [--shape tiny|mid|small] [--steps 60] [KEY=VALUE …]

Bare steps (forward, backward, AdamW on batches that lie in memory) and steps of the whole trainer (data, clipping, logging,
capture and saving at their default cadence) are interleaved in one process, under one allocator setting, on the device and
in the precision that `auto` finds, or that the keys name; compiled where the trainer compiles.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from picolm.schema import load
from picolm.train.build import build
from picolm.train.config import schema_for
from picolm.train.devices import synchronize
from picolm.train.failure import StopSignal
from picolm.train.job import Due, Job
from picolm.train.loop import accumulate, measure, train, watch

SHAPES = {"tiny": (96, 384, 512), "mid": (384, 1536, 512), "small": (384, 1536, 2048)}  # width, hidden, length
CONFIG = """
data: {{dataset: {{name: "embedded:python"}}, dataloader: {{batch_size: 8}}, tokenizer: {{vocab_size: 4096}}}}
model: {{d_model: {width}, activation_hidden_dim: {hidden}, vocab_size: 4096, max_seq_len: {length}}}
training: {{max_steps: {steps}, optimization: {{gradient_accumulation_steps: 1}}}}
checkpointing: {{run_name: benchmark, runs_dir: {folder}, learning_dynamics: {{eval_data: null}}}}
evaluation: {{metrics: null}}
monitoring: {{logging: {{log_level: WARNING}}}}
"""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--shape", choices=SHAPES, default="tiny")
    arguments.add_argument("--steps", type=int, default=60)
    arguments.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    chosen = arguments.parse_args()
    width, hidden, length = SHAPES[chosen.shape]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        file = Path(folder) / "benchmark.yaml"
        file.write_text(CONFIG.format(width=width, hidden=hidden, length=length, steps=chosen.steps, folder=folder))
        job = build(load(file, schema_for, chosen.overrides), stack.enter_context(StopSignal()), stack)
        precision, mode = job.config.training.fabric.precision, "compiled" if job.compiled else "eager"
        print(
            f"{chosen.shape}: d_model {width}, 12 layers, 8 x {length} tokens, {precision}, {mode}, {job.device.type}, "
            f"{torch.get_num_threads()} threads"
        )
        compare(job)
        capture_cost(job)
        start_time(file, chosen.overrides)


def compare(job: Job) -> None:
    """Interleave trainer steps with bare ones; print seconds and their ratio."""
    bare, seconds = Bare(job), Interleaved(job)
    job.progress.advance = seconds.after_step(bare)  # type: ignore[method-assign]
    train(job)
    trainer, alone = statistics.mean(seconds.trainer[1:]), statistics.median(seconds.bare[1:])
    typical = statistics.median(seconds.trainer[1:])
    tokens = job.tokens_per_step
    print(f"bare step      {alone:.3f} s  {tokens / alone:,.0f} tokens/s (median of {len(seconds.bare) - 1})")
    print(f"trainer        {typical:.3f} s  {tokens / typical:,.0f} tokens/s (median of {len(seconds.trainer) - 1})")
    print(f"trainer / bare {typical / alone:.3f} (median; mean {trainer / alone:.3f})")


class Bare:
    """Forward, backward and a fused AdamW on a model of its own, with two batches that lie in memory."""

    def __init__(self, job: Job):
        self.job, self.at = job, 0
        self.model = type(job.state.model)(job.config.model)
        self.model.init_parameters(torch.Generator().manual_seed(0))
        self.model.to(job.device)
        self.loss = torch.compile(self.model.loss, dynamic=False) if job.compiled else self.model.loss
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, fused=True)
        self.batches = [torch.cat(job.batches(step)).to(job.device) for step in range(2)]

    def step(self) -> None:
        self.at += 1
        with self.job.fabric.autocast():
            loss = self.loss(self.batches[self.at % 2])
        (loss.nats / loss.tokens).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Interleaved:
    """Seconds of trainer steps, and of the bare step that is run after each of them."""

    def __init__(self, job: Job):
        self.trainer: list[float] = []
        self.bare: list[float] = []
        self.since = time.perf_counter()

    def after_step(self, bare: Bare) -> Any:
        def advance(step: int, loss: float, rate: float) -> None:
            synchronize(bare.job.device)
            self.trainer.append(time.perf_counter() - self.since)
            start = time.perf_counter()
            bare.step()
            synchronize(bare.job.device)
            self.bare.append(time.perf_counter() - start)
            self.since = time.perf_counter()

        return advance


def capture_cost(job: Job, repeats: int = 12) -> None:
    """Forward and backward with and without capture of gradients and activations, interleaved."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for repeat in range(2 * repeats):
        due, micro_batches = Due(dynamics=repeat % 2 == 1), job.batches(repeat // 2)
        start = time.perf_counter()
        with watch(job, repeat // 2, due, micro_batches):
            order = job.batches.rank_rows(repeat // 2)
            measure(job, accumulate(job, repeat // 2, micro_batches, order, job.tokens_per_step, due))
        seconds[due.dynamics].append(time.perf_counter() - start)
        job.state.model.zero_grad()
    off, on = (statistics.median(seconds[captured][1:]) for captured in (False, True))
    print(f"capture        {on - off:+.4f} s, {(on - off) / off:+.1%} of forward and backward ({off:.3f} s)")


def start_time(file: Path, overrides: list[str]) -> None:
    """Wall time of a fresh process that trains no step, and of one that trains one, data prepared already."""
    train = [sys.executable, "-c", "from picolm.cli import main; main()", "train", str(file)]
    command = [*train, "training.max_steps=0", *overrides]
    start = time.perf_counter()
    subprocess.run([*command, "checkpointing.run_name=start"], check=True, capture_output=True)
    print(
        f"start          {time.perf_counter() - start:.1f} s from the command to the end of the first forward, backward and save"
    )


if __name__ == "__main__":
    main()
