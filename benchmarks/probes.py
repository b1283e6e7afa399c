"""What probes cost: of behaviour in plain forward passes, induction beside TransformerLens, the Hessian beside PyHessian, and the
local learning coefficient beside devinterp.

    python benchmarks/probes.py [--width 320] [--layers 6] [--vocabulary 4096] [--length 256] [--rows 128] [--checkpoints 20]
        [--parts forward induction hessian llc] [--threads 2]

Makes a series of Llama with random weights (10M parameters). Every side runs in a process of its own, whose peak memory is told.
The probes that read the given rows take turns with plain forward passes over the same rows at each checkpoint, so that the ratio
holds also where the speed of the machine changes. What asks for rows of its own, or for training rows, is listed and left out of
the ratio. Libraries that are not installed are left out, and the run says so (pip install transformer-lens PyHessian devinterp).
"""

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

BATCH = 8
HESSIAN_ROWS, LLC_ROWS, COPIES = 4, 8, 32
GAMMA, STEP_SIZE, NBETA = 1000.0, 1e-5, 4.0
PARTS = ("forward", "induction", "hessian", "llc")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, number in (("width", 320), ("layers", 6), ("vocabulary", 4096), ("length", 256), ("rows", 128)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--checkpoints", type=int, default=20)
    parser.add_argument("--draws", type=int, default=20, help="Draws of the chain of llc.")
    parser.add_argument("--residual", type=float, default=1e-3, help="Of the largest eigenvalue, as a share of it.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.side:
        report(SIDES[chosen.side](chosen))
        return
    with tempfile.TemporaryDirectory() as name:
        chosen.folder = Path(name)
        make_series(chosen)
        for part in chosen.parts:
            PRINTED[part](chosen)


def make_series(chosen: argparse.Namespace) -> None:
    """Write the checkpoints, rows to ask about, and training rows."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = models.WordLevel({str(number): number for number in range(chosen.vocabulary)}, "0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), bos_token="0", eos_token="0", pad_token="0")
    heads = max(1, chosen.width // 64)
    config = LlamaConfig(hidden_size=chosen.width, num_hidden_layers=chosen.layers, num_attention_heads=heads,
                         num_key_value_heads=heads, intermediate_size=chosen.width * 27 // 10, vocab_size=chosen.vocabulary,
                         max_position_embeddings=chosen.length, tie_word_embeddings=False)  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for step in range(chosen.checkpoints):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape[-1]) * 1e-3)
        model.save_pretrained(chosen.folder / "series" / f"step{step}")
        tokenizer.save_pretrained(chosen.folder / "series" / f"step{step}")  # TransformerLens wants one
    draw = np.random.default_rng(0)
    for name, rows in (("rows", chosen.rows), ("training", 4 * chosen.rows)):
        ids = np.minimum(draw.zipf(1.3, (rows, chosen.length + 1)), chosen.vocabulary) - 1
        np.save(chosen.folder / f"{name}.npy", ids)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{parameters / 1e6:.1f}M parameters, {chosen.rows} rows of {chosen.length}, {chosen.checkpoints} checkpoints"
    )


def run_side(chosen: argparse.Namespace, side: str) -> list[dict[str, Any]]:
    """Return what a side prints in a process of its own."""
    given = [f"--{key}={getattr(chosen, key)}" for key in vars(chosen) if key not in ("parts", "side")]
    environment = os.environ | {"PICO_CACHE": f"{chosen.folder}/cache", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, f"--side={side}", *given]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def report(lines: Iterator[dict[str, Any]]) -> None:
    """Print each line of a side, with the peak memory of the process so far."""
    for line in lines:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(line | {"memory": memory}), flush=True)


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# Probes of behaviour, in plain forward passes


def print_forward(chosen: argparse.Namespace) -> None:
    print("| side | plain forward pass, s | side, s | ratio | peak memory, MiB |\n|---|---|---|---|---|")
    named: dict[str, Any] = {}
    for side in ("plain", "outputs", "everything"):
        lines = run_side(chosen, side)
        named = lines.pop(0)
        plain, own = (statistics.median(line[key] for line in lines) for key in ("plain", "own"))
        ratio = statistics.median(line["own"] / line["plain"] for line in lines)
        print(f"| {side} | {plain:.2f} | {own:.2f} | {ratio:.2f} | {lines[-1]['memory']:.0f} |", flush=True)
    print(f"plain: nothing but the pass again; outputs: {', '.join(named['outputs'])}")
    print(f"everything: these, and with patterns or hidden states: {', '.join(named['inside'])}")
    print("left out: " + "; ".join(f"{name} ({why})" for name, why in named["left_out"].items()))


def forward_side(side: str, chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the names of the probes, then for each checkpoint the seconds of a plain pass over the rows and of the probes."""
    subject, rows, checkpoints = opened(chosen, chosen.rows)
    groups, options = sorted_probes(subject, opened(chosen, 2)[1], chosen.folder)
    yield groups
    names = {"plain": [], "outputs": groups["outputs"], "everything": groups["outputs"] + groups["inside"]}[side]

    def plain() -> None:
        for batch in rows.batches(BATCH):
            subject.forward(rows, batch)

    def own() -> None:
        if not names:
            return plain()
        asked = [running(name, subject, rows, options[name]) for name in names]
        run_together(asked, subject)

    for number, checkpoint in enumerate(checkpoints):
        subject.at(checkpoint).forward(rows, [0])  # the weights are read
        if number == 0:  # what is made once is made, as counts of training rows
            own()
        turns = {"plain": plain, "own": own}
        yield {key: seconds_of(turns[key]) for key in list(turns)[:: 1 if number % 2 == 0 else -1]}


def opened(chosen: argparse.Namespace, count: int) -> tuple[Any, Any, list[Any]]:
    """Return the subject, `count` of the rows, and the checkpoints."""
    from picolm.observe.subject import Subject
    from picolm.observe.training import rows_of_tokens
    from picolm.store import Run

    run = Run.open(chosen.folder / "series")
    tokens = torch.as_tensor(np.load(chosen.folder / "rows.npy"))[:count]
    return Subject(run), rows_of_tokens(tokens), [run[step] for step in run.steps]


def sorted_probes(subject: Any, rows: Any, folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the probes by what they read of a forward pass over the given rows, told by a few of them; and their options."""
    from picolm.probes import PROBES

    groups: dict[str, Any] = {"outputs": [], "inside": [], "left_out": {}}
    options: dict[str, dict[str, Any]] = {}
    for name in PROBES:
        probe = PROBES.get(name)
        own = options[name] = (
            {"training_rows": str(folder / "training.npy")} if "training_rows" in probe.options else {}
        )
        if probe.family != "behaviour":
            continue
        if "rows" not in probe.given or probe.compares:
            groups["left_out"][name] = "compares two models" if probe.compares else "asks about no given rows"
            continue
        begun = running(name, subject, rows, own)
        asks = list(all_asks(begun, subject))
        if begun.failure is not None or any(ask.rows.tokens is not rows.tokens for ask in asks):
            groups["left_out"][name] = str(begun.failure or "asks about rows of its own")
        else:
            groups["inside" if any(ask.needs for ask in asks) else "outputs"].append(name)
    return groups, options


def all_asks(begun: Any, subject: Any) -> Iterator[Any]:
    """Run a probe to its end, and yield all that it asks."""
    begun.go_on()
    while begun.ask is not None:
        yield begun.ask
        begun.go_on(subject.answer([begun.ask], BATCH)[0])


def running(name: str, subject: Any, rows: Any, options: dict[str, Any], stated: Any = None) -> Any:
    from picolm.probes import PROBES
    from picolm.probes.probe import Running

    return Running(PROBES.get(name), {"subject": subject, "other": None, "rows": rows, "stated": stated}, options)


def run_together(asked: list[Any], subject: Any) -> None:
    """Run probes to their ends. Raises their first failure."""
    from picolm.probes.probe import run

    run(asked, subject, BATCH)
    for each in asked:
        if each.failure is not None:
            raise each.failure


# Beside other libraries


def print_compared(part: str, sides: dict[str, str], chosen: argparse.Namespace) -> None:
    """Print what the sides of a part took. sides: the library that each needs, its probe for ours."""
    from picolm.probes import PROBES

    print(f"| {part} | median of a checkpoint, s | peak memory, MiB | |\n|---|---|---|---|")
    for side, needed in sides.items():
        if needed not in PROBES and importlib.util.find_spec(needed) is None:
            print(f"| {side} | {needed} is not installed | | |", flush=True)
            continue
        lines = run_side(chosen, f"{part}: {side}")
        if lines:
            seconds = statistics.median(line["seconds"] for line in lines)
            print(f"| {side} | {seconds:.2f} | {lines[-1]['memory']:.0f} | {lines[-1]['note']} |", flush=True)


def copies(chosen: argparse.Namespace) -> np.ndarray:
    """Return rows [first, r, r]: r of half of the length, of the 128 first tokens where there are so many."""
    draw, size = np.random.default_rng(1), min(chosen.length // 2 - 1, chosen.vocabulary - 1)
    half = np.stack([draw.permutation(max(128, size))[:size] % chosen.vocabulary for _ in range(COPIES)])
    return np.concatenate([np.zeros((COPIES, 1), dtype=np.int64), half, half], 1)


def induction_ours(chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from picolm.observe.training import rows_of_tokens

    subject, _, checkpoints = opened(chosen, 1)
    stated = rows_of_tokens(torch.as_tensor(copies(chosen)))
    for checkpoint in checkpoints:
        subject.at(checkpoint).forward(stated, [0])
        asked = running("induction", subject, None, {}, stated)
        seconds = seconds_of(partial(run_together, [asked], subject))
        best = max(each.value for each in asked.readings if each.name == "prefix_matching")
        yield {"seconds": seconds, "note": f"best prefix matching {best:.4f}"}


def induction_transformer_lens(chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Patterns of all heads by a cache, and their scores and the loss, which are the smallest part."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM

    ids = torch.as_tensor(copies(chosen))
    period = ids.shape[1] // 2
    for place in sorted((chosen.folder / "series").iterdir()):
        model = AutoModelForCausalLM.from_pretrained(place, attn_implementation="eager", dtype=torch.float32).eval()
        bridge = TransformerBridge.boot_transformers(str(place), hf_model=model, device="cpu")

        def score(bridge: Any = bridge) -> float:
            found = []
            for batch in ids.split(BATCH):
                with torch.no_grad():
                    logits, cache = bridge.run_with_cache(
                        batch, names_filter=lambda name: name.endswith("hook_pattern")
                    )
                logits[:, :-1].log_softmax(-1).gather(-1, batch[:, 1:, None])
                patterns = torch.stack([cache[key] for key in cache])
                found.append(patterns.diagonal(1 - period, -2, -1)[..., 2:].mean(-1))
            return float(torch.cat(found, 1).mean(1).max())

        score()
        start = time.perf_counter()
        best = score()
        yield {"seconds": time.perf_counter() - start, "note": f"best prefix matching {best:.4f}"}


def hessian_ours(chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    subject, rows, checkpoints = opened(chosen, HESSIAN_ROWS)
    asked = running("hessian", subject.at(checkpoints[-1]), rows, {"smallest": 0, "tolerance": chosen.residual})
    seconds = seconds_of(partial(run_together, [asked], subject))
    found = {each.name: each.value for each in asked.readings if each.bin in ("", "1")}
    note = f"{found['eigenvalue']:.5g}, residual {found['residual']:.2g}, {found['products']:.0f} products"
    yield {"seconds": seconds, "note": note}


def hessian_pyhessian(chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Power iterations, twice as many each time until the residual is as small as asked; the time is that of the last ones."""
    from pyhessian import hessian
    from transformers import AutoModelForCausalLM

    torch.set_default_dtype(torch.float64)  # PyHessian draws its vectors so
    place = chosen.folder / "series" / f"step{chosen.checkpoints - 1}"
    model = AutoModelForCausalLM.from_pretrained(place, attn_implementation="eager", dtype=torch.float64)
    ids = torch.as_tensor(np.load(chosen.folder / "rows.npy"))[:HESSIAN_ROWS]

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.model(tokens, use_cache=False).logits
            return logits.flatten(0, 1)

    for power in range(3, 10):
        start = time.perf_counter()
        asked = hessian(Logits(), torch.nn.CrossEntropyLoss(), data=(ids[:, :-1], ids[:, 1:].flatten()), cuda=False)
        values, vectors = asked.eigenvalues(maxIter=2**power, tol=0.0)
        seconds = time.perf_counter() - start
        products = torch.autograd.grad(asked.gradsH, asked.params, grad_outputs=vectors[0], retain_graph=True)
        apart = [product - values[0] * vector for product, vector in zip(products, vectors[0])]
        residual = sum(float(each.square().sum()) for each in apart) ** 0.5
        if residual <= chosen.residual * abs(values[0]):
            break
        model.zero_grad()
    yield {"seconds": seconds, "note": f"{values[0]:.5g}, residual {residual:.2g}, {2**power} products"}


def llc_ours(chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    subject, rows, checkpoints = opened(chosen, LLC_ROWS)
    options = {"chains": 1, "draws": chosen.draws, "burn_in": 0, "step_size": STEP_SIZE, "localization": GAMMA}
    options |= {"nbeta": NBETA, "precision": "float32"}
    asked = running("llc", subject.at(checkpoints[-1]), rows, options)
    seconds = seconds_of(partial(run_together, [asked], subject))
    found = next(each.value for each in asked.readings if each.name == "llc")
    yield {"seconds": seconds, "note": f"{chosen.draws} draws, llc {found:.4f}"}


def llc_devinterp(chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    import warnings

    from datasets import Dataset
    from devinterp.slt.llc import llc
    from transformers import AutoModelForCausalLM

    place = chosen.folder / "series" / f"step{chosen.checkpoints - 1}"
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    ids = np.load(chosen.folder / "rows.npy")[:LLC_ROWS]
    data = Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch")
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    found = llc(model, data, {}, lr=STEP_SIZE, n_beta=NBETA, localization=GAMMA, num_chains=1, num_draws=chosen.draws,
                batch_size=LLC_ROWS, num_init_loss_batches=1, device="cpu")  # fmt: skip
    seconds = time.perf_counter() - start
    yield {"seconds": seconds, "note": f"{chosen.draws} draws, llc {float(found.llc_mean):.4f}"}


BESIDE: dict[str, dict[str, tuple[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]]]]] = {
    "induction": {
        "pico": ("induction", induction_ours),
        "TransformerLens": ("transformer_lens", induction_transformer_lens),
    },
    "hessian": {"pico": ("hessian", hessian_ours), "PyHessian": ("pyhessian", hessian_pyhessian)},
    "llc": {"pico": ("llc", llc_ours), "devinterp": ("devinterp", llc_devinterp)},
}
SIDES: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]]] = {
    **{side: partial(forward_side, side) for side in ("plain", "outputs", "everything")},
    **{f"{part}: {side}": work for part, sides in BESIDE.items() for side, (_, work) in sides.items()},
}
PRINTED: dict[str, Callable[[argparse.Namespace], None]] = {
    "forward": print_forward,
    **{
        part: partial(print_compared, part, {side: needed for side, (needed, _) in sides.items()})
        for part, sides in BESIDE.items()
    },
}

if __name__ == "__main__":
    main()
