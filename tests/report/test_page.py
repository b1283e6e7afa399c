"""The page holds everything, asks for nothing, and shows text as text."""

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from picolm.cli import main
from picolm.errors import PicoError
from picolm.report import Drawing, Section, Sheet, html
from picolm.report.assembly import columns, compose, page, write
from picolm.report.material import Analysis, Material, gather
from picolm.report.render import render
from picolm.report.sections.text import Token, spread, tokens
from picolm.store import Run

HOSTILE = "</script><script>alert('x')</script><img src=x onerror=alert(1)>%{x}"


def unpack(text: str) -> Any:
    return gzip.decompress(base64.b64decode(text)).decode()


def packets(text: str) -> list[str]:
    return re.findall(r'<script type="application/octet-stream"[^>]*>([^<]*)</script>', text)


def own_page(table: pd.DataFrame) -> str:
    material = Material([], [Analysis("toy", table)])
    return page(material, compose(material))


@pytest.mark.slow
def test_only_the_two_scripts_of_the_page_may_run(toy_table: pd.DataFrame) -> None:
    text = own_page(toy_table)
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1].replace("&#39;", "'")  # type: ignore[index]
    script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(script) == 1
    for code in (script[0], unpack(packets(text)[-1])):
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy.split("style-src")[0]
    assert "http" not in policy


def test_the_page_holds_the_values_of_the_table(toy_table: pd.DataFrame) -> None:
    found = [json.loads(unpack(packet)) for packet in packets(own_page(toy_table))[:-1]]
    sheet = next(data for data in found if "rows" in data)
    values = [float(v) if v is not None else np.nan for v in sheet["columns"]["value"]["values"]]
    assert np.array_equal(values, toy_table["value"], equal_nan=True)
    module = sheet["columns"]["module"]
    assert [module["words"][code] for code in module["codes"]] == list(toy_table["module"])


def test_a_sheet_keeps_what_is_missing_and_leaves_out_what_is_empty() -> None:
    frame = pd.DataFrame({"a": [1.5, None, -np.inf], "b": ["x", None, "x"], "c": [None, None, None]})
    found = columns(Sheet("toy", frame))["columns"]
    assert found == {"a": {"values": [1.5, None, "-Infinity"]}, "b": {"codes": [0, 1, 0], "words": ["x", ""]}}


@pytest.mark.slow
def test_the_same_material_gives_the_same_bytes(toy_table: pd.DataFrame) -> None:
    assert own_page(toy_table) == own_page(toy_table)


def test_hostile_names_are_text(toy_table: pd.DataFrame) -> None:
    for column in ("run", "metric", "options", "module", "reason"):
        toy_table[column] = HOSTILE
    text = own_page(toy_table)
    assert "<img" not in text
    assert text.count("<script>") == 1
    assert "&lt;/script&gt;&lt;script&gt;alert(" in text  # the title
    figures = [json.loads(unpack(packet)) for packet in packets(text)[:-1]]
    drawn = json.dumps([[figure["data"], figure["layout"]["title"]] for figure in figures if "layout" in figure])
    assert "<script>" not in drawn
    assert "%{x}&lt;" not in drawn


def test_hostile_training_text_is_text() -> None:
    row = {"heading": HOSTILE, "tokens": tokens(["a", HOSTILE, "\n"], np.array([1.0, 20.0]), most=4.0)}
    text = render("text.html", steps=[0], blocks=[(0, [row])], most=4.0)
    assert "<img" not in text
    assert "<script" not in text
    assert "&lt;/script&gt;" in text


def test_tokens_carry_their_loss() -> None:
    assert tokens(["a", " b"], np.array([2.0]), most=4.0) == [
        Token("a", None, 0, ""),
        Token(" b", 2.0, 50.0, "' b': 2.0000 nats, position 1"),
    ]
    assert tokens(["a", "b"], np.array([9.0]), most=4.0)[1].heat == 100
    assert spread(range(11), 6) == [0, 2, 4, 6, 8, 10]
    assert spread([3, 4], 6) == [3, 4]


@pytest.mark.slow
def test_a_section_of_ones_own(toy_table: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_lab.py").write_text(
        "from picolm.report import Section, html\n"
        "def notes(material):\n    return Section('My notes', [html('<p>{} & co</p>', '<b>bold</b>')])\n"
    )
    monkeypatch.chdir(tmp_path)
    text = write([], ["toy_analysis"], "out/report.html", own=["my_lab:notes"]).read_text()
    assert "<p>&lt;b&gt;bold&lt;/b&gt; & co</p>" in text
    assert text.index("My notes") < text.index("All values")
    assert "--section my_lab:notes" in text
    with pytest.raises(PicoError, match="report section 'my_lab:none' cannot be imported"):
        write([], ["toy_analysis"], own=["my_lab:none"])


def test_runs_that_differ_in_their_seeds_are_one_group() -> None:
    def run(name: str, seed: int, width: int) -> Any:
        config = {
            "model": {"d_model": width},
            "training": {"seeds": {"init": seed}},
            "checkpointing": {"run_name": name},
        }
        return SimpleNamespace(name=name, config=config)

    runs = [run("a", 1, 96), run("b", 2, 96), run("c", 1, 384)]
    material = Material(runs, [], ["runs/a", "runs/b", "runs/c"])
    assert material.groups == {"a": "a and 1 like it", "b": "a and 1 like it", "c": "c"}
    twins = Material([run("a", 1, 96), run("a", 2, 96)], [], ["here/a", "there/a"])
    assert list(twins.named) == ["here/a", "there/a"]


def test_a_section_may_hold_any_plotly_figure(toy_table: pd.DataFrame) -> None:
    drawing = Drawing(go.Figure(go.Bar(y=[1, 2]), layout={"title": {"text": "Bars & more"}}))
    assert (drawing.title, drawing.name) == ("Bars & more", "bars-more")
    assert "Bars &amp; more" in page(Material([], [Analysis("toy", toy_table)]), [Section("Mine", [drawing])])
    with pytest.raises(PicoError, match="a section holds a str"):
        page(Material([], []), [Section("Mine", ["<b>raw</b>"])])  # type: ignore[list-item]
    assert html("<i>{}</i>", "<") == "<i>&lt;</i>"


@pytest.mark.slow
def test_a_run_is_told_by_its_differences_and_its_digests(train: Callable[..., Run]) -> None:
    run = train("training.max_steps=2")
    text = page(gather([str(run.path)], []), compose(gather([str(run.path)], [])))
    assert re.search(r"Differs from the default configuration in \d+ keys", text)
    assert re.search(r"<code>model.<wbr>d_model</code></th><td>24</td><td class=\"faint\">768</td>", text)
    assert run[2].manifest.digest in text  # type: ignore[attr-defined]
    assert "Whole configuration" in text
    assert "pico report " in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "a report of what? pico report RUN…"),
        (["nowhere"], "nowhere: no run here (there is no such directory)"),
        (["--analysis", "nowhere"], "nowhere: no table here; expected results.parquet"),
    ],
)
def test_mistakes_are_told_without_a_traceback(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["pico", "report", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert message in capsys.readouterr().err
