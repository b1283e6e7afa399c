"""Peak memory and speed of `pico data prepare`, for a corpus and for one ten times as large.

    python benchmarks/corpora.py                      # 20 and 200 MB, some minutes
    python benchmarks/corpora.py --megabytes 100      # 100 and 1000 MB

Each preparation is a process tree of its own: the command and its workers. Its memory is the sum
over its processes of what is resident, pages that several of them share counted once (PSS), looked at every 20 ms. All
preparations of one corpus have to end in the same shards.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

WAYS = {f"{workers} workers": ["--workers", str(workers)] for workers in (1, 2, 4)}
FILES = 100  # of either corpus: what grows is the text, and not the list of files


class Figures(NamedTuple):
    peak_mib: float
    seconds: float
    rows: int
    digest: str


def write_corpus(folder: Path, megabytes: int) -> Path:
    """100 files of documents of 3 kB, words from a list of 5000 in random order; no two documents are the same."""
    generator = np.random.default_rng(0)
    words = generator.integers(97, 123, (5000, 6), dtype=np.uint8)
    words[:, -1] = 32
    folder.mkdir()
    for number in range(FILES):
        with (folder / f"{number:05d}.jsonl").open("w") as file:
            for _ in range(megabytes * 333 // FILES):
                text = words[generator.integers(0, 5000, 500)].tobytes().decode()
                file.write(json.dumps({"text": text}) + "\n")
    return folder


def measure(corpus: Path, tokenizer: Path, out: Path, way: list[str]) -> Figures:
    """Prepare a corpus in a process of its own."""
    code = "from picolm.cli import main; main()"
    options = ["--tokenizer", tokenizer, "--seq-len", 512, "--val-fraction", 0.01, "--deduplicate"]
    command = [sys.executable, "-c", code, "data", "prepare", corpus, "--out", out, *options, *way]
    start, peak = time.monotonic(), 0.0
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None:
        peak = max(peak, resident_mib(process.pid))
        time.sleep(0.02)
    seconds = time.monotonic() - start
    if process.returncode:
        raise SystemExit(process.communicate()[1].decode())
    process.communicate()
    manifest = json.loads((out / "manifest.json").read_text())
    shards = [shard for shards in manifest["splits"].values() for shard in shards]
    digest = hashlib.sha256("".join(shard["sha256"] for shard in shards).encode()).hexdigest()[:12]
    return Figures(peak, seconds, sum(shard["rows"] for shard in shards), digest)


def resident_mib(root: int) -> float:
    """Resident memory of a process and all that descend from it."""
    parents = dict[int, int]()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, IndexError):  # it has just ended
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    tree, grown = {root}, True
    while grown:
        children = {child for child, parent in parents.items() if parent in tree} - tree
        grown, tree = bool(children), tree | children
    total = 0
    for process in tree:
        with suppress(OSError, IndexError):
            text = Path(f"/proc/{process}/smaps_rollup").read_text()
            total += int(text.split("Pss:")[1].split()[0])
    return total / 1024


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=20)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = [given.megabytes, given.megabytes * given.times]
        corpora = [write_corpus(folder / f"{size}", size) for size in sizes]
        tokenizer = folder / "tokenizer"
        from picolm.data.prepare import prepare

        prepare([next(iter(sorted(corpora[0].iterdir())))], tokenizer, vocab_size=4096, seq_len=64)
        print("| preparation | text, MB | peak memory, MiB | seconds | rows/s | shards |\n|---|---|---|---|---|---|")
        for way in given.ways:
            for size, corpus in zip(sizes, corpora):
                out = folder / f"{way}-{size}"
                found = measure(corpus, tokenizer, out, WAYS[way])
                speed = found.rows / found.seconds
                print(
                    f"| {way} | {size} | {found.peak_mib:.0f} | {found.seconds:.0f} | {speed:.0f} | {found.digest} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
