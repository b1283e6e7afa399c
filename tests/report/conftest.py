"""Tables of analyses made up for reports, and a real browser to look at them with."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tests.fox import make_run  # noqa: F401

from picolm.analyze.table import COLUMNS, load, write
from picolm.errors import PicoError
from picolm.report.browser import drive, view

Rows = list[dict[str, Any]]


def row(metric: str, step: int, value: float | None, **other: Any) -> dict[str, Any]:
    """One row of the long table, weights of a plain matrix unless told otherwise."""
    made: dict[str, Any] = dict.fromkeys(COLUMNS)
    made |= {"run": "toy", "split": "", "component": "simple", "kind": "weights", "options": "", "reason": ""}
    made |= {"metric": metric, "step": step, "value": value, "asked_split": "train"} | other
    layer = made["layer"]
    made["module"] = other.get("module", "output_norm" if layer is None else f"layers.{layer}.swiglu.w_2")
    return made


def norms(steps: range, layers: int, run: str = "toy", seed: int = 0) -> Rows:
    random = np.random.default_rng(seed)
    return [
        row("norm", step, float(random.lognormal()), layer=layer, run=run, options="norm_type=frobenius")
        for step in steps
        for layer in [*range(layers), None]
    ]


def circuits(steps: range, layers: int, heads: int, run: str = "toy", seed: int = 1) -> Rows:
    random = np.random.default_rng(seed)
    return [
        row(
            "cka", step, float(random.random()), layer=layer, head=head, run=run, component="ov_circuit",
            kind="activations", split="val", module=f"layers.{layer}.ov_circuit",
            against_run=run, against_step=steps[-1], against_layer=layer,
        )
        for step in steps
        for layer in range(layers)
        for head in range(heads)
    ]  # fmt: skip


@pytest.fixture
def make_table(tmp_path: Path) -> Callable[..., pd.DataFrame]:
    """A function from rows to the table as an analysis would leave it, written and read again."""

    def make(rows: Rows, name: str = "toy_analysis") -> pd.DataFrame:
        write(rows, tmp_path / name)
        return load(tmp_path / name)

    return make


@pytest.fixture
def toy_table(make_table: Callable[..., pd.DataFrame]) -> pd.DataFrame:
    """Two metrics, five steps, three layers, four heads; one value missing, one infinite."""
    rows = norms(range(0, 50, 10), 3) + circuits(range(0, 50, 10), 3, 4)
    rows[5] |= {"value": None, "reason": "the tensor is not there"}
    rows[9] |= {"value": float("inf")}
    return make_table(rows)


@pytest.fixture(scope="session")
def browser_at() -> Iterator[Callable[..., Any]]:
    """A function from a page, a width and a theme to a headless Chromium that shows it. Skips where there is no Chromium."""
    try:
        chromium = drive()
    except PicoError as error:
        pytest.skip(str(error))

    def show(page: Path, width: int = 1280, height: int = 900, theme: str = "light") -> Any:
        chromium.get("about:blank")
        chromium.get_log("browser")
        chromium.get_log("performance")
        view(chromium, width, height, theme)
        chromium.get(page.resolve().as_uri())
        chromium.execute_async_script("ready.then(arguments[0])")
        return chromium

    yield show
    chromium.quit()
