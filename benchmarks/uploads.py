"""What it costs a training that its steps go to the Hub as they are saved.

    python benchmarks/uploads.py [--shape tiny|mid] [--rounds 7] [--every 10]

Two runs in one process take turns, block by block, as in safeguards.py: one keeps its checkpoints, the other sends them as well
(`checkpointing.save_to_hf`), to the Hub of the tests in a process of its own on this machine. What that process computes is in
the figure, so it is an upper bound; a network that is slow costs time, but none of this machine's. The uploads of a block end
before the next block begins: what of them outlived their own block is printed.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

TOKEN = "hf_benchmark"
NAMES = ("saved", "saved and sent")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--shape", choices=("tiny", "mid"), default="tiny")
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--every", type=int, default=10)
    arguments.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    chosen = arguments.parse_args()
    if chosen.serve:
        return serve(chosen.serve)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        server = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(Path(folder) / "hub")], stdout=subprocess.PIPE, text=True
        )
        stack.callback(server.kill)
        assert server.stdout is not None
        os.environ |= {
            "HF_ENDPOINT": server.stdout.readline().strip(), "HF_TOKEN": TOKEN, "HF_HOME": f"{folder}/hf",
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "0",
        }  # fmt: skip
        compare(Path(folder), chosen.shape, chosen.rounds, chosen.every, stack)
        print(f"the Hub computed for {processor_seconds(server.pid) / (chosen.rounds + 1):.2f} s a block")


def serve(storage: Path) -> None:
    """Answer until killed; the address is the first line of output."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.hub_writing import WritableHub

    with WritableHub(storage, TOKEN).serving() as server:
        print(server.url, flush=True)
        time.sleep(1e6)


def processor_seconds(process: int) -> float:
    """What a process computed so far (fields 14 and 15 of proc(5)'s stat)."""
    user, system = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def compare(folder: Path, shape: str, rounds: int, every: int, stack: ExitStack) -> None:
    """Train in turns; print what a block takes of either run."""
    from safeguards import CONFIG, SHAPES, block  # not before the environment says where the Hub is

    from picolm.exchange.outbox import Outbox
    from picolm.schema import load
    from picolm.train.build import build
    from picolm.train.config import schema_for
    from picolm.train.failure import StopSignal

    width, hidden, length = SHAPES[shape]
    file = folder / "uploads.yaml"
    file.write_text(CONFIG.format(width=width, hidden=hidden, length=length, folder=folder, every=every))
    to_hub = ["checkpointing.save_to_hf=true", "checkpointing.hf_checkpoint.repo_id=lab/run"]
    stop = stack.enter_context(StopSignal())
    jobs = [
        build(load(file, schema_for, [f"checkpointing.run_name=run{number}", *switches]), stop, stack)
        for number, switches in enumerate([list[str](), to_hub])
    ]
    sent = jobs[1].run
    assert sent is not None
    seconds, beyond = [list[float](), list[float]()], list[float]()
    for turn in range(rounds + 1):
        for job, measured in zip(jobs, seconds):
            measured.append(block(job, turn, every))
        start = time.perf_counter()
        while Outbox(sent).held:
            time.sleep(0.01)
        beyond.append(time.perf_counter() - start)
    mebibytes = sum(path.stat().st_size for path in (folder / "hub").rglob("*") if path.is_file()) / 2**20
    print(f"{shape}: d_model {width}, 12 layers, 8 x 512 tokens; blocks of {every} steps, {rounds} rounds")
    for name, measured in zip(NAMES, seconds):
        typical = statistics.median(measured[1:])
        print(f"{name:16} {typical:7.3f} s a block  x {typical / statistics.median(seconds[0][1:]):.3f}")
    print(f"{mebibytes / (rounds + 1):.1f} MiB sent a block; {statistics.median(beyond):.2f} s of it after the block")


if __name__ == "__main__":
    main()
