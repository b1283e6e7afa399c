"""How fast a training step is, and how much memory it takes, beside the decoders that people use for the same.

    python benchmarks/step_time.py [--shapes tiny,mid,big] [--precisions bf16,float32] [--modes eager,compiled] [--rounds 9]
    python benchmarks/step_time.py --profile tiny          where the time of our own step goes
    python benchmarks/step_time.py --device cuda --shapes decoder-tiny,decoder-small

A step is forward, backward and fused AdamW on one batch that lies in memory, with the loss that each library trains with.
Within a shape and a precision, all sides take turns step by step in one process with one allocator setting, so that a
slower minute of the machine hits everyone; figures are medians. Peak memory is that of a process of its own per side, from
before the model is built to after three eager steps (Linux; compiling would leave its own memory in the figure); on a GPU
it is what torch has allocated there.
The share is that of the floating-point rate of a matrix product (1024 x 1024, on a GPU 8192 x 8192), measured in the same
turns.

Peers: `LlamaForCausalLM` of transformers, and `GPT` of litgpt (`pip install --no-deps litgpt lightning pytorch-lightning
torchmetrics jsonargparse docstring_parser typeshed_client importlib_resources psutil`: with its dependencies it would
replace versions that this project needs). A peer that is not installed is left out, and said to be.
"""

import argparse
import importlib.util
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from picolm.models import Decoder, DecoderConfig
from picolm.train.devices import matmul_peak, tune_allocator


class Shape(NamedTuple):
    width: int
    hidden: int
    vocabulary: int
    rows: int
    length: int
    layers: int = 12
    heads: int = 12
    kv_heads: int = 4


SHAPES = {
    "tiny": Shape(96, 384, 4096, 8, 512),
    "mid": Shape(384, 1536, 4096, 8, 512),
    "big": Shape(96, 384, 50304, 1, 2048),
    # One micro-batch of the shipped configurations, on each of their GPUs.
    "decoder-tiny": Shape(96, 384, 50304, 8, 2048),
    "decoder-small": Shape(384, 1536, 50304, 8, 2048),
}
PRECISIONS = {"bf16": torch.bfloat16, "float32": torch.float32}
LossOf = Callable[[Tensor], Tensor]  # rows of length + 1 tokens -> mean loss


def pico(shape: Shape) -> tuple[nn.Module, LossOf]:
    config = DecoderConfig(
        d_model=shape.width,
        n_layers=shape.layers,
        vocab_size=shape.vocabulary,
        max_seq_len=shape.length,
        attention_n_heads=shape.heads,
        attention_n_kv_heads=shape.kv_heads,
        activation_hidden_dim=shape.hidden,
    )
    model = Decoder(config)
    model.init_parameters(torch.Generator().manual_seed(0))

    def loss_of(tokens: Tensor) -> Tensor:
        loss = model.loss(tokens)
        return loss.nats / loss.tokens

    return model, loss_of


def llama(shape: Shape) -> tuple[nn.Module, LossOf]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.length,
        tie_word_embeddings=False,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).train()
    return model, lambda tokens: model(tokens[:, :-1], labels=tokens, shift_labels=tokens[:, 1:].contiguous()).loss


def litgpt(shape: Shape) -> tuple[nn.Module, LossOf]:
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    config = Config(
        block_size=shape.length,
        padded_vocab_size=shape.vocabulary,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_query_groups=shape.kv_heads,
        n_embd=shape.width,
        intermediate_size=shape.hidden,
        bias=False,
        rotary_percentage=1.0,
        parallel_residual=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
    model = GPT(config)
    model.apply(lambda module: nn.init.normal_(module.weight, std=0.02) if hasattr(module, "in_features") else None)
    return model, lambda tokens: chunked_cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])


SIDES = {"pico": pico, "llama": llama, "litgpt": litgpt}
NEEDS = {"pico": "torch", "llama": "transformers", "litgpt": "litgpt"}


