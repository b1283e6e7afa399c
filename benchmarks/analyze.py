"""How fast an analysis is, next to the linear algebra that it cannot do without.

    python benchmarks/analyze.py [--shapes tiny,small] [--rows 1024] [--steps 4]

Makes a run of the published shape with random tensors (12 layers, 12 heads, 4 key-value heads, activations of `--rows` rows,
gradients and weights of v_proj, o_proj and w_2), and analyzes it as pico-analyze's demo does: seven metrics of OV circuits and
MLPs. The minimum is the same calls of LAPACK and BLAS, recorded while the analysis runs and repeated alone: each on the first
matrix that had its shape and layout, so that decompositions take as many iterations, and with the number of threads that is
faster, one or all. Reading files, digests, names, sorting entries and the table are what is on top of it.
"""

import argparse
import contextlib
import io
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from picolm.address import Address
from picolm.analyze.config import AnalysisConfig
from picolm.analyze.engine import analyze
from picolm.analyze.work import Outcome
from picolm.schema import load
from picolm.store import Run

SHAPES = {"tiny": (96, 384), "small": (384, 1536)}
CONFIG = """
metrics:
  - {metric_name: cka, target_checkpoint: last, components: [{component_name: ov_circuit, data_type: activations}]}
  - {metric_name: pwcca, target_checkpoint: last, components: [{component_name: ov_circuit, data_type: activations}]}
  - {metric_name: per, components: [{data_type: gradients, layer_suffixes: swiglu.w_2}]}
  - {metric_name: condition_number, components: [{layer_suffixes: swiglu.w_2}]}
  - {metric_name: gini, components: [{layer_suffixes: swiglu.w_2}]}
  - {metric_name: hoyer, components: [{data_type: gradients, layer_suffixes: swiglu.w_2}]}
  - {metric_name: norm, norm_type: nuclear, components: [{component_name: ov_circuit}]}
"""
ALGEBRA = (
    torch.linalg.svdvals,
    torch.linalg.svd,
    torch.linalg.qr,
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="tiny,small")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=4)
    chosen = parser.parse_args()
    for shape in chosen.shapes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            measure(shape, Path(folder), chosen.rows, chosen.steps)


def measure(shape: str, folder: Path, rows: int, steps: int) -> None:
    """Analyze once to warm up and to record the algebra, then time the analysis and the algebra alone, in turns."""
    make_run(folder / "run", *SHAPES[shape], rows, steps)
    every = torch.get_num_threads()
    (folder / "analysis.yaml").write_text(f"{CONFIG}monitoring: {{output_dir: {folder}/results}}\n")
    config = load(folder / "analysis.yaml", AnalysisConfig)
    torch.set_num_threads(1)
    with Recording() as recording:  # which sees the calls of its own thread only
        anew(config, folder)
    torch.set_num_threads(every)
    ways = {"one thread": (1, 1), f"{every} threads of LAPACK": (every, 1), f"{every} calls at a time": (1, every)}
    whole: list[float] = []
    alone: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(3):
        outcome, seconds = anew(config, folder)
        whole.append(seconds)
        for way, how in ways.items():
            alone[way].append(recording.repeat(*how))
    seconds = min(whole)
    print(
        f"{shape}: {len(outcome.rows)} values from {outcome.read} tensors ({rows} rows, {steps} checkpoints) in {seconds:.2f} s, "
        f"{len(outcome.rows) / seconds:,.0f} values/s; the {len(recording.calls)} calls of algebra alone:"
    )
    for way, measured in alone.items():
        print(f"  {way:22} {min(measured):.2f} s: {seconds / min(measured):.2f} x")


def anew(config: AnalysisConfig, folder: Path) -> tuple[Outcome, float]:
    """An analysis with nothing known from before, and its seconds."""
    (folder / "results" / ".values.sqlite").unlink(missing_ok=True)
    start = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):
        outcome = analyze(config, [str(folder / "run")])
    return outcome, time.perf_counter() - start


class Recording(TorchFunctionMode):
    """Keeps every call of LAPACK and BLAS, and of its matrices the first one of each shape and layout."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, list[Any], dict[str, Any]]] = []
        self._first: dict[Any, torch.Tensor] = {}

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function in ALGEBRA:
            self.calls.append((function, [self._like(argument) for argument in arguments], options or {}))
        return function(*arguments, **(options or {}))

    def _like(self, argument: Any) -> Any:
        if not isinstance(argument, torch.Tensor):
            return argument
        form = argument.shape, argument.stride(), argument.dtype
        if form not in self._first:  # a view keeps its strides
            self._first[form] = torch.empty_strided(*form[:2], dtype=form[2]).copy_(argument)
        return self._first[form]

    def repeat(self, threads: int, beside: int) -> float:
        """Seconds of the same calls, nothing else between them: `beside` at a time, each with `threads` of LAPACK."""
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        start = time.perf_counter()
        with ThreadPoolExecutor(beside) as pool:
            list(pool.map(self._call, [self.calls[number::beside] for number in range(beside)]))
        seconds = time.perf_counter() - start
        torch.set_num_threads(before)
        return seconds

    @staticmethod
    def _call(calls: list[tuple[Any, list[Any], dict[str, Any]]]) -> None:
        for function, arguments, options in calls:
            function(*arguments, **options)


def make_run(path: Path, width: int, hidden: int, rows: int, steps: int) -> None:
    """A run with random tensors of the published shape, at steps 0, 1, 2, …"""
    generator = torch.Generator().manual_seed(0)
    model = {"d_model": width, "n_layers": 12, "attention_n_heads": 12, "attention_n_kv_heads": 4}
    run = Run.create(path, {"model": model}, {})
    shapes = {
        "attention.v_proj": (width // 3, width),
        "attention.o_proj": (width, width),
        "swiglu.w_2": (width, hidden),
    }
    for step in range(steps):
        tensors = {}
        for name, (out, into) in ((f"layers.{i}.{n}", s) for i in range(12) for n, s in shapes.items()):
            tensors[Address("weights", "", name)] = torch.randn(out, into, generator=generator)
            tensors[Address("gradients", "train", name)] = torch.randn(out, into, generator=generator)
            tensors[Address("activations", "val", name)] = torch.randn(rows, out, generator=generator)
        ids = torch.arange(rows)[:, None].repeat(1, 2).numpy()
        run.commit(step, tensors, meta={}, tables={"val": {"input_ids": ids}})


if __name__ == "__main__":
    main()
