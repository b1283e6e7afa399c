"""Accuracies are drawn as accuracies, and not among the losses."""

import pytest

from picolm.errors import PicoError
from picolm.report import plot

ENTRIES = [
    {
        "step": step,
        "val/paloma": 9.0 - step,
        "val/minimal_pairs": 0.5 + step / 100,
        "val/minimal_pairs/order": 0.6,
        "val/lm_eval/blimp/acc": 0.25,
        "val/lm_eval/texts/bits_per_byte": 2.0,
        "val/lm_eval/texts/acc": 0.75,
    }
    for step in (0, 5)
]


def test_each_metric_of_each_task_is_a_line_of_its_panel() -> None:
    figure = plot.tasks(plot.log_table({"a": ENTRIES}))
    titles = [note.text.removeprefix("<b>").removesuffix("</b>") for note in figure.layout.annotations]
    assert titles == ["minimal pairs: share right", "acc", "bits_per_byte"]
    drawn = {(trace.name, trace.yaxis): list(trace.y) for trace in figure.data}
    assert drawn == {
        ("all pairs", "y"): [0.5, 0.55],
        ("order", "y"): [0.6, 0.6],
        ("blimp", "y2"): [0.25, 0.25],
        ("texts", "y2"): [0.75, 0.75],
        ("texts", "y3"): [2.0, 2.0],
    }
    assert len(plot.tasks(plot.log_table({"a": ENTRIES, "b": ENTRIES})).data) == 10


def test_losses_hold_no_accuracies() -> None:
    assert [trace.name for trace in plot.loss(plot.log_table({"a": ENTRIES})).data] == ["held out: all"]
    with pytest.raises(PicoError, match="nothing was logged of tasks"):
        plot.tasks(plot.log_table({"a": [{"step": 0, "val/paloma": 3.0}]}))
