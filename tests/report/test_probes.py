"""Readings of probes are drawn as the table has them, with what they are, their chance level and their intervals."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml
from tests.report.conftest import norms, row
from tests.report.test_page import HOSTILE
from tests.report.test_plot import lines

from picolm.analyze import table as tables
from picolm.analyze.command import analyze_runs
from picolm.analyze.intervals import aggregate
from picolm.analyze.probing import MODEL
from picolm.errors import PicoError
from picolm.report import plot
from picolm.report.assembly import compose, page
from picolm.report.material import Analysis, Material
from picolm.report.plot.behaviour import crossings
from picolm.report.plot.readings import natural, probe_of, probes, reading_of
from picolm.report.plot.series import metrics
from picolm.report.section import Drawing, Section, described

REFERENCE = Path(__file__).parents[1] / "probes" / "reference"
Make = Callable[..., pd.DataFrame]


def asked(metric: str, step: int, value: float | None, **other: Any) -> dict[str, Any]:
    """One row of the long table as a probe leaves it."""
    about = {"component": MODEL, "kind": "behaviour", "bin": "", "target": "", "note": "", "rows": "d" * 64}
    about |= {"units": "nats", "definition": f"what {metric} is", "module": MODEL, "split": "val"}
    return row(metric, step, value, **(about | other))


def curve(metric: str, values: dict[int, float], **other: Any) -> list[dict[str, Any]]:
    return [asked(metric, step, value, **other) for step, value in values.items()]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """The table of the probe calibration, asked of all checkpoints of a small series."""
    folder = tmp_path_factory.mktemp("calibrated")
    with np.load(REFERENCE / "probes.npz") as arrays:
        np.save(folder / "val.npy", arrays["val"][:8].astype(np.int64))
    entries = {"observe": {"rows": str(folder / "val.npy")}, "probes": [{"probe_name": "calibration"}]}
    entries |= {"analysis_name": "own", "monitoring": {"output_dir": str(folder)}}
    (folder / "a.yaml").write_text(yaml.safe_dump(entries))
    analyze_runs(folder / "a.yaml", [], [str(REFERENCE / "checkpoints" / "llama_s0")])
    return tables.load(folder / "own")


def sections(table: pd.DataFrame, **material: Any) -> dict[str, Section]:
    return {section.title: section for section in compose(Material([], [Analysis("toy", table)], **material))}


def drawings(section: Section) -> dict[str, Drawing]:
    return {item.title: item for item in section.items if isinstance(item, Drawing)}


def panel_titles(figure: Any) -> list[str]:
    return [note.text.removeprefix("<b>").removesuffix("</b>") for note in figure.layout.annotations]


def test_readings_of_the_model_are_drawn_with_their_intervals(calibrated: pd.DataFrame) -> None:
    figure = plot.probe(calibrated, "calibration")
    whole = calibrated[calibrated["bin"] == ""]
    assert panel_titles(figure) == ["ece", "brier", "accuracy", "confidence", "entropy"]
    for number, (metric, own) in enumerate(whole.groupby("metric", sort=False)):
        traces = [trace for trace in figure.data if trace.yaxis == f"y{number + 1 if number else ''}"]
        line = traces[-1]
        assert (list(line.x), list(line.y)) == (list(own["step"]), list(own["value"])), metric
        if own["standard_error"].notna().any():
            (band,) = traces[:-1]
            half = 1.96 * own["standard_error"].to_numpy()
            edges = [*(own["value"] + half), *(own["value"] - half)[::-1]]
            assert list(band.y) == pytest.approx(edges, rel=1e-12)
        else:
            assert len(traces) == 1


def test_many_bins_are_a_map_and_few_are_lines(calibrated: pd.DataFrame, make_table: Make) -> None:
    (cells,) = plot.bins(calibrated, "calibration.bin_positions").data
    own = calibrated[calibrated["metric"] == "calibration.bin_positions"]
    assert list(cells.y) == [f"{n / 15:.3g}-{(n + 1) / 15:.3g}" for n in range(15)]
    wide = own.pivot(index="bin", columns="step", values="value").loc[list(cells.y)]
    assert np.array_equal(np.asarray(cells.z, dtype=float), wide.to_numpy())
    few = [each for size in (10, 9, 1) for each in curve("a.b", {0: size, 5: size + 0.5}, bin=f"{size} tokens")]
    drawn = plot.bins(make_table(few), "a.b").data
    assert [trace.name for trace in drawn] == ["1 tokens", "9 tokens", "10 tokens"]
    assert [list(trace.y) for trace in drawn] == [[1, 1.5], [9, 9.5], [10, 10.5]]


def test_of_very_many_bins_the_largest_are_shown_and_it_is_told(make_table: Make) -> None:
    rows = [each for n in range(3000) for each in curve("a.loss", {1: float(n), 2: 0.0}, bin=str(n))]
    figure = plot.bins(make_table(rows), "a.loss")
    assert list(figure.data[0].y) == list(map(str, range(64)))
    assert "The first 64 of 3,000 bins are shown; the table has all." in figure.layout.meta["note"]
    rows += [asked("a.count", 1, float(n), bin=str(n), units="tokens") for n in range(3000)]
    figure = plot.bins(make_table(rows), "a.loss")
    assert list(figure.data[0].y) == list(map(str, range(2936, 3000)))
    assert "The 64 largest of 3,000 bins" in figure.layout.meta["note"]


def test_bins_of_one_step_are_points(make_table: Make) -> None:
    rows = [asked("a.age", 7, float(n), bin=str(n)) for n in range(20)]
    (trace,) = plot.bins(make_table(rows), "a.age").data
    assert (list(trace.x), list(trace.y)) == (list(map(str, range(20))), list(range(20)))


def test_heads_by_bin_are_maps_with_a_slider(make_table: Make) -> None:
    rows = [
        asked("c.composition", step, step + head + int(bin[-1]) / 10, layer=1, head=head, bin=bin, module="layers.1")
        for step in (0, 5)
        for head in (0, 1)
        for bin in ("0.0", "0.1")
    ]
    figure = plot.bins(make_table(rows), "c.composition")
    assert [np.asarray(trace.z).tolist() for trace in figure.data] == [[[0, 0.1], [1, 1.1]], [[5, 5.1], [6, 6.1]]]
    assert list(figure.data[0].y) == ["layer 1, head 0", "layer 1, head 1"]
    (slider,) = figure.layout.meta["controls"]
    assert (slider["kind"], slider["options"], slider["value"]) == ("slider", ["0", "5"], 1)


def test_chance_is_a_faint_line_where_it_is_one_number(make_table: Make) -> None:
    known = curve("a.x", {0: 1.0, 5: 0.5}, chance=0.25)
    line = lines(plot.probe(make_table(known), "a"))["chance"]
    assert (list(line.x), list(line.y), line.meta["colour"]) == ([0, 5], [0.25, 0.25], None)
    heads = [asked("a.x", 0, 1.0, layer=0, head=head, chance=chance) for head, chance in ((0, 0.25), (1, 0.5))]
    figure = plot.probe_layers(make_table(heads), "a")
    assert "chance" not in lines(figure)
    assert "by chance 0.25 to 0.5" in figure.layout.meta["terms"][0][1]


def test_layers_are_lines_and_heads_a_map(make_table: Make) -> None:
    rows = [
        asked("a.score", step, layer + head / 10 + step, layer=layer, head=head, module=f"layers.{layer}")
        for step in (0, 5)
        for layer in (0, 1)
        for head in (0, 1)
    ]
    table = make_table(rows + curve("a.loss", {0: 3.0, 5: 2.0}))
    drawn = lines(plot.probe_layers(table, "a"))
    assert list(drawn["layer 1, mean of 2 heads"].y) == [1.05, 6.05]
    assert list(drawn["layer 1, head 1"].y) == [1.1, 6.1]
    each = plot.probe_heatmap(table, "a").data[1]
    assert np.asarray(each.z).tolist() == [[0, 5], [0.1, 5.1], [1, 6], [1.1, 6.1]]
    assert panel_titles(plot.probe(table, "a")) == ["loss"]


def test_seeds_are_their_mean_with_the_interval_of_the_analysis(make_table: Make) -> None:
    values = {"s0": (1.0, 2.0), "s1": (1.5, 2.5), "s2": (3.0, 2.0)}
    rows = [
        each
        for run, (first, last) in values.items()
        for bin in ("", "low", "high")
        for each in curve("a.x" if not bin else "a.y", {0: first, 5: last}, run=run, bin=bin, standard_error=9.0)
    ]
    table, groups = make_table(rows), dict.fromkeys(values, "three seeds")
    band, mean = plot.probe(table, "a", groups=groups).data
    expected = aggregate(table[table["bin"] == ""])
    assert list(mean.y) == pytest.approx(list(expected["mean"]))
    assert list(band.y) == pytest.approx([*expected["high"], *expected["low"][::-1]])
    of_bins = [trace for trace in plot.bins(table, "a.y", groups=groups).data if not trace.meta.get("band")]
    assert [(trace.name, list(trace.y)) for trace in of_bins] == [
        (name, pytest.approx(list(expected["mean"]))) for name in ("high", "low")
    ]
    assert len(plot.probe(table, "a").data) == 6  # without groups a line and its own band for each run


def test_comparing_probes_have_a_panel_for_each_target_or_a_matrix(make_table: Make) -> None:
    rows = [
        asked("agreement.kl", step, float(step), target=target, against_run="toy", against_step=9)
        for step in (0, 5)
        for target in ("last", "9")
    ]
    assert panel_titles(plot.probe(make_table(rows), "agreement")) == ["kl · with the last step", "kl · with step 9"]
    every = [
        asked("agreement.kl", one, float(one - other), target="all", against_run="toy", against_step=other)
        for one in (0, 5)
        for other in (0, 5)
    ]
    table = make_table(every)
    assert np.asarray(plot.steps(table, "agreement.kl").data[0].z).tolist() == [[0, -5], [5, 0]]
    with pytest.raises(PicoError, match="compares all steps with each other"):
        plot.probe(table, "agreement")
    assert list(drawings(sections(table)["Behaviour"])) == ["agreement.kl between steps"]


def test_captions_say_what_the_numbers_are(calibrated: pd.DataFrame) -> None:
    section = sections(calibrated)["Behaviour"]
    drawn = drawings(section)
    assert list(drawn) == [
        "Reliability: calibration", "calibration over steps", "calibration.bin_positions by bin and step",
        "calibration.bin_accuracy by bin and step", "calibration.bin_confidence by bin and step",
    ]  # fmt: skip
    text = page(Material([], []), [section])
    digest = calibrated["rows"].iloc[0]
    assert "<dt>entropy</dt><dd>mean entropy of the predicted distribution; in nats.</dd>" in text
    assert f"<dt>asked on</dt><dd>rows {digest[:12]}.</dd>" in text
    assert (
        "no position has this confidence: "
        in drawn["calibration.bin_accuracy by bin and step"].figure.layout.meta["note"]
    )


def test_what_could_not_be_asked_and_notes_are_told(make_table: Make) -> None:
    rows = [asked("a", 0, None, reason="no rows <here>", definition="", units=""), *curve("a.x", {5: 1.0, 9: 2.0})]
    rows[1]["note"] = "an upper bound"
    section = sections(make_table(rows))["Behaviour"]
    assert "a gives nothing at step 0: no rows &lt;here&gt;" in str(section.items[0])
    (figure,) = [item.figure for item in drawings(section).values()]
    assert "an upper bound (1 of 2 values)." in figure.layout.meta["note"]
    assert "missing" not in figure.layout.meta["note"]


def test_landscape_is_its_own_section(make_table: Make) -> None:
    table = make_table([*curve("a.x", {0: 1.0}), *curve("h.trace", {0: 1.0}, kind="landscape")])
    found = sections(table)
    assert [*found][:2] == ["Behaviour", "Landscape"]
    assert [list(drawings(found[name])) for name in ("Behaviour", "Landscape")] == [["a over steps"], ["h over steps"]]


def test_sections_of_tensors_leave_probes_out(make_table: Make) -> None:
    tensors = norms(range(0, 50, 10), 3)
    alone = sections(make_table(tensors, "alone"))
    many = [each for n in range(500) for each in curve("a.loss", {0: 1.0, 5: 2.0}, bin=str(n))]
    table = make_table(tensors + many)
    both = sections(table)
    assert [*both] == ["Behaviour", *alone]
    for title in ("Metrics over steps", "Heatmaps"):
        one, other = ([item.figure.to_json() for item in drawings(found[title]).values()] for found in (alone, both))
        assert one == other
    assert [name for name, _ in metrics(table)] == ["norm"]
    with pytest.raises(PicoError, match=r"has a value for each bin, whose mean says nothing; plot.bins draws them"):
        plot.metric(table, "a.loss")


def test_old_tables_have_no_probes(make_table: Make, tmp_path: Path) -> None:
    make_table(norms(range(0, 20, 10), 2))
    place = tmp_path / "old.parquet"
    whole = pq.read_table(tmp_path / "toy_analysis" / "results.parquet")
    pq.write_table(
        whole.drop_columns(["bin", "units", "definition", "rows", "standard_error", "target", "note"]), place
    )
    table = tables.load(place)
    assert probes(table) == []
    assert [*sections(table)] == ["Metrics over steps", "Heatmaps", "All values"]


def test_hostile_names_are_text(make_table: Make) -> None:
    rows = [
        asked(
            f"{HOSTILE}.x",
            step,
            1.0,
            **dict.fromkeys(("run", "bin", "units", "definition", "note", "options"), HOSTILE),
        )
        for step in (0, 5)
    ]
    rows += [asked(f"b{HOSTILE}", 0, None, reason=HOSTILE, run=HOSTILE)]
    table = make_table(rows)
    text = page(Material([], []), list(sections(table).values())[:1])
    assert "<img" not in text
    assert text.count("<script>") == 1
    (figure,) = [item.figure for item in drawings(sections(table)["Behaviour"]).values()]
    words = [trace.name + trace.hovertemplate.replace("<br>", "").replace("<b>", "") for trace in figure.data]
    assert not any("<script" in text or "%{x}&" in text or "<img" in text for text in words)


@pytest.mark.parametrize(
    ("metric", "names"),
    [
        ("a.b", ("a", "b")),
        ("a", ("a", "")),
        ("my.file:mine.deep", ("my.file:mine", "deep")),
        ("my.file:mine", ("my.file:mine", "")),
    ],
)
def test_the_probe_of_a_metric(metric: str, names: tuple[str, str]) -> None:
    assert (probe_of(metric), reading_of(metric)) == names


def test_bins_are_sorted_by_their_numbers() -> None:
    names = ["0.5-1", "10", "1e-05", "9", "a", "0-0.5"]
    assert sorted(names, key=natural) == ["0-0.5", "1e-05", "0.5-1", "9", "10", "a"]


STEPS = [0, *(2**n for n in range(10))]


def planted(at: int, seed: int, noise: float = 0.02) -> list[float]:
    """A loss that falls by one nat from one step to the next, with noise."""
    random = np.random.default_rng(seed)
    return [(6.0 if step <= at else 5.0) + noise * random.normal() for step in STEPS]


@pytest.mark.parametrize("errors", [True, False])
@pytest.mark.parametrize("at", [1, 16, 128])
def test_a_planted_drop_is_the_phase_change(at: int, errors: bool) -> None:
    for seed in range(20):
        spread = [0.02] * len(STEPS) if errors else None
        assert plot.phase_change(STEPS, planted(at, seed), spread) == (at, 2 * at)


@pytest.mark.parametrize("errors", [True, False])
def test_noise_and_a_steady_decline_have_no_phase_change(errors: bool) -> None:
    spread = [0.05] * len(STEPS) if errors else None
    noisy = [plot.phase_change(STEPS, planted(10**6, seed, 0.05), spread) for seed in range(200)]
    assert sum(found is not None for found in noisy) <= (10 if errors else 24)
    steady = [6 - 0.3 * math.log(max(1, step)) for step in STEPS]
    assert plot.phase_change(STEPS, steady, [0.001] * len(STEPS)) is None
    assert plot.phase_change([0, 1, 2], [6, 5, 1], [0, 0, 0]) is None  # two steps have one interval
    assert plot.phase_change(STEPS, [math.nan] * len(STEPS)) is None


@pytest.fixture
def induced(make_table: Make) -> pd.DataFrame:
    """A run whose induction loss falls between steps 16 and 32, and whose head 1.0 begins to match prefixes there."""
    loss = dict(zip(STEPS, planted(16, 0)))
    rows = curve("induction.induction_loss", loss, standard_error=0.02, chance=6.24)
    rows += curve("induction.first_copy_loss", dict.fromkeys(STEPS, 6.0), standard_error=0.02)
    for layer in (0, 1):
        for head in (0, 1):
            where: dict[str, Any] = {"layer": layer, "head": head, "module": f"layers.{layer}", "chance": 0.02}
            rows += curve(
                "induction.prefix_matching",
                {s: 0.9 if s > 16 and (layer, head) == (1, 0) else 0.02 for s in STEPS},
                **where,
            )
            rows += curve(
                "induction.previous_token",
                {s: 0.8 if s > 4 and (layer, head) == (0, 1) else 0.1 for s in STEPS},
                **where,
            )
    return make_table(rows)  # fmt: skip


def test_how_induction_comes_about_is_in_one_picture(induced: pd.DataFrame) -> None:
    figure = plot.induction(induced)
    drawn = {trace.name: trace for trace in figure.data if not {"mark", "band"} & trace.meta.keys()}
    own = induced[induced["metric"] == "induction.induction_loss"]
    assert list(drawn["induction_loss"].y) == list(own["value"])
    assert list(drawn["induction_loss"].x) == list(map(str, STEPS))
    assert {"previous_token: layer 0, head 1", "prefix_matching: layer 1, head 0"} <= drawn.keys()
    (cells,) = [trace for trace in figure.data if trace.type == "heatmap"]
    assert list(cells.y) == ["0.0", "0.1", "1.0", "1.1"]
    assert np.asarray(cells.z)[2].tolist() == [0.9 if step > 16 else 0.02 for step in STEPS]
    marks = [trace for trace in figure.data if trace.meta.get("mark")]
    assert [(trace.yaxis, set(trace.x)) for trace in marks] == [(axis, {"16", "32"}) for axis in ("y", "y2", "y3")]
    assert "drops most steeply, against the logarithm of the step, from step 16 to 32." in figure.layout.meta["note"]
    assert described(figure).startswith("Heatmap of 4 rows and 11 columns; ")


def test_without_a_drop_nothing_is_marked(make_table: Make) -> None:
    flat = {step: 6.0 + 0.01 * (number % 2) for number, step in enumerate(STEPS)}
    rows = [
        each
        for name in ("induction_loss", "first_copy_loss")
        for each in curve(f"induction.{name}", flat, standard_error=0.02)
    ]
    figure = plot.induction(make_table(rows))
    assert not any(trace.meta.get("mark") for trace in figure.data)
    assert "no phase change is marked" in figure.layout.meta["note"]


def test_crossing_of_ngrams_is_marked(make_table: Make) -> None:
    rows = curve("ngram.unigram_kl", {0: 1.0, 10: 0.0, 20: 2.0}) + curve("ngram.bigram_kl", {0: 3.0, 10: 2.0, 20: 1.0})
    table = make_table(rows)
    one, other = (table[table["metric"] == f"ngram.{name}gram_kl"] for name in ("uni", "bi"))
    assert crossings(one, other) == [(pytest.approx(50 / 3), pytest.approx(4 / 3))]
    figure = plot.ngrams(table)
    (mark,) = [trace for trace in figure.data if trace.meta.get("mark")]
    assert (list(mark.x), list(mark.y)) == ([pytest.approx(50 / 3)], [pytest.approx(4 / 3)])
    assert "the curves of unigram and bigram cross at about step 17." in figure.layout.meta["note"]


def test_bands_are_thick_where_their_rows_are_seen(make_table: Make) -> None:
    rows = curve("memorization.band_loss", {0: 6.0, 10: 5.0, 20: 4.0}, bin="0")
    rows += curve("memorization.band_loss", {0: 6.0, 10: 5.0, 20: 3.0}, bin="5-14")
    rows += curve("memorization.unseen_loss", {0: 6.0, 10: 5.5, 20: 5.0})
    figure = plot.memorization(make_table(rows))
    first, later = (trace for trace in figure.data if trace.meta.get("mark"))
    assert (list(first.x), list(first.y)) == ([0, 1], [6.0, pytest.approx(5.9)])
    assert (list(later.x), list(later.y)) == ([5, 10, 15], [5.5, 5.0, 4.0])  # a checkpoint of step 15 has seen batch 14
    assert [trace.name for trace in figure.data] == ["batch 0", "seen here", "batches 5-14", "seen here", "not seen"]


def test_canaries_are_marked_where_they_were_shown(make_table: Make) -> None:
    notes = {"0": "early: in batches 4, 8; seen 2 of 2 times before this step", "1": "never seen in this run"}
    rows = [
        each
        for bin, note in notes.items()
        for each in curve("memorization.canary_loss", {0: 6.0, 10: 5.0}, bin=bin, note=note)
    ]
    rows += [
        each
        for bin in notes
        for each in curve("memorization.exposure", {0: 1.0, 10: 8.0}, bin=bin, chance=1.4, units="bits")
    ]
    figure = plot.canaries(make_table(rows))
    (mark,) = [trace for trace in figure.data if trace.meta.get("mark")]
    assert (list(mark.x), list(mark.y)) == ([4, 8], [pytest.approx(5.6), pytest.approx(5.2)])
    assert [trace.name for trace in figure.data if trace.yaxis == "y2"] == ["early", "canary 1", "chance"]


def test_tokens_are_sorted_by_their_age(make_table: Make) -> None:
    ages = {"7": 2.0, "8": 1.0, "9": None}
    rows = [each for token in ages for each in curve("token_curves.surprisal", {0: 9.0, 10: float(token)}, bin=token)]
    rows += [
        asked("token_curves.age_of_acquisition", 10, age, bin=token, reason="" if age else "never")
        for token, age in ages.items()
    ]
    figure = plot.acquisition(make_table(rows), words={"7": "<b>the"})
    (cells,) = figure.data
    assert list(cells.y) == ["token 9", "'&lt;b&gt;the' 7", "token 8"]  # from the bottom to the top
    assert np.asarray(cells.z).tolist() == [[9, 9], [9, 7], [9, 8]]
    many = [each for n in range(200) for each in curve("token_curves.surprisal", {0: 9.0, 10: 1.0}, bin=str(n))]
    figure = plot.acquisition(make_table(many))
    assert len(figure.data[0].y) == 64
    assert "64 of 200 tokens are shown" in figure.layout.meta["note"]


def test_steps_on_a_logarithmic_schedule_are_drawn_so_at_first(make_table: Make) -> None:
    for steps, kind in ((range(0, 60, 10), None), (STEPS, "log")):
        rows = [each for name in ("uni", "bi") for each in curve(f"ngram.{name}gram_kl", dict.fromkeys(steps, 1.0))]
        figure = plot.ngrams(make_table(rows))
        assert (figure.layout.xaxis.type, figure.layout.meta.get("logged")) == (kind, "x" if kind else None)


def test_sharpness_has_its_stability_line(make_table: Make) -> None:
    rows = curve("hessian.largest_eigenvalue", {0: 10.0, 5: 40.0}, kind="landscape")
    rows += [
        each
        for bin in ("1", "2", "-1")
        for each in curve("hessian.eigenvalue", {0: 1.0, 5: 2.0}, bin=bin, kind="landscape")
    ]
    rows += curve("hessian.stability_line", {0: 50.0, 5: 20.0}, kind="landscape")
    table = make_table(rows)
    drawn = lines(plot.sharpness(table))
    assert {name: list(trace.y) for name, trace in drawn.items()} == {
        "largest eigenvalue": [10, 40], "eigenvalue 2": [1, 2], "stability line": [50, 20],
    }  # fmt: skip
    assert "Sharpness" in drawings(sections(table)["Landscape"])


def test_the_loss_between_two_steps_is_a_line_over_alpha(make_table: Make) -> None:
    with_last = {"kind": "landscape", "target": "last", "against_run": "toy", "against_step": 9}
    rows = [
        asked("barrier.interpolated_loss", step, step + alpha, bin=f"{alpha:g}", **with_last)
        for step in (0, 5)
        for alpha in (0.0, 0.5, 1.0)
    ]
    figure = plot.interpolation(make_table(rows))
    assert [(trace.name, list(trace.x), list(trace.y)) for trace in figure.data] == [
        (f"step {step}", [0, 0.5, 1], [step, step + 0.5, step + 1]) for step in (0, 5)
    ]


def test_the_reliability_curve_is_accuracy_over_confidence(calibrated: pd.DataFrame) -> None:
    figure = plot.reliability(calibrated)
    last = calibrated["step"].max()
    own = calibrated[(calibrated["step"] == last) & (calibrated["bin"] != "")]
    wide = own.pivot(index="bin", columns="metric", values="value").dropna().sort_values("calibration.bin_confidence")
    (line,) = [trace for trace in figure.data if trace.name == f"step {last}"]
    assert list(line.x) == list(wide["calibration.bin_confidence"])
    assert list(line.y) == list(wide["calibration.bin_accuracy"])


def test_names_that_are_not_there_are_told(calibrated: pd.DataFrame) -> None:
    with pytest.raises(PicoError, match="no probe 'calibraton'; did you mean 'calibration'"):
        plot.probe(calibrated, "calibraton")
    with pytest.raises(
        PicoError, match=r"no reading 'calibration.bin_acuracy'; did you mean 'calibration.bin_accuracy'"
    ):
        plot.bins(calibrated, "calibration.bin_acuracy")
    with pytest.raises(PicoError, match=r"has no bins; see plot.probe"):
        plot.bins(calibrated, "calibration.ece")
    with pytest.raises(PicoError, match="gives nothing of a layer"):
        plot.probe_layers(calibrated, "calibration")


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_shows_what_the_figures_say(
    induced: pd.DataFrame, make_table: Make, browser_at: Callable[..., Any], tmp_path: Path, width: int
) -> None:
    kl = [each for name in ("uni", "bi") for each in curve(f"ngram.{name}gram_kl", dict.fromkeys(STEPS, 1.0))]
    both = pd.concat([induced, make_table(kl)], ignore_index=True)
    path = tmp_path / "report.html"
    material = Material([], [Analysis("toy", both)])
    path.write_text(page(material, compose(material)))
    browser = browser_at(path, width)
    draw = "const done = arguments[0]; Promise.all([...figures.values()].map((one) => draw(one))).then(() => done())"
    browser.execute_async_script(draw)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.get_log("browser") == []
    find = "[...figures.values()].find((one) => one.node.querySelector('h3').textContent.startsWith(arguments[0]))"
    panel, bar = browser.execute_script(
        f"const one = {find}, bar = one.plot._fullData.find((trace) => trace.type === 'heatmap').colorbar;"
        "return [one.plot._fullLayout.yaxis3.domain, [bar.y - bar.len / 2, bar.y + bar.len / 2]];",
        "Induction",
    )
    assert bar == pytest.approx(panel)  # the colour bar stands beside its panel
    pressed = f"return [...{find}.node.querySelectorAll('button[aria-pressed=true]')].map((node) => node.textContent)"
    assert browser.execute_script(pressed, "N-grams") == ["log steps"]
    press = f"const one = {find}; one.node.querySelector('button[aria-pressed=true]').click();"
    assert browser.execute_script(press + "return one.plot._fullLayout.xaxis.type", "N-grams") == "linear"
