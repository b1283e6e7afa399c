"""What names and texts say stays text: a terminal is given no orders, a table of a spreadsheet no formulas, a page no code."""

import csv
import gzip
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.siege.conftest import Attack
from tests.siege.planting import RAW, TEXT

FORMULAS = ["=HYPERLINK(1)", "+1+1", "-1+cmd", "@SUM(1)"]
SCRIPT = "</script><script>planted()</script><img src=x onerror=planted()>"


def told(attack: Attack, folder: Path, *words: str, code: int | None = None) -> str:
    """What a command says; nothing of it may be an order to a terminal."""
    result = attack.sandbox.run(list(words), folder)
    raw = RAW.search(result.output)
    line = result.output[: raw.start()].rpartition("\n")[2] if raw else ""
    assert raw is None, f"{words}: raw {raw[0]!r} after {line[-100:]!r}"
    assert result.fault is None, f"{words}: {result.fault}"
    assert code is None or result.code == code, result.output
    return result.output


@pytest.mark.slow
def test_sources_and_texts_with_escapes_stay_text(attack: Attack) -> None:
    """From the corpus to each place that shows it."""
    folder = attack.copy()
    records = [{"text": f"{TEXT} word {number} " * 20, "source": TEXT + "ab"[number % 2]} for number in range(40)]
    shutil.rmtree(folder / "texts")
    (folder / "texts").mkdir()
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "texts" / f"{TEXT}.jsonl").write_text(lines)
    (folder / "texts" / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pq.write_table(pa.table({"text": [TEXT * 20], "source": [TEXT]}), folder / "texts" / f"{TEXT}.parquet")
    words = ["--out", "odd", "--vocab-size", "300", "--seq-len", "16", "--val-fraction", "0.2"]
    told(attack, folder, "data", "prepare", "texts", *words, code=0)
    told(attack, folder, "data", "inspect", "odd", "--rows", "5", code=0)
    told(attack, folder, "data", "verify", "odd", code=0)
    told(attack, folder, "data", "merge", "odd", "odd", "--out", "twice")
    name = f"n{TEXT}"
    told(attack, folder, "train", "base.yaml", "data.dataset.name=odd", f"checkpointing.run_name={json.dumps(name)}")
    assert (folder / "runs" / name / "run.json").exists()
    run = f"runs/{name}"
    for words in (
        ["list", run], ["verify", run], ["batch", run, "--step", "1", "--loss", "--out", "b.csv"], ["evaluate", run],
        ["generate", run, "--prompt", "word", "--max-new-tokens", "40", "--temperature", "0"],
        ["analyze", "analysis.yaml", "--run", run, "--report", "--csv"], ["report", run, "-o", "p.html"],
        ["replay", run, "--step", "1"], ["export", run, "--out", "o"], ["push", run, "--repo-id", "lab/odd", "--branch", "x"],
        ["fork", run, "--step", "2", "--run-name", f"f{TEXT}", "training.max_steps=3"], ["list", TEXT], ["train", TEXT],
        ["data", "inspect", TEXT], ["report", TEXT], ["pull", TEXT], ["import", TEXT, "--out", "i"], ["suite", TEXT],
        ["train", "base.yaml", f"{TEXT}=1"], ["train", "base.yaml", f"model.model_type={json.dumps(TEXT)}"],
    ):  # fmt: skip
        told(attack, folder, *words)


@pytest.mark.slow
@pytest.mark.parametrize("start", FORMULAS)
def test_a_cell_of_a_table_is_no_formula(start: str, attack: Attack) -> None:
    folder = attack.copy()
    name = f"{start}|run"
    (folder / "runs" / "toy").rename(folder / "runs" / name)
    told(attack, folder, "analyze", "analysis.yaml", "--run", f"runs/{name}", "--csv", code=0)
    records = "".join(json.dumps({"text": "a word and more " * 30, "source": start}) + "\n" for _ in range(20))
    (folder / "odd.jsonl").write_text(records)
    told(
        attack, folder, "data", "prepare", "odd.jsonl", "--out", "odd", "--vocab-size", "300", "--seq-len", "16", code=0
    )
    words = ["data.dataset.name=odd", "checkpointing.run_name=odd", "evaluation.metrics=[]",
             "checkpointing.learning_dynamics.eval_data=null"]  # fmt: skip
    told(attack, folder, "train", "base.yaml", *words, code=0)
    told(attack, folder, "batch", "runs/odd", "--step", "1", "--loss", "--out", "batch.csv", code=0)
    for file in ("results/weights/results.csv", "batch.csv"):
        with (folder / file).open(newline="") as lines:
            cells = [cell for line in csv.reader(lines) for cell in line]
        bad = {cell for cell in cells if cell[:1] in ("=", "+", "-", "@", "\t", "\r") and not _is_number(cell)}
        assert not bad, (file, bad)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


@pytest.mark.slow
def test_a_name_is_no_code_of_the_page(attack: Attack) -> None:
    folder = attack.copy()
    name = SCRIPT.replace("/", "")
    (folder / "runs" / "toy").rename(folder / "runs" / name)
    metrics = folder / "runs" / name / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    metrics.write_text("".join(json.dumps({**line, f"val/paloma/{SCRIPT}": 3.0}) + "\n" for line in lines))
    environment = folder / "runs" / name / "environment.json"
    environment.write_text(json.dumps(json.loads(environment.read_text()) | {"hardware": {"cpu": SCRIPT}}))
    told(attack, folder, "analyze", "analysis.yaml", "--run", f"runs/{name}", "--report", code=0)
    told(attack, folder, "report", f"runs/{name}", "-a", "results/weights", "-o", "page.html", code=0)
    for page in ("page.html", "results/weights/report.html"):
        text = (folder / page).read_text()
        assert "<script>planted()" not in text
        assert "<img src=x" not in text
