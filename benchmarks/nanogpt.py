"""How fast a training step is beside nanoGPT, in the setting that its README gives for a CPU.

    python benchmarks/nanogpt.py [--nanogpt FOLDER] [--threads 1] [--precisions float32,bf16] [--rounds 40]

4 layers, width 128, 4 heads, context 64, 12 rows, 65 characters. A step is forward, backward, clipping of the gradient at
norm 1 and AdamW, each side with the optimizer that it trains with. `plain GPT` is a GPT of that shape, written here:
LayerNorm, GELU, learned positions, tied embeddings, `scaled_dot_product_attention`, no biases. FOLDER: a copy of nanoGPT,
whose own model is then measured too. Ours has SwiGLU of as many parameters, rotary positions and untied embeddings, half a
percent more parameters in all. Sides take turns; figures are medians of CPU seconds, which other work on the machine
disturbs less, and of seconds.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from step_time import LossOf, Shape
from step_time import pico as decoder
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

from picolm.train.devices import tune_allocator

WIDTH, LAYERS, HEADS, LENGTH, ROWS, CHARACTERS = 128, 4, 4, 64, 12, 65
HIDDEN = 344  # three matrices of SwiGLU as large as two of width 4 x 128


class PlainBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH, bias=False) for _ in range(2))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x_BTH: Tensor) -> Tensor:
        parts = self.qkv(self.norms[0](x_BTH)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTH = x_BTH + self.out(mixed.transpose(1, 2).flatten(2))
        return x_BTH + self.down(gelu(self.up(self.norms[1](x_BTH))))


class PlainGPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(CHARACTERS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(PlainBlock() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH, bias=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTH = self.tokens(tokens_BT) + self.positions.weight[: tokens_BT.shape[1]]
        return self.norm(self.blocks(x_BTH)) @ self.tokens.weight.T


def plain() -> tuple[nn.Module, LossOf, torch.optim.Optimizer]:
    model = PlainGPT()

    def loss_of(tokens: Tensor) -> Tensor:
        return cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    return model, loss_of, torch.optim.AdamW(model.parameters(), lr=1e-3)


def nanogpt() -> tuple[nn.Module, LossOf, torch.optim.Optimizer]:
    """Its own model and optimizer; its folder is on sys.path."""
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    shape = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "block_size": LENGTH, "vocab_size": CHARACTERS}
    model: Any = GPT(GPTConfig(**shape, dropout=0.0, bias=False))
    return (
        model,
        lambda tokens: model(tokens[:, :-1], tokens[:, 1:].contiguous())[1],
        model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu"),
    )


def pico() -> tuple[nn.Module, LossOf, torch.optim.Optimizer]:
    shape = Shape(WIDTH, HIDDEN, CHARACTERS, ROWS, LENGTH, layers=LAYERS, heads=HEADS, kv_heads=HEADS)
    model, loss_of = decoder(shape)
    return model, loss_of, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def stepper(side: Callable[[], tuple[nn.Module, LossOf, torch.optim.Optimizer]], precision: str) -> Callable[[], None]:
    torch.manual_seed(0)
    model, loss_of, optimizer = side()
    tokens = torch.randint(0, CHARACTERS, (ROWS, LENGTH + 1))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def compare(sides: dict[str, Any], precision: str, rounds: int) -> None:
    steps = {name: stepper(side, precision) for name, side in sides.items()}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for number in range(rounds + 5):
        for name, step in steps.items():
            before = time.process_time(), time.perf_counter()
            step()
            if number >= 5:
                taken[name].append((time.process_time() - before[0], time.perf_counter() - before[1]))
    median = {
        name: [statistics.median(each) for each in zip(*times)] for name, times in taken.items()
    }  # CPU seconds, seconds
    print(f"\n{precision}\n\n| | CPU ms a step | ms a step | pico is faster by |\n|---|---|---|---|")
    for name, (cpu, wall) in median.items():
        print(f"| {name} | {1e3 * cpu:.1f} | {1e3 * wall:.1f} | {cpu / median['pico'][0]:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", metavar="FOLDER", help="A copy of nanoGPT.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precisions", default="float32,bf16")
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tune_allocator()
    sides: dict[str, Any] = {"pico": pico, "plain GPT": plain}
    if options.nanogpt:
        sys.path.insert(0, options.nanogpt)
        sides["nanoGPT"] = nanogpt
    for precision in options.precisions.split(","):
        compare(sides, precision, options.rounds)


if __name__ == "__main__":
    main()
