"""An analysis as its user meets it: the table is right, nothing is computed twice, what is missing is said."""

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from rich.console import Console

from picolm.address import Address
from picolm.analyze import compute, metrics
from picolm.analyze.command import analyze_runs
from picolm.analyze.table import COLUMNS, load, summary
from picolm.errors import PicoError
from picolm.schema import ConfigError
from picolm.store import Run

Analyze = Callable[..., tuple[Any, pd.DataFrame]]

# As published, with the layers of the tiny model.
PUBLISHED = """
analysis_name: analysis
steps: {start: 0, end: 5, step: 2}
metrics:
  - metric_name: cka
    target_checkpoint: 6
    data_split: val
    components:
      - {component_name: ov_circuit, data_type: activations,
         layer_suffixes: {output_layer: attention.o_proj, value_layer: attention.v_proj}, layers: [0, 1]}
  - metric_name: per
    data_split: train
    components: [{component_name: simple, data_type: gradients, layer_suffixes: swiglu.w_2, layers: [0, 1]}]
  - metric_name: norm
    data_split: val
    norm_type: nuclear
    components:
      - {component_name: ov_circuit, data_type: weights,
         layer_suffixes: {output_layer: attention.o_proj, value_layer: attention.v_proj}, layers: [0, 1]}
"""


@pytest.mark.slow
def test_a_published_configuration_gives_a_table_and_the_known_files(analyze: Analyze, tmp_path: Path) -> None:
    outcome, frame = analyze(PUBLISHED)
    assert tuple(frame.columns) == COLUMNS
    assert sorted(frame["step"].unique()) == [0, 2, 4]  # 5 is not on the grid, 6 is beyond it
    assert len(frame) == 3 * (2 * 4 + 2 + 2 * 4)
    assert not outcome.absent
    folder = tmp_path / "results" / "analysis" / "step_4"
    assert {file.name for file in folder.iterdir()} == {"cka_val.json", "per_train.json", "norm_val.json"}
    cka = json.loads((folder / "cka_val.json").read_text())
    assert set(cka) == {f"layers.{layer}.ov_circuit.activations.heads.{head}" for layer in (0, 1) for head in range(4)}
    per = json.loads((folder / "per_train.json").read_text())
    row = frame[(frame["metric"] == "per") & (frame["step"] == 4) & (frame["layer"] == 1)].iloc[0]
    assert per["layers.1.swiglu.w_2.gradients"] == row["value"]


