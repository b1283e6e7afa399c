"""How fast a training step is, and how much memory it takes, beside the decoders that people use for the same.

    python benchmarks/step_time.py [--shapes tiny,mid,big] [--precisions bf16,float32] [--modes eager,compiled] [--rounds 9]
    python benchmarks/step_time.py --family statespace --shapes tiny,mid,long     beside Mamba2ForCausalLM and our decoder
    python benchmarks/step_time.py --family diffusion --shapes tiny,mid           beside ModernBERT and our decoder
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
replace versions that this project needs). Of a state space model: `Mamba2ForCausalLM` with chunks of several lengths; the
default of 256 is its slowest on a CPU. Of masked diffusion: `ModernBertForMaskedLM` with full attention in each layer, which
computes the logits of hidden tokens alone, as ours does. There our decoder is shown, too, and is no peer. A peer that is not
installed is left out, and said to be.
"""

import argparse
import importlib.util
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from picolm.models import MODELS, Noise
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
    "long": Shape(96, 384, 4096, 2, 2048),
    # One micro-batch of the shipped configurations, on each of their GPUs.
    "decoder-tiny": Shape(96, 384, 50304, 8, 2048),
    "decoder-small": Shape(384, 1536, 50304, 8, 2048),
}
WARM = Shape(24, 24, 64, 1, 16, layers=1)  # a first step, for what torch loads only then
PRECISIONS = {"bf16": torch.bfloat16, "float32": torch.float32}
LossOf = Callable[[Tensor], Tensor]  # rows of length + 1 tokens -> mean loss


# Blocks, state size and head size of the state space model that has as many parameters, by the width.
STATE_SPACE = {24: (1, 8, 8), 96: (24, 48, 16), 384: (26, 128, 64)}


def pico(shape: Shape) -> tuple[nn.Module, LossOf]:
    return built("pico_decoder", shape, **decoder_keys(shape))


def pico_statespace(shape: Shape) -> tuple[nn.Module, LossOf]:
    layers, state, head = STATE_SPACE[shape.width]
    return built("pico_statespace", shape, n_layers=layers, state_size=state, head_dim=head)


def pico_diffusion(shape: Shape) -> tuple[nn.Module, LossOf]:
    """With keys of each head of its own, as ModernBERT."""
    return built("pico_diffusion", shape, **decoder_keys(shape._replace(kv_heads=shape.heads)))


def decoder_keys(shape: Shape) -> dict[str, int]:
    return {
        "n_layers": shape.layers,
        "attention_n_heads": shape.heads,
        "attention_n_kv_heads": shape.kv_heads,
        "activation_hidden_dim": shape.hidden,
    }


def built(name: str, shape: Shape, **keys: int) -> tuple[nn.Module, LossOf]:
    kind = MODELS.get(name)
    config = kind.Config(d_model=shape.width, vocab_size=shape.vocabulary, max_seq_len=shape.length, **keys)
    model = kind(config)
    model.init_parameters(torch.Generator().manual_seed(0))

    noisy = model.likelihood == "bound"  # making generators of random numbers costs time, and breaks a compiled graph

    def loss_of(tokens: Tensor) -> Tensor:
        loss = model.loss(tokens, Noise(range(len(tokens)), tokens.device) if noisy else None)
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


def mamba2(shape: Shape, chunk: int) -> tuple[nn.Module, LossOf]:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    layers, state, head = STATE_SPACE[shape.width]
    config = Mamba2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        num_hidden_layers=layers,
        state_size=state,
        head_dim=head,
        num_heads=2 * shape.width // head,
        n_groups=1,
        chunk_size=chunk,
        tie_word_embeddings=False,
        use_cache=False,
    )
    model = Mamba2ForCausalLM(config).train()
    return model, lambda tokens: model(tokens[:, :-1], labels=tokens, shift_labels=tokens[:, 1:].contiguous()).loss


def modernbert(shape: Shape) -> tuple[nn.Module, LossOf]:
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    config = ModernBertConfig(
        vocab_size=shape.vocabulary + 1,
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.length + 1,
        layer_types=["full_attention"] * shape.layers,
        sparse_prediction=True,
        decoder_bias=False,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        cls_token_id=None,
        sep_token_id=None,
    )
    model = ModernBertForMaskedLM(config).train()

    def loss_of(tokens: Tensor) -> Tensor:
        """Hides of each row as many tokens as ours does on average, half of them."""
        hidden = torch.rand(tokens.shape, device=tokens.device) < 0.5
        labels = tokens.masked_fill(~hidden, -100)
        loss: Tensor = model(tokens.masked_fill(hidden, shape.vocabulary), labels=labels).loss
        return loss

    return model, loss_of


