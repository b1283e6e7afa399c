"""The memory that a capture takes does not grow with the micro-batches that it is made of."""

import subprocess
import sys

import pytest

CAPTURED = """
import torch
from torch import nn
from picolm.capture.taps import Taps, capture
from picolm.train.devices import tune_allocator

assert tune_allocator()
model = nn.Sequential(*(nn.Sequential(nn.Linear(96, 96), nn.GELU()) for _ in range(12)))
order = [range(8 * number, 8 * number + 8) for number in range(128)]

def resident():
    return int(open("/proc/self/statm").read().split()[1])

modules = {name: module for name, module in model.named_modules() if name}
with capture(Taps(modules, gradients=False), split="val", step=0, order=order) as captured:
    sizes = []
    for _ in order:
        model(torch.randn(8, 256, 96)).sum().backward()
        sizes.append(resident())
assert len(captured) == 36
print(sizes[8], sizes[-1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read as Linux counts it")
def test_memory_stays_flat_over_micro_batches() -> None:
    done = subprocess.run([sys.executable, "-c", CAPTURED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    early, late = map(int, done.stdout.split())
    assert late < 1.1 * early