@pytest.mark.slow
def test_values_are_those_of_the_functions_on_the_stored_tensors(analyze: Analyze, runs: dict[str, Path]) -> None:
    _, frame = analyze(PUBLISHED)
    run = Run.open(runs["narrow"])
    for row in frame[frame["metric"] == "per"].itertuples():
        gradient = run[row.step][Address("gradients", "train", row.module)]
        assert row.value == pytest.approx(metrics.per(gradient), rel=1e-12)
    size = 24 // 4
    for row in frame[frame["metric"] == "norm"].itertuples():
        o, v = (
            run[row.step][Address("weights", "", f"layers.{row.layer}.attention.{n}")].double()
            for n in ("o_proj", "v_proj")
        )
        head, group = row.head, row.head // 2
        dense = o[:, head * size : (head + 1) * size] @ v[group * size : (group + 1) * size]
        assert row.value == pytest.approx(torch.linalg.svdvals(dense).sum().item(), rel=1e-9)
    for row in frame[frame["metric"] == "cka"].itertuples():
        sides = []
        for step in (row.step, 6):
            o = run[step][Address("weights", "", f"layers.{row.layer}.attention.o_proj")].double()
            v = run[step][Address("activations", "val", f"layers.{row.layer}.attention.v_proj")].double().flatten(0, 1)
            part = slice(row.head * size, (row.head + 1) * size)
            group = slice(row.head // 2 * size, (row.head // 2 + 1) * size)
            sides.append(v[:, group] @ o[:, part].T)
        assert row.value == pytest.approx(metrics.cka(*sides), rel=1e-9)


def test_an_analysis_run_twice_computes_nothing_the_second_time(analyze: Analyze) -> None:
    first, table = analyze(PUBLISHED)
    assert first.computed == len(table)
    second, again = analyze(PUBLISHED)
    assert (second.computed, second.read) == (0, 0)
    pd.testing.assert_frame_equal(table, again)


@pytest.mark.slow
def test_more_steps_or_one_more_metric_compute_only_what_is_new(analyze: Analyze) -> None:
    _, before = analyze(PUBLISHED)
    outcome, after = analyze(PUBLISHED.replace("end: 5", "end: 6"))
    assert outcome.computed == len(after) - len(before) == 18
    outcome, _ = analyze(PUBLISHED + "  - {metric_name: gini, components: [{layer_suffixes: w_2}]}\n")
    assert outcome.computed == 3 * 2


def test_an_edited_formula_is_computed_anew(analyze: Analyze, monkeypatch: pytest.MonkeyPatch) -> None:
    analyze(PUBLISHED)
    monkeypatch.setattr(compute, "code_of", lambda function: "edited")
    assert analyze(PUBLISHED)[0].computed > 0


@pytest.mark.slow
def test_each_tensor_is_read_once(analyze: Analyze) -> None:
    outcome, _ = analyze("""
metrics:
  - {metric_name: per, components: [{component_name: ov_circuit}, {layer_suffixes: [o_proj, v_proj]}]}
  - {metric_name: norm, components: [{component_name: ov_circuit}, {layer_suffixes: o_proj}]}
  - {metric_name: norm, norm_type: nuclear, components: [{layer_suffixes: o_proj}]}
""")
    assert outcome.read == 4 * 2 * 2  # steps x layers x (o_proj, v_proj)


def test_two_entries_of_one_metric_stay_two(analyze: Analyze, tmp_path: Path) -> None:
    _, frame = analyze("""
metrics:
  - {metric_name: norm, norm_type: nuclear, components: [{layer_suffixes: w_2}]}
  - {metric_name: norm, norm_type: inf, components: [{layer_suffixes: w_2}]}
""")
    assert frame.groupby("options").size().to_dict() == {"norm_type=nuclear": 8, "norm_type=inf": 8}
    names = {file.name for file in (tmp_path / "results" / "analysis" / "step_0").iterdir()}
    assert names == {"norm_norm_type=nuclear_train.json", "norm_norm_type=inf_train.json"}


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ("all", [0, 2, 4, 6]),
        ("log", [0, 2, 4, 6]),
        ("[2, 6]", [2, 6]),
        ("{every: 4}", [0, 4]),
        ("{start: 2, end: 5, step: 2}", [2, 4]),
    ],
)
def test_steps(analyze: Analyze, steps: str, expected: list[int]) -> None:
    _, frame = analyze(f"steps: {steps}\nmetrics: [{{metric_name: gini, components: [{{layer_suffixes: w_2}}]}}]")
    assert sorted(frame["step"].unique()) == expected


def test_what_is_missing_is_said_and_counted(analyze: Analyze, capsys: pytest.CaptureFixture[str]) -> None:
    text = "steps: [0, 3, 6]\nmetrics: [{metric_name: gini, components: [{layer_suffixes: w_2, layers: [0, 7]}]}]"
    outcome, frame = analyze(text)
    assert len(frame) == 2
    assert outcome.absent == [
        "step 3 of narrow: there is no such checkpoint",
        "step 0 of narrow: no weights of layers.7.w_2",
        "step 6 of narrow: no weights of layers.7.w_2",
    ]
    assert "Skipped: step 3 of narrow: there is no such checkpoint" in capsys.readouterr().err
    with pytest.raises(PicoError, match=r"3 things that were asked for are missing \(--strict\)"):
        analyze(text, strict=True)