SIDES: dict[str, Callable[[Shape], tuple[nn.Module, LossOf]]] = {
    "pico": pico,
    "llama": llama,
    "litgpt": litgpt,
    "pico_statespace": pico_statespace,
    **{f"mamba2, chunks of {chunk}": partial(mamba2, chunk=chunk) for chunk in (32, 64, 256)},
    "pico_diffusion": pico_diffusion,
    "modernbert": modernbert,
}
FAMILIES = {
    "decoder": ["pico", "llama", "litgpt"],
    "statespace": ["pico_statespace", *(side for side in SIDES if side.startswith("mamba2")), "pico"],
    "diffusion": ["pico_diffusion", "modernbert", "pico"],
}


def needed(side: str) -> str:
    """Return the library of a side."""
    return "torch" if side.startswith("pico") else side if side == "litgpt" else "transformers"


def stepper(side: str, shape: Shape, precision: str, mode: str, device: str) -> Callable[[], float]:
    """A function that takes one training step and returns its loss, which waits for the device."""
    torch.manual_seed(0)
    model, loss_of = SIDES[side](shape)
    with torch.device("meta"):
        expected = sum(parameter.numel() for parameter in SIDES[ours(side)](shape)[0].parameters())
    more = sum(parameter.numel() for parameter in model.parameters()) / expected - 1
    allowed = 0.03 if side == "modernbert" else 1e-9  # it has one more matrix, before its logits
    assert shape == WARM or abs(more) < allowed, f"{side} is another model: {100 * more:+.1f} % parameters"
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


def ours(side: str) -> str:
    """Return the side of Pico that another one is compared with."""
    return side if side.startswith("pico") else next(own[0] for own in FAMILIES.values() if side in own)


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
    importlib.import_module(needed(side))
    if device == "cpu":
        stepper(side, WARM, precision, "eager", device)()
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
        flops = {side: flops_of(ours(side), shape) for side in sides}
    print(
        f"\n**{name}**, {precision}: width {shape.width}, hidden {shape.hidden}, vocabulary {shape.vocabulary}, "
        f"{shape.rows} x {shape.length} tokens; {flops[sides[0]] / 1e6:.1f} MFLOP a token, peak {peak / 1e9:.0f} GFLOP/s\n"
    )
    print("| | mode | tokens/s | x fastest peer | share of peak | peak memory, MiB | first loss |")
    print("|---|---|---|---|---|---|---|")
    rate = {key: shape.rows * shape.length / statistics.median(times) for key, times in seconds.items()}
    for (side, mode), speed in rate.items():
        peers = [rate[other, mode] for other in sides if not other.startswith("pico")]
        ratio = f"{speed / max(peers):.2f}" if peers else "-"
        held = f"{memory[side]:.0f}" if mode == "eager" and memory[side] is not None else "-"
        share = f"{100 * speed * flops[side] / peak:.0f} %"
        print(f"| {side} | {mode} | {speed:.0f} | {ratio} | {share} | {held} | {losses[side, mode]:.3f} |", flush=True)


def flops_of(side: str, shape: Shape) -> int:
    model: Any = SIDES[side](shape)[0]
    return int(model.flops_per_token(shape.length))


def profile(side: str, name: str, precision: str, device: str, steps: int = 5) -> None:
    """Print the operations that our own eager step spends its time in: that of the device, without waiting for it."""
    step = stepper(side, SHAPES[name], precision, "eager", device)
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
    parser.add_argument("--family", choices=FAMILIES, default="decoder")
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
        return profile(FAMILIES[options.family][0], options.profile, options.precisions.split(",")[0], options.device)
    family = FAMILIES[options.family]
    sides = [side for side in family if importlib.util.find_spec(needed(side))]
    missing = ", ".join(dict.fromkeys(needed(side) for side in family if side not in sides))
    print(
        f"torch {torch.__version__}, {options.threads} threads, freed memory {allocator}; not installed: {missing or 'none'}"
    )
    for shape in options.shapes.split(","):
        for precision in options.precisions.split(","):
            compare(shape, precision, sides, options.modes.split(","), options.rounds, options.device)


if __name__ == "__main__":
    main()
