"""Commits steps to a run until it is killed, again and again. Usage: writer_to_kill.py RUN KILLS SEED

Each round is a forked process that opens the run, goes on after its newest whole step, and dies by SIGKILL at a random
moment. Prints one JSON object: steps that were written, and what a round found damaged (nothing, one hopes).
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from picolm.address import Address
from picolm.store import Run


def write_steps(run: Run, ready: int) -> None:
    """Never returns. Leaves what it found damaged in a file, since nobody hears it otherwise."""
    checkpoint, problems = run.latest_whole()
    if problems:
        Path(run.path, "problems").write_text("\n".join(problems))
    step = checkpoint.step + 1 if checkpoint else 0
    while True:
        values = torch.full((64, 512), float(step))
        tensors = {
            Address(kind, "", f"layers.{layer}.w"): values for layer in range(2) for kind in ("weights", "exp_avg")
        }
        run.commit(step, tensors, meta={"step": step}, texts={"config.json": "{}"})
        run.append_metrics({"step": step})
        if step:
            run.thin(step - 1, {"optimizer"})
        os.write(ready, b"!")  # the clock of the killer starts after one step, so that every round gets on
        step += 1


def main(place: str, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    chance = random.Random(seed)
    for _ in range(kills):
        listen, ready = os.pipe()
        child = os.fork()
        if child == 0:
            write_steps(Run.open(place), ready)
        os.read(listen, 1)
        time.sleep(chance.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(listen)
        os.close(ready)
    found = Path(place, "problems")
    print(json.dumps({"steps": Run.open(place).steps, "damaged": found.read_text() if found.exists() else ""}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
