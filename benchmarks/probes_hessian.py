"""What the sharpness of a model costs, next to PyHessian's, at the same residual.

    python benchmarks/probes_hessian.py [--width 256] [--layers 4] [--vocabulary 1024] [--rows 8] [--length 128]

Makes a Llama with random weights and measures the largest eigenvalue of its Hessian on the same rows in float32, and its trace by
the same number of vectors: ours by Lanczos on the kept graph of the gradient, PyHessian by power iteration. PyHessian is given
more iterations until the residual of its vector, by our product, is at most ours. Without PyHessian (pip install pyhessian) its
column is empty.
"""

import argparse
import importlib
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

TRACE_VECTORS = 4
ITERATIONS = (4, 8, 16, 32, 64, 128, 256, 512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--tolerance", type=float, default=1e-3, help="Largest residual, over the eigenvalue.")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name) / "series"
        make_model(place / "step_0", chosen.width, chosen.layers, chosen.vocabulary, chosen.length)
        ids = np.random.default_rng(0).integers(0, chosen.vocabulary, (chosen.rows, chosen.length + 1))
        print(table(place, torch.as_tensor(ids), chosen.tolerance))


def make_model(folder: Path, width: int, layers: int, vocabulary: int, length: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=length, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def table(place: Path, tokens_BS: Tensor, tolerance: float) -> str:
    """Return CPU seconds, products, residual and eigenvalue of both sides as a Markdown table."""
    from picolm.observe.subject import Subject
    from picolm.observe.surface import Surface
    from picolm.observe.training import rows_of_tokens
    from picolm.probes.hessian import Asked, lanczos
    from picolm.store import Run

    surface = Surface(Subject(Run.open(place)), rows_of_tokens(tokens_BS), torch.float32, len(tokens_BS))
    begin = time.process_time()
    start_D = torch.randn(len(surface.start_D), generator=torch.Generator().manual_seed(0))
    found = lanczos(surface.hessian_product, start_D, Asked(1, 0, 512, tolerance, 0, False, 0))
    ours = (time.process_time() - begin, found.products, float(found.residuals_K[0]), float(found.values_K[0]))
    begin = time.process_time()
    for seed in range(TRACE_VECTORS):
        signs_D = torch.randint(0, 2, start_D.shape, generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
        surface.hessian_product(signs_D)
    trace_s = time.process_time() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    lines = [
        f"{len(start_D):,} parameters, {tokens_BS.numel():,} tokens, float32, {torch.get_num_threads()} thread(s)",
        "| | largest eigenvalue, CPU s | products | residual | eigenvalue | trace of 4 vectors, CPU s | peak GiB so far |",
        "|---|---|---|---|---|---|---|",
        _line("ours", *ours, trace_s, peak),
    ]
    theirs = _of_pyhessian(surface, tokens_BS, ours[2])
    return "\n".join([*lines, theirs or "| PyHessian | not installed | | | | | |"])


def _line(name: str, seconds: float, products: int, residual: float, value: float, trace_s: float, peak: float) -> str:
    return f"| {name} | {seconds:.2f} | {products} | {residual:.2g} | {value:.5g} | {trace_s:.2f} | {peak:.2f} |"


def _of_pyhessian(surface: Any, tokens_BS: Tensor, residual: float) -> str | None:
    """Return the line of PyHessian: its first number of iterations with a residual as small, or its last one."""
    try:
        hessian = importlib.import_module("pyhessian").hessian
    except ImportError:
        return None
    from picolm.models.attention import twice_differentiable

    def loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())

    data = (tokens_BS[:, :-1], tokens_BS[:, 1:])
    line = ""
    for iterations in ITERATIONS:
        torch.manual_seed(0)
        with twice_differentiable():
            begin = time.process_time()
            asked = hessian(surface.model, loss, data=data, cuda=False)
            values, vectors = asked.eigenvalues(maxIter=iterations, tol=0.0, top_n=1)
            seconds = time.process_time() - begin
            begin = time.process_time()
            asked.trace(maxIter=TRACE_VECTORS, tol=-float("inf"))  # its own rule ends at a negative trace
            trace_s = time.process_time() - begin
        vector_D = torch.cat([part.flatten() for part in vectors[0]])
        found = float((surface.hessian_product(vector_D) - values[0] * vector_D).norm())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        line = _line("PyHessian", seconds, iterations, found, values[0], trace_s, peak)
        if found <= residual:
            break
    return line


if __name__ == "__main__":
    main()