def stepper(side: str, shape: Shape, precision: str, mode: str, device: str) -> Callable[[], float]:
    """A function that takes one training step and returns its loss, which waits for the device."""
    torch.manual_seed(0)
    model, loss_of = SIDES[side](shape)
    with torch.device("meta"):
        expected = sum(parameter.numel() for parameter in pico(shape)[0].parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == expected, f"{side} is another model"
    model.to(device)
    if mode == "compiled":
        loss_of = torch.compile(loss_of)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    tokens = torch.randint(0, shape.vocabulary, (shape.rows, shape.length + 1)).to(device)

    def step() -> float:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak_memory(side: str, shape: str, precision: str, device: str) -> float | None:
    """MiB that the step adds to the memory of its process at the highest point; None where it cannot be read."""
    if not Path("/proc/self/status").exists():
        return None
    threads = str(torch.get_num_threads())
    command = [sys.executable, __file__, "--threads", threads, "--device", device, "--memory", side, shape, precision]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_peak_memory(side: str, shape: str, precision: str, device: str) -> None:
    importlib.import_module(NEEDS[side])
    if device == "cpu":
        # What torch loads on first use.
        stepper(side, Shape(24, 24, 64, 1, 16, layers=1), precision, "eager", device)()
    before = _status("VmRSS")
    step = stepper(side, SHAPES[shape], precision, "eager", device)
    for _ in range(3):
        step()
    print((_status("VmHWM") - before) / 1024 if device == "cpu" else torch.cuda.max_memory_allocated() / 2**20)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def compare(name: str, precision: str, sides: list[str], modes: list[str], rounds: int, device: str) -> None:
    shape = SHAPES[name]
    memory = {side: peak_memory(side, name, precision, device) for side in sides}
    steps = {(side, mode): stepper(side, shape, precision, mode, device) for mode in modes for side in sides}
    losses = {key: (step(), step())[0] for key, step in steps.items()}  # the first compiles, the second settles
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    peaks = []
    for _ in range(rounds):
        peaks.append(matmul_peak.__wrapped__(torch.device(device), PRECISIONS[precision]))  # measured anew
        for key, step in steps.items():
            seconds[key].append(timed(step))
    peak = statistics.median(peaks)
    with torch.device("meta"):
        flops = pico_flops(shape)
    print(
        f"\n**{name}**, {precision}: width {shape.width}, hidden {shape.hidden}, vocabulary {shape.vocabulary}, "
        f"{shape.rows} x {shape.length} tokens; {flops / 1e6:.1f} MFLOP a token, peak {peak / 1e9:.0f} GFLOP/s\n"
    )
    print("| | mode | tokens/s | x fastest peer | share of peak | peak memory, MiB | first loss |")
    print("|---|---|---|---|---|---|---|")
    rate = {key: shape.rows * shape.length / statistics.median(times) for key, times in seconds.items()}
    for (side, mode), speed in rate.items():
        peers = [rate[other, mode] for other in sides if other != "pico"]
        ratio = f"{speed / max(peers):.2f}" if peers else "-"
        held = f"{memory[side]:.0f}" if mode == "eager" and memory[side] is not None else "-"
        share = f"{100 * speed * flops / peak:.0f} %"
        print(f"| {side} | {mode} | {speed:.0f} | {ratio} | {share} | {held} | {losses[side, mode]:.3f} |", flush=True)


def pico_flops(shape: Shape) -> int:
    model, _ = pico(shape)
    assert isinstance(model, Decoder)
    return model.flops_per_token(shape.length)


def profile(name: str, precision: str, device: str, steps: int = 5) -> None:
    """Print the operations that our own eager step spends its time in: that of the device, without waiting for it."""
    step = stepper("pico", SHAPES[name], precision, "eager", device)
    step(), step()
    with torch.profiler.profile() as profiler:
        for _ in range(steps):
            step()
    spent_in = f"self_{'cpu' if device == 'cpu' else 'device'}_time_total"
    rows = sorted(profiler.key_averages(), key=lambda row: -getattr(row, spent_in))
    total = sum(getattr(row, spent_in) for row in rows)
    print(
        f"\n{name}, {precision}: {total / steps / 1e3:.0f} ms a step\n\n| operation | ms | share | calls |\n|---|---|---|---|"
    )
    for row in rows[:12]:
        spent = getattr(row, spent_in)
        print(f"| {row.key} | {spent / steps / 1e3:.1f} | {100 * spent / total:.0f} % | {row.count // steps} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="tiny,mid,big")
    parser.add_argument("--precisions", default="bf16,float32")
    parser.add_argument("--modes", default="eager,compiled")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--profile", metavar="SHAPE", choices=SHAPES)
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    allocator = "kept by mallopt" if tune_allocator() else "as the environment says"
    if options.memory:
        side, name, precision = options.memory
        return print_peak_memory(side, name, precision, options.device)
    if options.profile:
        return profile(options.profile, options.precisions.split(",")[0], options.device)
    sides = [side for side in SIDES if importlib.util.find_spec(NEEDS[side])]
    missing = ", ".join(NEEDS[side] for side in SIDES if side not in sides)
    print(
        f"torch {torch.__version__}, {options.threads} threads, freed memory {allocator}; not installed: {missing or 'none'}"
    )
    for shape in options.shapes.split(","):
        for precision in options.precisions.split(","):
            compare(shape, precision, sides, options.modes.split(","), options.rounds, options.device)


if __name__ == "__main__":
    main()
