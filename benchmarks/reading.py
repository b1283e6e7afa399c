"""How much there is to read: lines of Python by room, and the files whose functions a training calls until its first update.

    python benchmarks/reading.py [--config configs/demo.yaml]

Lines are all lines of all files, blank lines and docstrings included. The second part runs `pico train` with that configuration
in this process, in a temporary folder, and ends it when the first optimizer step, with the capture and the evaluation of step 0
before it, is done.
"""

import argparse
import os
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import picolm

SOURCE = Path(picolm.__file__).parent
TRAINING = ("models", "capture", "data", "store", "train")
"""The rooms that `pico train` needs, beside the files of the foundation; of `data` without what prepares text."""
PREPARATION = {"prepare", "scan", "recipe", "shards", "documents", "walk", "filters", "merge", "inspection", "decode"}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--config", type=Path, default=Path(__file__).parents[1] / "configs/demo.yaml")
    chosen = arguments.parse_args()
    print_lines()
    print_called(chosen.config.absolute())


def print_lines() -> None:
    """Print the lines of each room, and those of the rooms that a training needs."""
    lines: Counter[str] = Counter()
    files: Counter[str] = Counter()
    training = 0
    for file in sorted(SOURCE.rglob("*.py")):
        parts = file.relative_to(SOURCE).parts
        room = parts[0] if len(parts) > 1 else "foundation"
        count = file.read_text().count("\n")
        lines[room] += count
        files[room] += 1
        if room in TRAINING and not (room == "data" and file.stem in PREPARATION):
            training += count
    print("| room | lines | files |\n|---|---|---|")
    for room in sorted(lines):
        print(f"| {room} | {lines[room]:,} | {files[room]} |")
    print(f"| all | {lines.total():,} | {files.total()} |")
    print(f"| needed by `pico train` ({', '.join(TRAINING)}, without what prepares text) | {training:,} | |\n")


def print_called(config: Path) -> None:
    """Train until the first update is done, and print the files whose functions were called."""
    called: set[str] = set()
    done: CodeType | None = None

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(SOURCE)) and code.co_name != "<module>":
            called.add(code.co_filename)
        if event == "return" and code is done:
            sys.setprofile(None)
            threading.setprofile(None)
            raise SystemExit

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        from picolm.cli import main as command
        from picolm.train.loop import update

        done = update.__code__
        sys.argv = ["pico", "train", str(config), "checkpointing.run_name=traced"]
        threading.setprofile(watch)
        sys.setprofile(watch)
        try:
            command()
        except SystemExit:
            pass
        finally:
            sys.setprofile(None)
            os.chdir("/")
    names = sorted(str(Path(name).relative_to(SOURCE)) for name in called)
    print(f"{len(names)} files have functions that are called until the first update is done:\n" + "\n".join(names))


if __name__ == "__main__":
    main()
