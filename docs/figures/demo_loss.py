"""Draw the loss of the demo, `docs/figures/demo_loss.svg`, from the run that `make demo` left.

python docs/figures/demo_loss.py [runs/demo]    (needs matplotlib)
"""

import math
import sys
from pathlib import Path

import matplotlib

from picolm.data import open_source
from picolm.data.embedded import unigram_entropy
from picolm.store import Run

matplotlib.use("svg")
matplotlib.rcParams |= {
    "svg.hashsalt": "pico",
    "svg.fonttype": "none",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def main() -> None:
    from matplotlib import pyplot

    run = Run.open(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
    config = run.config
    vocabulary, length = config["model"]["vocab_size"], config["model"]["max_seq_len"] + 1
    source = open_source(
        config["data"]["dataset"]["name"], row_length=length, vocab_size=config["data"]["tokenizer"]["vocab_size"]
    )
    levels = {
        f"a uniform guess, ln {vocabulary}": math.log(vocabulary),
        "unigram entropy of the corpus": unigram_entropy(source),
    }
    figure, axes = pyplot.subplots(figsize=(7.2, 3.6), layout="constrained")
    curves = {
        "training batch": ("train/loss", "#0072b2", "-"),
        "held-out text": ("val/paloma/nats_per_token", "#d55e00", "o-"),
    }
    for label, (name, color, style) in curves.items():
        points = [(entry["step"], entry[name]) for entry in run.metrics() if name in entry]
        axes.plot(*zip(*points), style, color=color, label=label, markersize=4)
    for label, level in levels.items():
        axes.axhline(level, color="#777777", linewidth=1, linestyle=":")
        axes.annotate(label, (run.steps[-1], level), ha="right", va="bottom", color="#555555")
    axes.set(xlabel="step", ylabel="loss (nats per token)", ylim=(0, None))
    axes.legend(frameon=False, loc="lower left")
    figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
