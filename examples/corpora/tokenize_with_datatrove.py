"""Text of any size -> .ds files, by datatrove's own pipeline on this machine, on SLURM or on Ray. Pico reads them as they are.

    python tokenize_with_datatrove.py TEXTS OUT --tokenizer TOKENIZER.json --tasks 8
    python tokenize_with_datatrove.py TEXTS OUT --tokenizer TOKENIZER.json --tasks 400 --executor slurm --partition cpu
    pico train CONFIG.yaml data.dataset.name=datatrove:OUT data.dataset.shuffle=true

TEXTS: a folder of .jsonl, also .gz or .zst, with the field `text`. Each task tokenizes every N-th file, shuffles its documents,
cuts them into chunks of seq_len + 1 tokens, and shuffles these. Started again, it does the tasks that are not finished. Readers
of other files, and filters (datatrove.pipeline.filters) between the reader and the tokenizer, are datatrove's.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer


def main() -> None:
    """Tokenize, here or by handing in jobs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a tokenizer.json")
    parser.add_argument("--eos", default="<|endoftext|>", help="the token that ends a document")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--workers", type=int, default=-1, help="tasks at once; -1: all")
    parser.add_argument("--executor", choices=["local", "slurm", "ray"], default="local")
    parser.add_argument("--partition", help="of SLURM")
    parser.add_argument("--time", default="24:00:00", help="of SLURM, for a task")
    given = parser.parse_args()
    texts, out = given.texts.absolute(), given.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(given.tokenizer, out / "tokenizer.json")  # Pico looks for it beside the tokens
    steps = [
        JsonlReader(str(texts), recursive=True),
        DocumentTokenizer(
            str(out / "train"),
            str(out / "tokenizer.json"),
            local_working_dir=str(out / ".unshuffled"),
            eos_token=given.eos,
            shuffle_chunk_size=given.seq_len + 1,
            seed=given.seed,
        ),
    ]
    common: dict[str, Any] = {"tasks": given.tasks, "logging_dir": str(out / ".logs")}
    if given.executor == "slurm":
        SlurmPipelineExecutor(
            steps,
            partition=given.partition,
            time=given.time,
            job_name="tokenize",
            qos=None,
            workers=given.workers,
            **common,
        ).run()
    else:
        executor = LocalPipelineExecutor if given.executor == "local" else RayPipelineExecutor
        executor(steps, workers=given.workers, **common).run()


if __name__ == "__main__":
    main()
