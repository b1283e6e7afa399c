"""How fast an analysis is, next to the linear algebra that it cannot do without.

    python benchmarks/analyze.py [--shapes tiny,small] [--rows 1024] [--steps 4]

Makes a run of the published shape with random tensors (12 layers, 12 heads, 4 key-value heads, activations of `--rows` rows,
gradients and weights of v_proj, o_proj and w_2), and analyzes it as pico-analyze's demo does: seven metrics of OV circuits and
MLPs. The minimum is the same calls of LAPACK and BLAS (recorded while the analysis runs, then repeated alone on tensors of the
same shapes); reading files, digests, names and the table are what is on top of it.
"""

import argparse
import contextlib
import io
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from picolm.address import Address
from picolm.analyze.config import AnalysisConfig
from picolm.analyze.engine import Outcome, analyze
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
ALGEBRA = ("svd", "qr", "eigh", "mm", "bmm", "addmm", "mv")


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
    (folder / "analysis.yaml").write_text(f"{CONFIG}monitoring: {{output_dir: {folder}/results}}\n")
    config = load(folder / "analysis.yaml", AnalysisConfig)
    with Recording() as recording:
        anew(config, folder)
    whole, alone = [], []
    for _ in range(3):
        outcome, seconds = anew(config, folder)
        whole.append(seconds)
        alone.append(recording.repeat())
    seconds, minimum = min(whole), min(alone)
    print(
        f"{shape}: {len(outcome.rows)} values from {outcome.read} tensors ({rows} rows, {steps} checkpoints) in {seconds:.2f} s, "
        f"{len(outcome.rows) / seconds:,.0f} values/s; algebra alone {minimum:.2f} s ({len(recording.calls)} calls): "
        f"{seconds / minimum:.2f} x the minimum; {torch.get_num_threads()} threads"
    )


def anew(config: AnalysisConfig, folder: Path) -> tuple[Outcome, float]:
    """An analysis with nothing known from before, and its seconds."""
    (folder / "results" / ".values.sqlite").unlink(missing_ok=True)
    start = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):
        outcome = analyze(config, [str(folder / "run")])
    return outcome, time.perf_counter() - start


class Recording(TorchDispatchMode):
    """Keeps the name and the shapes of every call of LAPACK and BLAS."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if any(part in name.split("_") or part == name for part in ALGEBRA):
            forms = tuple((a.shape, a.stride(), a.dtype) if isinstance(a, torch.Tensor) else a for a in arguments)
            self.calls.append((function, forms, options or {}))
        return function(*arguments, **(options or {}))

    def repeat(self) -> float:
        """Seconds of the same calls, on random tensors of the same shapes and layouts, made beforehand."""
        made: dict[Any, torch.Tensor] = {}

        def tensor(form: Any) -> Any:
            if not (isinstance(form, tuple) and isinstance(form[0], torch.Size)):
                return form
            if form not in made:
                shape, stride, dtype = form
                made[form] = torch.randn(shape, dtype=dtype)
                if _dense(shape, stride):
                    made[form] = made[form].as_strided(shape, stride)
            return made[form]

        ready = [(function, [tensor(form) for form in forms], options) for function, forms, options in self.calls]
        start = time.perf_counter()
        for function, arguments, options in ready:
            function(*arguments, **options)
        return time.perf_counter() - start


def _dense(shape: torch.Size, stride: tuple[int, ...]) -> bool:
    return shape.numel() > 0 and 1 + sum((n - 1) * s for n, s in zip(shape, stride)) <= shape.numel()


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
