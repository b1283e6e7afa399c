"""What a Recorder costs a training loop that is not Pico's, at its default cadence: the loop with it and without it, in turns.

    python benchmarks/recorder.py [--steps 1000] [--width 128] [--layers 3] [--rows 8] [--turns 5]

The loop is that of examples/nanogpt.py on random tokens, with AdamW. One save falls into 1000 steps, and one at the end; both are
in the time, with everything on disk. Each side runs in a process of its own; the order changes from turn to turn. Where other
work on the machine changes the speed from one process to the next, that ratio says little; the share of the time that the loop
spends inside of the Recorder is measured beside it.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the examples are beside this folder
from examples.nanogpt import GPT

LENGTH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--side", choices=("plain", "recorded"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.side:
        print(*train(chosen.steps, chosen.width, chosen.layers, chosen.rows, chosen.side == "recorded"))
        return
    seconds: dict[str, list[float]] = {"plain": [], "recorded": []}
    for turn in range(chosen.turns):
        for side in list(seconds)[:: 1 if turn % 2 == 0 else -1]:
            done = subprocess.run(
                [sys.executable, *sys.argv, "--side", side], capture_output=True, text=True, check=True
            )
            total, inside = map(float, done.stdout.split())
            seconds[side].append(total)
            words = f", of these {inside:.3f} s in the Recorder ({inside / (total - inside):.2%})" if inside else ""
            print(f"turn {turn + 1}, {side}: {total:.2f} s{words}", flush=True)
    ratios = [recorded / plain for plain, recorded in zip(*seconds.values())]
    print(
        f"with / without, median of {chosen.turns} turns: {statistics.median(ratios):.4f}  ({[round(r, 4) for r in ratios]})"
    )


def train(steps: int, width: int, layers: int, rows: int, record: bool) -> tuple[float, float]:
    """Return the seconds of the loop, saving included, without imports and the first step; and those inside of the Recorder."""
    torch.manual_seed(0)
    model = GPT(4096, LENGTH, width, layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batch = torch.randint(4096, (rows, LENGTH + 1))
    update(model, optimizer, batch, nullcontext())
    with tempfile.TemporaryDirectory() as folder:
        recorder: Any = None
        if record:
            from picolm import Recorder

            recorder = Recorder(f"{folder}/run", model, optimizer)
        start, inside = time.perf_counter(), Inside()
        for n in range(steps):
            loss = update(model, optimizer, batch, inside.of(recorder.step(n, batch)) if record else nullcontext())
            if record:
                with inside:
                    recorder.log(n, {"train/loss": loss})
        if record:
            with inside:
                recorder.close()
        return time.perf_counter() - start, inside.seconds


class Inside:
    """Adds up the seconds in its own blocks, and those that another block takes to begin and to end."""

    def __init__(self) -> None:
        self.seconds = self._begun = 0.0

    def __enter__(self) -> None:
        self._begun = time.perf_counter()

    def __exit__(self, *failed: object) -> None:
        self.seconds += time.perf_counter() - self._begun

    @contextmanager
    def of(self, block: AbstractContextManager[Any]) -> Iterator[None]:
        with self:
            block.__enter__()
        yield
        with self:
            block.__exit__(None, None, None)


def update(
    model: GPT, optimizer: torch.optim.Optimizer, batch: torch.Tensor, block: AbstractContextManager[Any]
) -> torch.Tensor:
    with block:
        _, loss = model(batch[:, :-1], batch[:, 1:])
        assert loss is not None
        loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss


if __name__ == "__main__":
    main()
