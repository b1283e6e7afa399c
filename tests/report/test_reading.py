"""A report beside a training, of damaged steps, and of what pico evaluate left."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from picolm.cli import main
from picolm.report import plot
from picolm.report.assembly import compose, page
from picolm.report.material import gather
from picolm.report.sections import text as text_section
from picolm.store import Run
from picolm.train.evaluate import source_name


@pytest.fixture
def fox_run(make_run: Callable[..., Run]) -> Run:
    """A run with five steps that have text: a tokenizer, weights and rows."""
    run = make_run()
    step = run[7]
    tensors = {address: step[address] for address in step.select(kind="weights")}
    for number in (1, 2, 3, 4, 5):
        run.commit(
            number, tensors, meta={"step": number}, weight_prefix="", texts={"tokenizer.json": step.read("tokenizer.json")},
            tables={"val": {"input_ids": [[1, 2, 3, 4]] * 2}}, 
            parameters=[address.module for address in tensors if address.module.endswith("norm")],
        )  # fmt: skip
    return run


def exit_code(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def drawn(name: str, material: Any) -> dict[str, list[float]]:
    figure = getattr(plot, name)(material.log)
    return {trace.name: list(trace.y) for trace in figure.data}


@pytest.mark.slow
def test_results_of_evaluations_are_drawn_over_steps(train: Callable[..., Any]) -> None:
    run = train()
    logged = {entry["step"]: entry for entry in run.metrics() if "val/paloma" in entry}
    for step in run.steps:
        run.write_evaluation(
            step,
            {
                "paloma": 60.0 + step, "paloma/nats_per_token": 4.0, "paloma/books": 70.0, "paloma/books/nats_per_token": 4.25,
                "minimal_pairs": 0.5, "minimal_pairs/order": 0.25, "lm_eval/blimp/acc": 0.75, "my_probe": 0.125,
                "my_probe/deep": 0.0625,
            },
        )  # fmt: skip
    material = gather([str(run.path)], [])
    books = [list(trace.y) for trace in plot.loss(material.log).data if trace.name == "held out: books"]
    assert sorted(books) == [[4.25] * 4, [70.0] * 4]  # nats per token, and perplexity
    tasks = drawn("tasks", material)
    assert tasks == {
        "all pairs": [0.5] * 4, "order": [0.25] * 4, "blimp": [0.75] * 4, "my_probe": [0.125] * 4, "deep": [0.0625] * 4,
    }  # fmt: skip
    panels = [note.text for note in plot.tasks(material.log).layout.annotations]
    assert panels == [f"<b>{name}</b>" for name in ("minimal pairs: share right", "acc", "my_probe")]
    at = material.log[material.log["name"] == "val/paloma"].set_index("step")["value"]
    assert at.to_dict() == {step: 60.0 + step for step in run.steps}  # the later word, not that of the log
    assert set(logged) <= set(at.index)


@pytest.mark.slow
def test_damaged_results_of_an_evaluation_are_told(
    train: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = train("monitoring.logging.log_level=ERROR")
    (run.path / "eval_results").mkdir(exist_ok=True)
    (run.path / "eval_results" / "step_4.json").write_text("{")
    material = gather([str(run.path)], [])
    page(material, compose(material))
    assert "The results of an evaluation are left out" in material.problems[0]
    assert "step_4.json" in material.problems[0]


def test_a_step_that_is_deleted_while_it_is_read_is_left_out_and_told(
    fox_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = text_section.rows

    def rows(run: Run, step: int, *rest: Any) -> Any:
        if step == 3:
            fox_run.remove(3)  # as a training with `keep` does
        if step == 4:
            fox_run.thin(4, {"weights"})
        return read(run, step, *rest)

    monkeypatch.setattr(text_section, "rows", rows)
    material = gather([str(fox_run.path)], [])
    html = page(material, compose(material))
    why = "it was deleted or thinned while the report was made"
    assert material.problems == [f"The text of step {step} of fox is left out: {why}" for step in (3, 4)]
    assert 'data-steps="[1, 2, 5]"' in html
    assert f"The text of step 3 of fox is left out: {why}" in html


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["renamed", "no manifest", "half a manifest"])
def test_damaged_and_renamed_steps_are_told(
    damage: str,
    train: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = train("monitoring.logging.log_level=ERROR")
    step = run.step_path(4)
    if damage == "renamed":
        step.rename(run.step_path(5))
    elif damage == "no manifest":
        (step / "manifest.json").unlink()
    else:
        (step / "manifest.json").write_bytes((step / "manifest.json").read_bytes()[:100])
    (tmp_path / "a.yaml").write_text(
        "metrics: [{metric_name: per, components: [{layer_suffixes: o_proj}]}]\n"
        f"monitoring: {{output_dir: {tmp_path}/results}}\n"
    )
    number = 5 if damage == "renamed" else 4
    wanted = {
        "renamed": "holds step 4; the directory was renamed", "no manifest": "manifest.json", "half a manifest": "manifest.json",
    }[damage]  # fmt: skip
    analyze = ["pico", "analyze", str(tmp_path / "a.yaml"), "--run", str(run.path)]
    assert exit_code(analyze, monkeypatch) == 0
    said = capsys.readouterr().err
    assert f"Skipped: step {number} of toy: " in said
    assert wanted in said
    assert "1 things were missing" in said
    assert exit_code([*analyze, "--strict"], monkeypatch) == 1
    assert "1 things that were asked for are missing (--strict)" in capsys.readouterr().err
    assert exit_code(["pico", "report", str(run.path), "--out", str(tmp_path / "r.html")], monkeypatch) == 0
    assert f"Step {number} of toy is left out: " in capsys.readouterr().err
    assert f"Step {number} of toy is left out: " in (tmp_path / "r.html").read_text()


def test_a_run_whose_steps_are_all_damaged_says_why(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train("monitoring.logging.log_level=ERROR")
    for step in run.steps:
        (run.step_path(step) / "manifest.json").unlink()
    (tmp_path / "a.yaml").write_text("metrics: [{metric_name: per}]\n")
    assert exit_code(["pico", "analyze", str(tmp_path / "a.yaml"), "--run", str(run.path)], monkeypatch) == 1
    said = capsys.readouterr().err
    assert "holds no checkpoint that can be read" in said
    assert "step 6: " in said


@pytest.mark.parametrize(
    "label", ["nats_per_token", "bits_per_byte", "books/nats_per_token", "nats_per_token (source)"]
)
def test_a_source_that_is_called_as_a_unit_overwrites_nothing(label: str) -> None:
    names = [label, "books", "nats_per_token"]
    results = [f"paloma/{source_name(name)}{unit}" for name in dict.fromkeys(names) for unit in ("", "/nats_per_token")]
    totals = ["paloma", "paloma/nats_per_token", "paloma/bits_per_byte"]
    assert len({*totals, *results}) == len(totals) + len(results)
    assert source_name("books") == "books"


@pytest.mark.slow
def test_the_total_of_a_source_called_as_a_unit_is_right_in_the_log_and_in_the_report(
    toy_data: Path, train: Callable[..., Any], tmp_path: Path
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    place = tmp_path / "named"
    shutil.copytree(toy_data, place)
    shard = next(place.glob("val-*"))
    table = pq.read_table(shard)
    labels = ["nats_per_token" if number % 2 else "odd" for number in range(len(table))]
    pq.write_table(table.set_column(table.column_names.index("source"), "source", pa.array(labels)), shard)
    keys = (f"data.dataset.name={place}", "evaluation.metrics=[paloma]", "monitoring.logging.log_level=ERROR")
    run = train(*keys)
    entry = next(entry for entry in run.metrics() if "val/paloma" in entry)
    parts = [entry[f"val/paloma/{name}/nats_per_token"] for name in ("nats_per_token (source)", "odd")]
    assert entry["val/paloma/nats_per_token"] == pytest.approx(sum(parts) / 2, rel=1e-6)
    names = {trace.name for trace in plot.loss(gather([str(run.path)], []).log).data}
    assert {"held out: all", "held out: odd", "held out: nats_per_token (source)"} <= names
    assert json.dumps(sorted(run.evaluation(0) or {}))
