"""What a figure draws is what the table says."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tests.report.conftest import circuits, norms, row

from picolm.analyze.intervals import aggregate
from picolm.errors import PicoError
from picolm.report import plot
from picolm.report.look import THEMES, label, shades
from picolm.report.plot.panels import suffix
from picolm.report.plot.targets import Target
from picolm.report.section import described

Make = Callable[..., pd.DataFrame]


def lines(figure: Any) -> dict[str, Any]:
    """Traces by the first line of what hovering shows."""
    return {trace.hovertemplate.split("<br>")[0]: trace for trace in figure.data}


def test_each_head_is_drawn_as_in_the_table(toy_table: pd.DataFrame) -> None:
    drawn = lines(plot.metric(toy_table, "cka"))
    for (layer, head), own in toy_table[toy_table["metric"] == "cka"].groupby(["layer", "head"]):
        trace = drawn[f"layer {layer}, head {head}"]
        assert (list(trace.x), list(trace.y)) == (list(own["step"]), list(own["value"]))
        assert list(trace.customdata) == list(own["value"])  # what hovering shows


def test_the_mean_of_heads_is_shown_first(toy_table: pd.DataFrame) -> None:
    visible = [trace for trace in plot.metric(toy_table, "cka").data if trace.visible]
    assert len(visible) == 3
    own = toy_table[(toy_table["metric"] == "cka") & (toy_table["layer"] == 1)]
    assert visible[1].y == pytest.approx(own.groupby("step")["value"].mean().to_numpy(), rel=1e-15)


def test_missing_and_infinite_values_are_gaps_and_counted(toy_table: pd.DataFrame) -> None:
    figure = plot.metric(toy_table, "norm")
    drawn = lines(figure)
    assert np.isnan(drawn["layer 1"].y[1])
    assert drawn["layer 1"].connectgaps is False
    assert "1 of 20 values are missing (the tensor is not there: 1)" in figure.layout.meta["note"]
    assert "1 values are infinite" in figure.layout.meta["note"]
    assert "2 missing or infinite" in described(plot.metric(toy_table[toy_table["layer"] == 1], "norm"))


def test_each_matrix_has_a_panel_and_depth_a_colour(toy_table: pd.DataFrame) -> None:
    figure = plot.metric(toy_table, "norm")
    titles = [note.text for note in figure.layout.annotations]
    assert titles == ["<b>swiglu.w_2 · weights</b>", "<b>output_norm · weights</b>"]
    drawn = lines(figure)
    assert [drawn[f"layer {n}"].line.color for n in (0, 2)] == [shades("light")[0], shades("light")[-1]]
    assert drawn["whole model"].line.color == THEMES["light"]["faint"]


def test_the_partner_of_a_comparison_is_in_the_title(make_table: Make) -> None:
    def rows(partner: Callable[[int], int]) -> Any:
        return [
            row("cosine", step, 1.0, layer=0, against_run="toy", against_step=partner(step), against_layer=0)
            for step in (10, 20, 30)
        ]

    def titles(rows: Any) -> list[str]:
        return [note.text for note in plot.metric(make_table(rows), "cosine").layout.annotations]

    assert titles(rows(lambda step: 30)) == ["<b>swiglu.w_2 · weights · with step 30</b>"]
    assert titles(rows(lambda step: step - 10)) == ["<b>swiglu.w_2 · weights · with the step before</b>"]
    shorter = [entry | {"run": "b", "against_run": "b", "against_step": 20} for entry in rows(lambda step: 20)[:2]]
    assert titles(rows(lambda step: 30) + shorter) == ["<b>swiglu.w_2 · weights · with the last step</b>"]
    both = rows(lambda step: 30) + rows(lambda step: 10)
    assert titles(both) == [f"<b>swiglu.w_2 · weights · with step {step}</b>" for step in (30, 10)]


STEPS = (0, 10, 20, 30)


def compared(target: str, partner: Callable[[int], int], steps: tuple[int, ...] = STEPS, **other: Any) -> list[Any]:
    """Rows of a metric of two tensors as an analysis writes them, each with a value that tells its target."""
    value = {"last": 0.1, "first": 0.2, "previous": 0.3}.get(target, 0.4)
    fixed = {"layer": 0, "against_run": "toy", "against_layer": 0, "target": target}
    return [row("cka", step, value, **(fixed | {"against_step": partner(step)} | other)) for step in steps]


def before(step: int) -> int:
    return max(0, step - 10)


TARGETS = {
    "three fixed steps": [("0", lambda s: 0), ("10", lambda s: 10), ("20", lambda s: 20)],
    "first and previous": [("first", lambda s: 0), ("previous", before)],
    "last and a step that is the last": [("last", lambda s: 30), ("30", lambda s: 30)],
    "all of them": [("first", lambda s: 0), ("last", lambda s: 30), ("previous", before), ("10", lambda s: 10)],
}
WORDS = {"first": "the first step", "last": "the last step", "previous": "the step before"}


@pytest.mark.parametrize("name", TARGETS)
def test_a_panel_for_each_target_that_was_asked_for(name: str, make_table: Make) -> None:
    rows = [each for target, partner in TARGETS[name] for each in compared(target, partner)]
    table = make_table(rows)
    figure = plot.metric(table, "cka")
    wanted = [f"<b>swiglu.w_2 · weights · with {WORDS.get(t, f'step {t}')}</b>" for t, _ in TARGETS[name]]
    assert [note.text.replace("<br>", " · ") for note in figure.layout.annotations] == wanted
    for number, (target, _) in enumerate(TARGETS[name]):
        (line,) = [trace for trace in figure.data if trace.yaxis == f"y{suffix(number)}"]
        assert list(line.y) == [compared(target, lambda s: 0)[0]["value"]] * 4
    with pytest.raises(PicoError, match="nothing in the table compares all steps"):
        plot.steps(table, "cka")


def test_one_step_compared_with_the_first_is_not_compared_with_the_step_before(make_table: Make) -> None:
    for target in ("first", "0", ""):
        titles = plot.metric(make_table(compared(target, lambda s: 0, (30,))), "cka").layout.annotations
        assert titles[0].text in [
            f"<b>swiglu.w_2 · weights · with {words}</b>" for words in ("step 0", "the first step")
        ]


def test_every_step_with_every_step_is_a_matrix_in_new_and_in_old_tables(make_table: Make) -> None:
    for target in ("all", ""):
        rows = [each for other in STEPS for each in compared(target, lambda s, other=other: other)]
        (trace,) = plot.steps(make_table(rows), "cka").data
        assert np.asarray(trace.z).shape == (4, 4)


def test_three_fixed_targets_of_an_old_table_are_no_matrix(make_table: Make) -> None:
    rows = [each for other in STEPS[:3] for each in compared("", lambda s, other=other: other)]
    table = make_table(rows)
    with pytest.raises(PicoError, match="nothing in the table compares all steps"):
        plot.steps(table, "cka")
    titles = [note.text for note in plot.metric(table, "cka").layout.annotations]
    assert titles == [f"<b>swiglu.w_2 · weights · with step {step}</b>" for step in (0, 10, 20)]


def test_layers_compared_at_each_step_and_at_the_last_are_two_maps(make_table: Make) -> None:
    rows = [
        each | {"layer": layer, "module": f"layers.{layer}.swiglu.w_2", "value": value}
        for target, partner, value in (("layer all", lambda s: s, 0.25), ("last layer all", lambda s: 30, 0.75))
        for layer in (0, 1)
        for other in (0, 1)
        for each in compared(target, partner, against_layer=other)
    ]
    figure = plot.layers(make_table(rows), "cka")
    options = next(control for control in figure.layout.meta["controls"] if control["key"] == "matter")["options"]
    assert options == ["toy: swiglu.w_2 · weights", "toy: swiglu.w_2 · weights · with the last step"]
    assert {trace.meta["shown"]["matter"]: np.unique(trace.z).tolist() for trace in figure.data} == {
        0: [0.25],
        1: [0.75],
    }


@pytest.mark.parametrize(
    ("words", "title"),
    [
        ("same", ""), ("", ""), ("300", "with step 300"), ("run wide", "with wide"), ("layer 2", "layer 2"),
        ("last run wide layer 2", "with the last step of wide layer 2"), ("run my run layer all", "with my run"),
        ("first layer all", "with the first step"), ("run layer 1", "with layer 1"), ("run all", "with all"),
    ],
)  # fmt: skip
def test_targets_in_words(words: str, title: str) -> None:
    assert Target.parse(words).words == title


def test_panels_lie_side_by_side(make_table: Make) -> None:
    rows = [row("gini", step, 0.5, layer=0, module=f"layers.0.m{n}") for n in range(5) for step in (0, 1)]
    layout = plot.metric(make_table(rows), "gini").layout
    boxes = [(layout[f"xaxis{n}"].domain, layout[f"yaxis{n}"].domain) for n in ("", 2, 3, 4, 5)]
    assert boxes[0][0][1] < boxes[1][0][0] < boxes[2][0][0]
    assert boxes[3][1][1] < boxes[0][1][0]
    assert boxes[3][0] == boxes[0][0]


def test_heatmaps_of_layers_and_heads(toy_table: pd.DataFrame) -> None:
    figure = plot.heatmap(toy_table, "cka")
    mean, each = figure.data
    assert (mean.visible, each.visible) == (True, False)
    assert np.asarray(each.z).shape == (12, 5)
    own = toy_table[(toy_table["metric"] == "cka") & (toy_table["layer"] == 2) & (toy_table["head"] == 3)]
    assert list(each.z[-1]) == list(own["value"])
    assert each.y[-1] == "layer 2, head 3"
    everything = plot.heatmap(toy_table)
    assert [o.partition(" · ")[0] for o in everything.layout.meta["controls"][0]["options"]] == [
        "norm (norm_type=frobenius)",
        "cka",
    ]


def test_layers_of_two_runs_are_a_matrix_with_a_slider(make_table: Make) -> None:
    rows = [
        row(
            "cka",
            step,
            step + layer + other / 10,
            layer=layer,
            against_run="wide",
            against_step=step,
            against_layer=other,
        )
        for step in (0, 10)
        for layer in range(3)
        for other in range(4)
    ]
    table = make_table(rows)
    figure = plot.layers(table, "cka")
    slider = figure.layout.meta["controls"][-1]
    assert (slider["kind"], slider["options"]) == ("slider", ["0", "10"])
    assert np.asarray(figure.data[1].z).tolist() == [[10 + i + j / 10 for j in range(4)] for i in range(3)]
    assert figure.data[0].zmin == figure.data[1].zmin == 0  # one scale for all steps
    with pytest.raises(PicoError, match="compares all layers"):
        plot.metric(table, "cka")


def test_steps_with_steps_are_a_matrix_of_each_layer(make_table: Make) -> None:
    rows = [
        row("cka", a, float(a * 100 + b), layer=layer, against_run="toy", against_step=b, against_layer=layer)
        for layer in range(2)
        for a in (0, 1, 2)
        for b in (0, 1, 2)
    ]
    figure = plot.steps(make_table(rows), "cka")
    assert np.asarray(figure.data[1].z).tolist() == [[a * 100 + b for b in range(3)] for a in range(3)]
    assert [control["key"] for control in figure.layout.meta["controls"]] == ["layer"]


def test_seeds_are_a_line_with_the_interval_of_the_analysis(make_table: Make) -> None:
    rows = [entry for seed in range(3) for entry in norms(range(0, 30, 10), 1, run=f"s{seed}", seed=seed)]
    table = make_table([entry for entry in rows if entry["layer"] == 0])
    figure = plot.compare(table, "norm", groups=dict.fromkeys(("s0", "s1", "s2"), "three seeds"))
    band, mean = figure.data
    expected = aggregate(table)
    assert list(mean.y) == pytest.approx(list(expected["mean"]), rel=1e-15)
    assert list(band.y) == pytest.approx([*expected["high"], *expected["low"][::-1]], rel=1e-15)
    assert len(plot.compare(table, "norm").data) == 3


def test_models_of_other_parts_and_depths_are_compared(make_table: Make) -> None:
    """The deeper run has a layer of one part that no run has of the other part."""
    deep = [entry | {"component": "other"} for entry in norms(range(0, 30, 10), 3, run="deep")]
    figure = plot.compare(make_table(norms(range(0, 30, 10), 2, run="flat") + deep), "norm")
    shown = [(trace.name, trace.meta["shown"]["layer"]) for trace in figure.data if trace.meta["shown"]]
    assert shown == [*(("flat", place) for place in range(3)), *(("deep", place) for place in range(4))]


def test_the_log_of_a_run_is_drawn_by_source_with_its_spikes() -> None:
    entries = [
        {
            "step": 0,
            "train/loss": 4.0,
            "val/paloma": 50.0,
            "val/paloma/old/nats_per_token": 3.9,
            "loss_spikes": 0,
            "lr": 0.1,
        },
        {"step": 10, "train/loss": 3.0, "loss_spikes": 1, "lr": 0.2, "update_ratio/mlp": 0.01, "skipped": True},
    ]
    log = plot.log_table({"toy": entries})
    figure = plot.loss(log)
    drawn = {(trace.name, trace.meta["shown"]["unit"]): trace for trace in figure.data}
    assert list(drawn["training batches", 0].y) == [4.0, 3.0]
    assert list(drawn["held out: old", 0].y) == [3.9]
    assert list(drawn["held out: all", 1].y) == [50.0]
    assert drawn["held out: all", 1].visible is False
    assert list(drawn["toy: loss spikes", 0].x) == [10]
    assert [note.text for note in plot.training(log).layout.annotations] == [
        "<b>Learning rate</b>",
        "<b>Update ratio</b>",
    ]
    with pytest.raises(PicoError, match="nothing was logged of a loss"):
        plot.loss(log[log["name"] == "lr"])


@pytest.mark.parametrize("seeds", [3, 4])
def test_more_runs_than_colours_have_the_colour_of_their_group(seeds: int) -> None:
    """Seven colours: six runs of two sizes have one each, eight share two."""
    groups = {f"{size}-{seed}": size for seed in range(seeds) for size in ("small", "wide")}
    log = plot.log_table({
        run: [{"step": step, "train/loss": 3.0, "grad_norm": 1.0} for step in (0, 1)] for run in groups
    })  # fmt: skip
    for made in (plot.loss(log, groups=groups), plot.training(log, groups=groups)):
        colours = {trace.hovertemplate.split("<br>")[0].partition(",")[0]: trace.line.color for trace in made.data}
        assert colours.keys() == groups.keys()
        apart = {(groups[run], colour) for run, colour in colours.items()}
        assert len(apart) == len(set(colours.values())) == (6 if seeds == 3 else 2)


def test_what_is_not_there_is_told_by_name(toy_table: pd.DataFrame, make_table: Make) -> None:
    with pytest.raises(PicoError, match=re.escape("no metric 'cca'; did you mean 'cka'? (there are: norm, cka)")):
        plot.metric(toy_table, "cca")
    two = norms(range(2), 1) + [entry | {"options": "norm_type=inf"} for entry in norms(range(2), 1)]
    with pytest.raises(PicoError, match="choose one with options=: 'norm_type=frobenius', 'norm_type=inf'"):
        plot.metric(make_table(two), "norm")
    with pytest.raises(PicoError, match="several runs"):
        plot.compare(toy_table, "cka")


def test_text_of_a_run_is_no_markup_and_no_template() -> None:
    assert label("<b>%{x}\nnext") == "&lt;b&gt;%&#123;x}<br>next"


def test_a_figure_in_words(make_table: Make) -> None:
    words = described(plot.metric(make_table(circuits(range(0, 20, 10), 2, 1)), "cka"))
    assert words.startswith("2 lines over step (updates) in 1 panels (ov_circuit · activations (val) · with step 10)")
    assert re.search(r"4 values from 0\.\d+ to 0\.\d+\.$", words)


def test_values_that_are_all_the_same_are_seen_where_they_are() -> None:
    """Around a constant learning rate of 0.001 the axis went from -1 to 1, so it looked like 0."""
    log = plot.log_table({"a": [{"step": step, "lr": 0.001, "grad_norm": 1.0 + step} for step in range(3)]})
    made = plot.training(log)
    assert [made.layout[axis].rangemode for axis in ("yaxis", "yaxis2")] == ["tozero", "normal"]