def test_a_name_that_matches_nothing_is_an_error_that_lists_what_there_is(analyze: Analyze) -> None:
    with pytest.raises(
        PicoError, match=r"gini of simple .* finds nothing at any step. Step 6 of narrow holds .*gradients/train: .*w_2"
    ):
        analyze("metrics: [{metric_name: gini, components: [{data_type: gradients, layer_suffixes: w_3}]}]")


def test_runs_of_two_widths_are_compared_layer_by_layer(analyze: Analyze) -> None:
    target = "target: {run: wide, layer: all}, components: [{component_name: mlp, data_type: activations}]"
    names = ("cka", "svcca", "pwcca", "procrustes", "rsa")
    entries = "\n".join(f"  - {{metric_name: {name}, {target}}}" for name in names)
    _, frame = analyze(f"metrics:\n{entries}", "narrow", "wide")
    between = frame[(frame["run"] == "narrow") & (frame["against_run"] == "wide")]
    assert len(between) == len(names) * 4 * 2 * 2
    assert (between["step"] == between["against_step"]).all()
    saturated = between["metric"] == "pwcca"  # 48 columns, 36 rows
    assert between.loc[~saturated, "value"].notna().all()
    assert between.loc[saturated, "value"].isna().all()
    assert (
        between.loc[saturated, "reason"].str.contains("has rank 35, which is all that 36 centred rows can have").all()
    )
    within = frame[(frame["run"] == "wide") & (frame["metric"] == "cka") & (frame["step"] == 6)]
    matrix = within.pivot(index="layer", columns="against_layer", values="value").to_numpy(dtype=float)
    assert matrix == pytest.approx(matrix.T)
    assert matrix.diagonal() == pytest.approx(1.0)


def test_activations_of_other_inputs_are_not_compared(analyze: Analyze) -> None:
    text = (
        "metrics: [{metric_name: cka, data_split: train, components: [{component_name: mlp, data_type: activations}]}]"
    )
    with pytest.raises(
        PicoError, match=r"of step 0 of narrow and of step 6 of narrow belong to different inputs.*val split"
    ):
        analyze(text)


