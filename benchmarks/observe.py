"""What it costs to ask a checkpoint, next to plain transformers; and to measure weights, next to the linear algebra alone.

    python benchmarks/observe.py [--width 512] [--layers 6] [--checkpoints 20] [--rows 16] [--length 256] [--analyze 768x12]

Makes a series of GPT-NeoX with random weights (float16 files, as those of Pythia). Each side, in a process of its own, gives for
each checkpoint the activations at all positions and the gradients of the outputs of attention and MLPs on the same rows, and
writes them to a file: ours as an analysis does it, with digests; plain transformers with `from_pretrained`, forward hooks, one
backward and safetensors. Then an analysis of weights is compared with its own calls of LAPACK and BLAS alone (see analyze.py).
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

MODULES = ("attention.dense", "mlp.dense_4h_to_h")
ANALYSIS = """
metrics:
- {metric_name: effective_rank, components: [{component_name: simple, layer_suffixes: [attention.value, mlp.output]}]}
- {metric_name: norm, norm_type: nuclear, components: [{component_name: ov_circuit}, {component_name: qk_circuit}]}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--checkpoints", type=int, default=20)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--analyze", default="768x12", help="Width and layers of the model whose weights are analyzed.")
    parser.add_argument("--side", choices=("ours", "plain"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.side:
        report(ours(chosen.folder) if chosen.side == "ours" else plain(chosen.folder))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_series(folder / "series", chosen.width, chosen.layers, chosen.checkpoints)
        ids = np.random.default_rng(0).integers(0, 50304, (chosen.rows, chosen.length + 1))
        np.save(folder / "rows.npy", ids)
        compare(folder)
    with tempfile.TemporaryDirectory() as name:
        width, layers = map(int, chosen.analyze.split("x"))
        weights_only(Path(name), width, layers)


def make_series(folder: Path, width: int, layers: int, checkpoints: int) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64 or 1,
                           intermediate_size=4 * width, vocab_size=50304, tie_word_embeddings=False)  # fmt: skip
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(config).half()
    for step in range(checkpoints):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape[-1]).half() * 1e-3)
        model.save_pretrained(folder / f"step{step}")


def compare(folder: Path) -> None:
    """Let both sides run, each twice, and print the medians of what a checkpoint takes after the first."""
    print(
        "| side | first checkpoint, s | each further one, s | peak memory after 2, after all, MiB |\n|---|---|---|---|"
    )
    rates = {}
    for side in ("plain", "ours"):
        seconds, memory = [], []
        for line in answers(side, folder):
            second, mebibytes = map(float, line.split())
            seconds.append(second)
            memory.append(mebibytes)
        rates[side] = float(np.median(seconds[1:])) if len(seconds) > 1 else seconds[0]
        print(
            f"| {side} | {seconds[0]:.2f} | {rates[side]:.2f} | {memory[min(1, len(memory) - 1)]:.0f}, {memory[-1]:.0f} |"
        )
    print(f"ours / plain: {rates['ours'] / rates['plain']:.2f}")


def answers(side: str, folder: Path) -> list[str]:
    environment = os.environ | {"PICO_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return [line for line in done.stdout.splitlines() if line and line[0].isdigit()]


def report(checkpoints: Iterator[None]) -> None:
    """Print, for each checkpoint, its seconds and the peak memory of the process so far."""
    start = time.perf_counter()
    for _ in checkpoints:
        now = time.perf_counter()
        print(f"{now - start:.4f} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f}", flush=True)
        start = time.perf_counter()


def ours(folder: Path) -> Iterator[None]:
    from picolm.observe.config import Observe
    from picolm.observe.observed import observers
    from picolm.store import Run

    run = Run.open(folder / "series")
    asked = Observe(rows=str(folder / "rows.npy"), positions="all", modules=MODULES)
    observer = observers(asked, {run.name: run})[run.name]
    for step in run.steps:
        observer.at(run[step]).fetch(observer.addresses)
        yield


def plain(folder: Path) -> Iterator[None]:
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    ids = torch.as_tensor(np.load(folder / "rows.npy"))
    for place in sorted((folder / "series").iterdir()):
        model = AutoModelForCausalLM.from_pretrained(place, attn_implementation="eager", dtype=torch.float32).eval()
        kept: dict[str, list[torch.Tensor]] = {}

        def keep(name: str, kept: dict[str, list[torch.Tensor]] = kept) -> Any:
            return lambda module, arguments, output: kept.setdefault(name, []).append(output.detach().clone())

        chosen = {name: module for name, module in model.named_modules() if name.endswith(MODULES)}
        for name, module in chosen.items():
            module.register_forward_hook(keep(name))
        for batch in ids.split(8):
            logits = model(batch[:, :-1], use_cache=False).logits
            nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
            (nats / ids[:, 1:].numel()).backward()
        tensors = {f"activations/{name}": torch.cat(outputs) for name, outputs in kept.items()}
        for name, module in chosen.items():
            tensors |= {f"gradients/{name}.{key}": parameter.grad for key, parameter in module.named_parameters()}
        save_file(tensors, folder / f"{place.name}.safetensors")
        del model
        yield


def weights_only(folder: Path, width: int, layers: int) -> None:
    """An analysis of the weights of two checkpoints, and the same calls of LAPACK and BLAS alone."""
    from analyze import Recording, anew
    from picolm.analyze.config import AnalysisConfig
    from picolm.schema import load

    make_series(folder / "run", width, layers, 2)
    (folder / "analysis.yaml").write_text(f"{ANALYSIS}monitoring: {{output_dir: {folder}/results}}\n")
    config, every = load(folder / "analysis.yaml", AnalysisConfig), torch.get_num_threads()
    torch.set_num_threads(1)
    with Recording() as recording:
        anew(config, folder)
    torch.set_num_threads(every)
    whole, alone = [], []
    for _ in range(3):
        outcome, seconds = anew(config, folder)
        whole.append(seconds)
        alone.append(recording.repeat(1, every))
    print(
        f"weights of GPT-NeoX {width}x{layers}: {len(outcome.rows) // 2} values of a checkpoint in {min(whole) / 2:.2f} s; its "
        f"calls of algebra alone: {min(alone) / 2:.2f} s: {min(whole) / min(alone):.2f} x"
    )


if __name__ == "__main__":
    main()
