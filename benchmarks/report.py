"""How long a report of many values takes to build, to open, and to answer; how big it is.

    python benchmarks/report.py [--values 10000,50000,100000]    (needs Chromium: make browser)

The table is made up: random values of circuits with 16 heads in each of 24 layers, and of whole matrices, at 100 steps. `open`
is from the address to a page whose figures can be drawn and whose table is there; `draw` is the first figure; `toggle` is from
a click on "each head" (384 lines) to the browser being idle again; `filter` is a word in the table of all values.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from picolm.analyze.table import completed
from picolm.report.assembly import compose, page
from picolm.report.browser import drive, view
from picolm.report.material import Analysis, Material

LAYERS, HEADS, STEPS = 24, 16, 100
WAIT = "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => done()));"


def table(values: int) -> pd.DataFrame:
    """The long table with so many values: as many metrics as it takes, one matrix per head, layer and step each."""
    each = LAYERS * HEADS * STEPS
    number = np.arange(values)
    layer, head, step = number % LAYERS, number // LAYERS % HEADS, number // (LAYERS * HEADS) % STEPS * 100
    frame = pd.DataFrame(
        {"run": "made-up", "step": step, "split": "val", "component": "ov_circuit", "kind": "activations"}
    )
    frame["layer"], frame["head"] = pd.array(layer, dtype="Int64"), pd.array(head, dtype="Int64")
    frame["module"] = "layers." + frame["layer"].astype(str) + ".ov_circuit"
    frame["metric"] = "metric_" + pd.Series(number // each).astype(str)
    frame["options"], frame["value"] = "", np.random.default_rng(0).random(values)
    frame["against_run"], frame["reason"] = None, ""
    frame["against_step"] = frame["against_layer"] = pd.array([pd.NA] * values, dtype="Int64")
    return completed(frame)


def measure(browser: Any, values: int, folder: Path) -> dict[str, float]:
    """Seconds of each phase, and megabytes."""
    material = Material([], [Analysis("made-up", table(values))])
    found: dict[str, float] = {}
    path = folder / f"{values}.html"
    began = time.perf_counter()
    path.write_text(page(material, compose(material)))
    found["build"] = time.perf_counter() - began
    found["MB"] = path.stat().st_size / 1e6
    began = time.perf_counter()
    browser.get(path.as_uri())
    browser.execute_async_script("ready.then(arguments[0])")
    found["open"] = time.perf_counter() - began
    steps = {
        "draw": "return draw([...figures.values()][0]).then(() => 0)",
        "toggle": "[...document.querySelectorAll('button')].find((b) => b.textContent === 'each head').click()",
        "filter": "filter([...sheets.values()][0], 'layer=3 value>0.5')",
        "sort": "order_by([...sheets.values()][0], 'value')",
    }
    for name, script in steps.items():
        began = time.perf_counter()
        browser.execute_script(script)
        browser.execute_async_script(WAIT)
        found[name] = time.perf_counter() - began
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--values", default="10000,50000,100000")
    browser = drive()
    view(browser, 1280, 900)
    try:
        with tempfile.TemporaryDirectory() as folder:
            measure(browser, 1000, Path(folder))  # imports, and a browser that has just started
            for values in map(int, parser.parse_args().values.split(",")):
                found = measure(browser, values, Path(folder))
                print(f"{values:>8,} values", *(f"{name} {value:.2f}" for name, value in found.items()), sep="   ")
    finally:
        browser.quit()


if __name__ == "__main__":
    main()
