"""A bound is called a bound by whatever shows a loss, and no mean is taken over bounds and exact losses."""

from pathlib import Path

import pandas as pd
import pytest

from picolm.errors import PicoError
from picolm.exchange.card import model_card
from picolm.report import plot
from picolm.report.sections.run import card as run_card
from picolm.store import Run
from picolm.store.listing import loss_line, runs_table
from picolm.suite.comparison import compare
from picolm.train.metrics import Progress

BOUNDED = {
    "train/loss": 4.0,
    "train/bound_nats_per_token": 4.0,
    "val/paloma_bound": 60.0,
    "val/paloma_bound/bound_nats_per_token": 4.1,
    "val/paloma_bound/bound_bits_per_byte": 1.5,
    "val/paloma_bound/standard_error": 0.1,
    "val/paloma_bound/draws": 8,
    "val/paloma_bound/old/bound_nats_per_token": 4.2,
}
EXACT = {"train/loss": 3.0, "val/paloma": 22.0, "val/paloma/nats_per_token": 3.1}


def logged(place: Path, entry: dict[str, float]) -> Run:
    run = Run.create(place, {"model": {"model_type": "pico_diffusion"}}, {})
    for step in (0, 5):
        run.append_metrics({"step": step, **entry})
    return run


def test_curves_of_bounds_are_named_and_neither_errors_nor_draws_are_losses() -> None:
    log = plot.log_table({"one": [{"step": 0, **BOUNDED}], "two": [{"step": 0, **EXACT}]})
    drawn = {(trace.name, trace.meta["shown"]["unit"]): list(trace.y) for trace in plot.loss(log).data}
    assert {key: y for key, y in drawn.items() if y} == {
        ("one, bound of training batches", 0): [4.0],
        ("one, bound, held out: all", 0): [4.1],
        ("one, bound, held out: all", 1): [60.0],
        ("one, bound, held out: all", 2): [1.5],
        ("one, bound, held out: old", 0): [4.2],
        ("two, training batches", 0): [3.0],
        ("two, held out: all", 0): [3.1],
        ("two, held out: all", 1): [22.0],
    }
    with pytest.raises(PicoError, match="nothing was logged of tasks"):
        plot.tasks(log)


def test_lines_tables_and_cards_say_bound(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bounded, exact = logged(tmp_path / "bounded", BOUNDED), logged(tmp_path / "exact", EXACT)
    assert loss_line(bounded).startswith("bound  4 ")
    assert loss_line(exact).startswith("loss  3 ")
    cells = list(runs_table([bounded, exact]).columns[-1].cells)
    assert cells == ["4 (bound)", "3"]
    assert "bound of the training loss, nats per token" in run_card("bounded", bounded)
    assert "bound" not in run_card("exact", exact).replace("bounded", "")
    card = model_card(bounded, "lab/run", "main", {}, {})
    assert "Training loss, of which only a bound is known, in nats per token, 4.000 to 4.000" in card
    assert "| step | bound |" in card
    assert "of which only a bound" not in model_card(exact, "lab/run", "main", {}, {})
    progress = Progress(shown=True, tokens_per_step=10)
    speed = {"lr": 0.1, "grad_norm": 1.0, "tokens_per_s": 5.0}
    with caplog.at_level("INFO", "picolm"):
        for entry in (BOUNDED, EXACT):
            progress.line(1, 2, entry | speed)
    assert "step 1/2  bound 4.0000" in caplog.text
    assert "step 1/2  loss 3.0000" in caplog.text


def test_a_suite_compares_bounds_with_bounds() -> None:
    members = pd.DataFrame([
        {"run": "a", "group": "diffusion", "train/bound_nats_per_token": 4.0},
        {"run": "b", "group": "diffusion", "train/bound_nats_per_token": 5.0},
        {"run": "c", "group": "decoder", "train/loss": 3.0, "val/paloma/nats_per_token": 3.5},
    ])  # fmt: skip
    empty = pd.DataFrame(
        columns=["run", "step", "metric", "options", "component", "kind", "split", "value", "target", "layer"]
    )
    compared = compare(members, empty).dropna(subset="mean").set_index(["group", "figure"])["mean"].to_dict()
    assert compared == {
        ("diffusion", "train/bound_nats_per_token"): 4.5,
        ("decoder", "train/loss"): 3.0,
        ("decoder", "val/paloma/nats_per_token"): 3.5,
    }