def test_every_step_against_every_other_is_computed_once(analyze: Analyze) -> None:
    text = "metrics: [{metric_name: cka, target: {checkpoint: all}, components: [{component_name: mlp, data_type: activations}]}]"
    outcome, frame = analyze(text)
    assert len(frame) == 2 * 4 * 4
    assert outcome.computed == 2 * (4 * 5 // 2)
    assert outcome.read == 2 * 4
    for _, layer in frame.groupby("layer"):
        matrix = layer.pivot(index="step", columns="against_step", values="value").to_numpy(dtype=float)
        assert matrix == pytest.approx(matrix.T)
        assert matrix.diagonal() == pytest.approx(1.0)
    pairs = text.replace("cka", "relative_change").replace("activations", "weights")
    _, frame = analyze(pairs)
    assert len(frame) == 2 * 4 * 4  # not symmetric: each order is a value of its own
    matrix = (
        frame[frame["layer"] == 0].pivot(index="step", columns="against_step", values="value").to_numpy(dtype=float)
    )
    assert matrix[0, 3] != pytest.approx(matrix[3, 0])


def test_the_step_before(analyze: Analyze, runs: dict[str, Path]) -> None:
    _, frame = analyze(
        "metrics: [{metric_name: relative_change, target_checkpoint: previous, components: [{layer_suffixes: w_2, layers: [1]}]}]"
    )
    assert list(zip(frame["step"], frame["against_step"])) == [(2, 0), (4, 2), (6, 4)]
    run, address = Run.open(runs["narrow"]), Address("weights", "", "layers.1.swiglu.w_2")
    new, old = run[4][address].double(), run[2][address].double()
    assert frame["value"][1] == pytest.approx(((new - old).norm() / old.norm()).item(), rel=1e-12)


@pytest.mark.slow
def test_processes_give_the_same_table(analyze: Analyze, tmp_path: Path) -> None:
    _, alone = analyze(PUBLISHED)
    (tmp_path / "results" / ".values.sqlite").unlink()
    outcome, together = analyze(PUBLISHED, workers=2)
    assert outcome.computed == len(alone)
    pd.testing.assert_frame_equal(alone, together)


def test_seeds_are_aggregated(analyze: Analyze, tmp_path: Path) -> None:
    _, frame = analyze(
        "metrics: [{metric_name: gini, components: [{layer_suffixes: w_2}]}]", "narrow", "other", aggregated=True
    )
    aggregated = pd.read_parquet(tmp_path / "results" / "analysis" / "aggregated.parquet")
    assert len(aggregated) == len(frame) / 2
    assert (aggregated["n"] == 2).all()
    row = aggregated.iloc[0]
    values = frame[(frame["step"] == row["step"]) & (frame["module"] == row["module"])]["value"]
    assert row["mean"] == pytest.approx(values.mean())
    assert row["std"] == pytest.approx(values.std())
    assert values.min() - 1e-12 <= row["bootstrap_low"] <= row["mean"] <= row["bootstrap_high"] <= values.max() + 1e-12
    assert row["high"] - row["mean"] == pytest.approx(12.706204736 * values.std() / 2**0.5) == row["mean"] - row["low"]


def test_runs_of_other_configurations_are_not_pooled_with_seeds(
    analyze: Analyze, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "metrics: [{metric_name: gini, components: [{layer_suffixes: w_2}]}]"
    analyze(text, "narrow", "other", "wide", aggregated=True)
    pooled = pd.read_parquet(tmp_path / "results" / "analysis" / "aggregated.parquet")
    assert pooled.groupby("group")["n"].unique().map(list).to_dict() == {"narrow and 1 like it": [2], "wide": [1]}
    assert pooled.loc[pooled["group"] == "wide", "low"].isna().all()
    said = capsys.readouterr().err
    assert "--aggregate: narrow, other are taken together as seeds of one configuration" in said
    assert "--aggregate: wide is by itself: differs from narrow in model.d_model" in said


MLP = "components: [{component_name: mlp, data_type: activations}]"


def test_two_targets_of_one_metric_stay_two(analyze: Analyze, tmp_path: Path) -> None:
    entries = ", ".join(
        f"{{metric_name: cka, target: {target}, {MLP}}}" for target in ("{checkpoint: first}", "{checkpoint: previous}")
    )
    outcome, frame = analyze(f"metrics: [{entries}, {{metric_name: gini, components: [{{layer_suffixes: w_2}}]}}]")
    assert frame.groupby("target").size().to_dict() == {"": 8, "first": 8, "previous": 6}
    first, previous = (frame[(frame["target"] == name) & (frame["step"] == 6)] for name in ("first", "previous"))
    assert (first["against_step"].unique(), previous["against_step"].unique()) == ([0], [4])
    folder = tmp_path / "results" / "analysis" / "step_6"
    assert {file.name for file in folder.iterdir()} == {
        *("cka_target=first_val.json", "cka_target=previous_val.json", "gini_train.json")
    }
    for rows in (first, previous):
        written = json.loads((folder / f"cka_target={rows['target'].iloc[0]}_val.json").read_text())
        assert list(written.values()) == rows["value"].tolist()
    console = Console(width=116, file=io.StringIO())
    console.print(summary(outcome.rows))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert (shown.count("with first"), shown.count("with previous")) == (1, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("{checkpoint: last}", "last"),
        ("{checkpoint: 4}", "4"),
        ("{checkpoint: all}", "all"),
        ("{layer: all}", "layer all"),
        ("{layer: 1, checkpoint: first}", "first layer 1"),
        ("{run: wide}", "run wide"),
        ("{run: wide, checkpoint: last, layer: 0}", "last run wide layer 0"),
        ("{}", "same"),
    ],
)
def test_the_target_that_was_asked_for_is_a_column(analyze: Analyze, target: str, words: str) -> None:
    _, frame = analyze(f"metrics: [{{metric_name: cka, target: {target}, {MLP}}}]", "narrow", "wide")
    assert set(frame["target"]) == {words}


def test_what_the_json_files_cannot_hold_is_counted(analyze: Analyze, capsys: pytest.CaptureFixture[str]) -> None:
    analyze(f"metrics: [{{metric_name: cka, target: {{checkpoint: all}}, {MLP}}}]")
    assert "32 values compare with several layers or steps: they are in the table only" in capsys.readouterr().err


def test_a_table_of_an_earlier_version_is_read_with_the_new_columns(analyze: Analyze, tmp_path: Path) -> None:
    _, frame = analyze(f"metrics: [{{metric_name: gini}}, {{metric_name: cka, {MLP}}}]")
    new = ["metric_kind", "chance", "chance_std", "z", "forced", "target"]
    old = frame.drop(columns=new).replace({"metric": {"gini": "of_somebody"}})
    old.to_parquet(tmp_path / "old.parquet")
    loaded = load(tmp_path / "old.parquet")
    assert tuple(loaded.columns) == COLUMNS
    pd.testing.assert_frame_equal(loaded.drop(columns=new), old)
    assert loaded.groupby("metric")["metric_kind"].unique().map(list).to_dict() == {
        "of_somebody": [""],
        "cka": ["similarity"],
    }
    assert set(loaded["target"]) == {""}
    assert loaded[["chance", "chance_std", "z", "forced"]].isna().all(axis=None)
    assert loaded["forced"].dtype == frame["forced"].dtype == "Int64"


@pytest.mark.slow
def test_a_metric_of_the_users_own_is_not_merged_with_ours_of_that_name(
    analyze: Analyze, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for lab, number in (("lab_one", 1.0), ("lab_two", 2.0)):
        (tmp_path / f"{lab}.py").write_text(f"def gini(x):\n    'Always the same.'\n    return {number}\n")
    monkeypatch.chdir(tmp_path)
    names = ["gini", "lab_one:gini", "lab_two:gini"]
    entries = ", ".join(f"{{metric_name: '{name}', components: [{{layer_suffixes: w_2}}]}}" for name in names)
    for _ in range(2):  # the second time from the values that were kept
        _, frame = analyze(f"metrics: [{entries}]")
        values = frame.groupby("metric", sort=False)["value"].unique()
        assert list(values.index) == names
        assert (list(values["lab_one:gini"]), list(values["lab_two:gini"])) == ([1.0], [2.0])
    files = {file.name for file in (tmp_path / "results" / "analysis" / "step_0").iterdir()}
    assert files == {"gini_train.json", "lab_one.gini_train.json", "lab_two.gini_train.json"}


@pytest.mark.slow
def test_forced_correlations_and_chance_are_columns_and_told_once(
    analyze: Analyze, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = ", ".join(
        f"{{metric_name: {name}, {MLP}, chance: 5}}"
        for name in ("cca", "cka", "procrustes", "cca, target: {layer: all}")
    )
    _, frame = analyze(f"metrics: [{entries}, {{metric_name: cka, {MLP}}}]", "other")
    said = capsys.readouterr().err
    assert said.count("correlations are 1 whatever the data, see the column `forced`") == 1
    given = frame[frame["options"] == "chance=5"]
    assert len(given) == len(frame) - 8
    assert given[["value", "chance", "chance_std"]].notna().all(axis=None)
    assert given["z"].to_numpy() == pytest.approx(((given["value"] - given["chance"]) / given["chance_std"]).to_numpy())
    assert frame.loc[frame["options"] == "", ["chance", "chance_std", "z"]].isna().all(axis=None)
    cca = frame[frame["metric"] == "cca"]
    assert (cca["forced"] > 0).all()
    assert frame.loc[frame["metric"] != "cca", "forced"].isna().all()
    mirror = cca[cca["target"] == "layer all"].set_index(["step", "layer", "against_layer"]).sort_index()
    for step in (0, 2, 4, 6):
        assert mirror.loc[(step, 0, 1), "chance"].item() == mirror.loc[(step, 1, 0), "chance"].item()
    _, again = analyze(f"metrics: [{entries}, {{metric_name: cka, {MLP}}}]", "other")
    pd.testing.assert_frame_equal(frame, again)  # from the values that were kept


def test_a_value_that_is_missing_says_why(analyze: Analyze) -> None:
    _, frame = analyze("metrics: [{metric_name: spectral_alpha, k: 50, components: [{layer_suffixes: w_2}]}]")
    assert frame["value"].isna().all()
    assert frame["reason"].str.contains("24|50").all()


def test_metrics_and_components_of_the_users_own(
    analyze: Analyze, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: dict[str, Path]
) -> None:
    (tmp_path / "my_lab_analysis.py").write_text(
        "from picolm.address import Address\n"
        "def largest(x, *, factor: float = 1.0):\n    'The largest entry.'\n    return factor * x.max().item()\n"
        "def half(checkpoint, *, data_type, **asked):\n"
        "    for address in checkpoint.select(kind=data_type, module='*w_2'):\n"
        "        yield address._replace(module=address.module + '.half'), checkpoint[address] / 2\n"
    )
    monkeypatch.chdir(tmp_path)
    _, frame = analyze(
        "metrics: [{metric_name: 'my_lab_analysis:largest', factor: 2.0,"
        " components: [{component_name: 'my_lab_analysis:half'}]}]"
    )
    weights = Run.open(runs["narrow"])[0][Address("weights", "", "layers.0.swiglu.w_2")]
    assert frame["value"][0] == pytest.approx(weights.max().item())
    assert frame["module"][0] == "layers.0.swiglu.w_2.half"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("metrics: []", "metrics: nothing to measure: name metrics or probes"),
        ("metrics: [{metric_name: ckaa}]", "unknown metric 'ckaa'; did you mean 'cka'?"),
        ("metrics:\n  - metric_name: norm\n    norm_typ: inf",
         "analysis.yaml:3: metrics.0.norm_typ: unknown key; did you mean 'norm_type'?"),
        ("metrics: [{metric_name: norm, norm_type: big}]", "metrics.0.norm_type"),
        ("metrics: [{metric_name: gini, target_checkpoint: 4}]", "gini measures one tensor and compares with nothing"),
        ("metrics: [{metric_name: gini, components: [{component_name: qk_circuit, data_type: activations}]}]",
         "qk_circuit has no activations; it gives weights, gradients"),
        ("metrics: [{metric_name: gini, components: [{component_name: simpel}]}]",
         "unknown component 'simpel'; did you mean 'simple'?"),
        ("metrics: [{metric_name: gini, chance: 20}]", "metrics.0.chance: gini measures one tensor and has no chance level"),
        ("metrics: [{metric_name: cka, chance: 1}]", "metrics.0.chance"),
        ("metrics: [{metric_name: cka, chance: many}]", "metrics.0.chance"),
        ("metrics: [{metric_name: gini}]\nsteps: {begin: 4}", "steps"),
        ("metrics: [{metric_name: cka, target: {checkpoint: first}, target_checkpoint: 4}]", "not both"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_told_at_once(analyze: Analyze, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        analyze(text)
    assert message in str(caught.value)


def test_a_dry_run_reads_nothing_and_tells_the_plan(
    analyze: Analyze, capsys: pytest.CaptureFixture[str], runs: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "dry.yaml").write_text(PUBLISHED)
    assert analyze_runs(tmp_path / "dry.yaml", [], [str(runs["narrow"])], dry_run=True) is None
    said = capsys.readouterr().out
    assert "54 values from" in said
    assert "train_gradients.safetensors" in said
    assert not (tmp_path / "analysis_results").exists()


def test_an_infinite_condition_number_stays_one(analyze: Analyze) -> None:
    _, frame = analyze(
        "metrics: [{metric_name: condition_number, components: [{data_type: gradients, layer_suffixes: embedding_proj}]}]"
    )
    assert all(math.isinf(value) or value >= 1 for value in frame["value"])
