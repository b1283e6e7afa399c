"""The report in a real browser: it opens from the disk, asks for nothing, and shows what the table says."""

import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tests.report.conftest import circuits, norms
from tests.report.test_page import HOSTILE

from picolm import csvfile
from picolm.analyze.table import load, seal
from picolm.errors import PicoError
from picolm.report.assembly import compose, page, write
from picolm.report.material import Analysis, Material, gather
from picolm.report.render import render
from picolm.report.section import Section
from picolm.report.sections.text import tokens

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
Browser = Callable[..., Any]

# What is drawn: for each visible trace what hovering says, its panel, and the coordinates that plotly draws from.
DRAWN = """
const plot = figures.get(arguments[0]).plot;
return plot._fullData.filter((trace) => trace.visible === true).map((trace) => ({
  about: trace.hovertemplate.split("<br>")[0],
  panel: (plot.layout.annotations || []).find((note) => note.xref === trace.xaxis + " domain")?.text,
  x: plot.calcdata.find((points) => points[0].trace.uid === trace.uid).map((point) => point.x),
  y: plot.calcdata.find((points) => points[0].trace.uid === trace.uid).map((point) => point.y ?? null),
}));
"""
TITLES = "return [...document.querySelectorAll('.drawing h3')].map((node) => node.textContent)"


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which `make demo` was run, with a shorter training."""
    folder = tmp_path_factory.mktemp("demo")
    pico = [sys.executable, "-m", "picolm"]
    short = ["training.max_steps=8", "checkpointing.save_schedule=log", "monitoring.logging.log_every_n_steps=2"]
    for words in (
        ["train", ROOT / "configs/demo.yaml", *short, "evaluation.every_n_steps=4", "evaluation.paloma.max_rows=32"],
        ["analyze", ROOT / "configs/analyses/demo.yaml", "--run", "runs/demo", "--report"],
    ):
        subprocess.run([*pico, *map(str, words)], cwd=folder, check=True, capture_output=True, timeout=280)
    return folder


@pytest.fixture
def artefacts(tmp_path: Path) -> Path:
    place = Path(os.environ.get("PICO_ARTEFACTS", tmp_path))
    place.mkdir(parents=True, exist_ok=True)
    return place


def show(browser: Any, title: str) -> str:
    """Scroll to the figure with a title, wait until it is drawn, and return its id."""
    name = browser.execute_script(
        "const nodes = [...document.querySelectorAll('.drawing')];"
        "const found = nodes.find((node) => node.querySelector('h3').textContent === arguments[0]);"
        "found.scrollIntoView({block: 'start', behavior: 'instant'}); return found.id;",
        title,
    )
    for _ in range(100):
        if browser.execute_script(f"return figures.get('{name}').drawn && !!figures.get('{name}').plot._fullData"):
            return str(name)
        time.sleep(0.05)
    raise AssertionError(f"{title} was not drawn")


def press(browser: Any, name: str, text: str) -> None:
    from selenium.webdriver.common.by import By

    buttons = browser.find_elements(By.CSS_SELECTOR, f"#{name} button")
    next(button for button in buttons if button.text == text).click()


def requests(browser: Any) -> list[str]:
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url for url in sent if not url.startswith(("data:", "blob:", "about:"))]


@pytest.mark.parametrize(("width", "theme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_the_demo_opens_from_the_disk_without_a_request_or_a_complaint(
    demo: Path, browser_at: Browser, artefacts: Path, width: int, theme: str
) -> None:
    path = demo / "analysis_results/demo/report.html"
    browser = browser_at(path, width, 900 if width > 500 else 844, theme)
    browser.save_screenshot(str(artefacts / f"report-{width}-{theme}-top.png"))
    for title in browser.execute_script(TITLES):
        show(browser, title)
    height = browser.execute_script("return document.documentElement.scrollHeight")
    size = {"width": width, "height": min(height, 16000), "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.save_screenshot(str(artefacts / f"report-{width}-{theme}.png"))
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == (
        "rgb(244, 246, 249)" if theme == "light" else "rgb(15, 19, 27)"
    )
    assert requests(browser) == [path.resolve().as_uri()]
    assert browser.get_log("browser") == []
    headings = browser.execute_script("return [...document.querySelectorAll('h2')].map((node) => node.textContent)")
    assert headings == ["The run", "Training", "Metrics over steps", "Heatmaps", "Text", "All values"]


def test_the_policy_refuses_what_is_not_the_page(demo: Path, browser_at: Browser) -> None:
    browser = browser_at(demo / "analysis_results/demo/report.html")
    refused = browser.execute_async_script(
        "const done = arguments[0]; fetch('https://example.org').then(() => done('fetched'), () => {"
        " const script = document.createElement('script'); script.textContent = 'window.ran = true';"
        " document.body.append(script); done(window.ran === undefined ? 'refused' : 'ran'); });"
    )
    assert refused == "refused"


def test_what_is_drawn_is_the_table(demo: Path, browser_at: Browser) -> None:
    table = load(demo / "analysis_results/demo")
    browser = browser_at(demo / "analysis_results/demo/report.html")
    name = show(browser, "cka over steps")
    press(browser, name, "each head")
    own = table[table["metric"] == "cka"]
    drawn = {entry["about"]: entry for entry in browser.execute_script(DRAWN, name)}
    assert len(drawn) == own.groupby(["layer", "head"]).ngroups == 72
    for (layer, head), values in own.groupby(["layer", "head"]):
        entry = drawn[f"layer {layer}, head {head}"]
        assert (entry["x"], entry["y"]) == (list(values["step"]), list(values["value"]))

    name = show(browser, "norm (norm_type=frobenius) over steps")
    drawn_in = {(entry["panel"], entry["about"]): entry for entry in browser.execute_script(DRAWN, name)}
    own = table[(table["metric"] == "norm") & (table["options"] == "norm_type=frobenius")]
    for (module, kind), values in own.groupby(["module", "kind"]):
        layer, suffix = re.match(r"(?:layers\.(\d+)\.)?(.*)", module).groups()  # type: ignore[union-attr]
        split = " (train)" if kind == "gradients" else ""
        entry = drawn_in.pop((f"<b>{suffix} · {kind}{split}</b>", f"layer {layer}" if layer else "whole model"))
        assert (entry["x"], entry["y"]) == (list(values["step"]), list(values["value"]))
    assert not drawn_in


def test_the_pixels_are_where_the_values_are(toy_table: pd.DataFrame, browser_at: Browser, tmp_path: Path) -> None:
    browser = browser_at(write([], [str(tmp_path / "toy_analysis")], tmp_path / "report.html"))
    name = show(browser, "cka over steps")
    paths = browser.execute_script(
        "const plot = figures.get(arguments[0]).plot, y = plot._fullLayout.yaxis, x = plot._fullLayout.xaxis;"
        "return [...plot.querySelectorAll('.scatterlayer path.js-line')].map((path) =>"
        " path.getAttribute('d').slice(1).split('L').map((point) => point.split(',').map(Number))"
        " .map(([left, top]) => [x.p2d(left), y.p2d(top)]));",
        name,
    )
    own = toy_table[toy_table["metric"] == "cka"]
    means = own.groupby(["layer", "step"])["value"].mean()
    for layer, points in enumerate(paths):
        for step, value in points:
            near = round(step / 10) * 10
            assert value == pytest.approx(means[layer, near], abs=0.01)


def test_hovering_shows_the_exact_value(toy_table: pd.DataFrame, browser_at: Browser, tmp_path: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    browser = browser_at(write([], [str(tmp_path / "toy_analysis")], tmp_path / "report.html"))
    name = show(browser, "norm (norm_type=frobenius) over steps")
    own = toy_table[(toy_table["metric"] == "norm") & (toy_table["layer"] == 2) & (toy_table["step"] == 30)].iloc[0]
    left, top = browser.execute_script(
        "const plot = figures.get(arguments[0]).plot, box = plot.getBoundingClientRect(), x = plot._fullLayout.xaxis,"
        " y = plot._fullLayout.yaxis;"
        "return [box.left + x._offset + x.c2p(arguments[1]), box.top + y._offset + y.c2p(arguments[2])];",
        name, int(own["step"]), float(own["value"]),
    )  # fmt: skip
    chain = ActionChains(browser)
    chain.w3c_actions.pointer_action.move_to_location(round(left), round(top))
    chain.perform()
    time.sleep(0.3)
    shown = browser.find_element(By.CSS_SELECTOR, f"#{name} .hoverlayer").text
    assert "layer 2" in shown
    assert re.search(r"30:\s*([\d.]+)", shown)[1] == repr(float(own["value"]))  # type: ignore[index]


def test_toggles_change_the_plot(toy_table: pd.DataFrame, browser_at: Browser, tmp_path: Path) -> None:
    browser = browser_at(write([], [str(tmp_path / "toy_analysis")], tmp_path / "report.html"))
    name = show(browser, "cka over steps")
    line = "return document.querySelector(`#${arguments[0]} .scatterlayer path.js-line`).getAttribute('d')"
    count = "return document.querySelectorAll(`#${arguments[0]} .scatterlayer path.js-line`).length"
    before = browser.execute_script(line, name)
    press(browser, name, "log values")
    assert browser.execute_script(f"return figures.get('{name}').plot._fullLayout.yaxis.type") == "log"
    assert browser.execute_script(line, name) != before
    assert browser.execute_script(count, name) == 3
    press(browser, name, "each head")
    assert browser.execute_script(count, name) == 12
    was = browser.execute_script("return getComputedStyle(document.querySelector('.scatterlayer path.js-line')).stroke")
    browser.find_element("id", "theme").click()
    assert (
        browser.execute_script("return getComputedStyle(document.querySelector('.scatterlayer path.js-line')).stroke")
        != was
    )


def download(browser: Any, folder: Path, name: str, text: str) -> Path:
    folder.mkdir()
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)})
    press(browser, name, text)
    for _ in range(200):
        files = [
            file for file in folder.iterdir() if not file.name.endswith(".crdownload") and not file.name.startswith(".")
        ]
        if files:
            return files[0]
        time.sleep(0.05)
    raise AssertionError(f"{text} gave no file")


def test_the_csv_is_the_table_and_figures_can_be_saved(
    toy_table: pd.DataFrame, browser_at: Browser, tmp_path: Path
) -> None:
    browser = browser_at(write([], [str(tmp_path / "toy_analysis")], tmp_path / "report.html"))
    sheet = browser.execute_script("return document.querySelector('.sheet').id")
    file = download(browser, tmp_path / "csv", sheet, "Save as CSV")
    found = pd.read_csv(io.StringIO(file.read_text()), keep_default_na=True)
    assert np.array_equal(found["value"], toy_table["value"], equal_nan=True)
    for column in found.columns:
        if column != "value":
            assert list(found[column].astype("string").fillna("")) == [
                "" if pd.isna(value) else str(value) for value in found[column].astype(object)
            ]
    assert list(found["module"]) == list(toy_table["module"])
    assert list(found["step"]) == list(toy_table["step"])
    assert found["layer"].astype("Int64").equals(toy_table["layer"])
    figure = show(browser, "cka over steps")
    assert "<svg" in download(browser, tmp_path / "svg", figure, "SVG").read_text()
    assert download(browser, tmp_path / "png", figure, "PNG").read_bytes().startswith(b"\x89PNG")


def test_no_text_of_a_saved_csv_is_a_formula(toy_table: pd.DataFrame, browser_at: Browser, tmp_path: Path) -> None:
    evil = ["=HYPERLINK(1)", "+1+1", "-2+3", "@SUM(A1)", "\t=1", "'=1", "-1", "plain"]
    toy_table["options"] = [evil[number % len(evil)] for number in range(len(toy_table))]
    toy_table["value"] = -toy_table["value"]
    buffer = io.BytesIO()
    toy_table.to_parquet(buffer)
    seal(tmp_path / "toy_analysis", "results.parquet", buffer.getvalue())
    browser = browser_at(write([], [str(tmp_path / "toy_analysis")], tmp_path / "report.html"))
    sheet = browser.execute_script("return document.querySelector('.sheet').id")
    file = download(browser, tmp_path / "csv", sheet, "Save as CSV")
    raw = pd.read_csv(file, keep_default_na=False, dtype=str)
    assert set(raw["options"]) == {"'" + text for text in evil[:6]} | set(evil[6:])
    found = csvfile.read(file)
    assert list(found["options"]) == list(toy_table["options"])
    assert np.array_equal(found["value"], toy_table["value"], equal_nan=True)


def test_the_table_sorts_and_filters(toy_table: pd.DataFrame, browser_at: Browser, tmp_path: Path) -> None:
    browser = browser_at(write([], [str(tmp_path / "toy_analysis")], tmp_path / "report.html"))
    sheet = browser.execute_script("return document.querySelector('.sheet').id")
    place = "return [...document.querySelectorAll('.sheet tbody tr')].map((line) => line.children[arguments[0]].textContent)"
    names = [text.strip() for text in browser.execute_script("return sheets.get(arguments[0]).names", sheet)]
    browser.find_element("css selector", ".sheet input").send_keys("cka layer=1 value>0.5")
    time.sleep(0.4)
    own = toy_table[(toy_table["metric"] == "cka") & (toy_table["layer"] == 1) & (toy_table["value"] > 0.5)]
    assert f"of {len(own)} rows" in browser.find_element("css selector", ".sheet [role=status]").text
    press(browser, sheet, "value")
    values = [float(text) for text in browser.execute_script(place, names.index("value"))]
    assert values == sorted(own["value"])
    heading = browser.find_element("css selector", ".sheet th[aria-sort]")
    assert (heading.text, heading.get_attribute("aria-sort")) == ("value ↑", "ascending")


def test_hostile_text_is_shown_as_text(toy_table: pd.DataFrame, browser_at: Browser, tmp_path: Path) -> None:
    for column in ("run", "metric", "options", "module"):
        toy_table[column] = HOSTILE
    row = {"heading": HOSTILE, "tokens": tokens(["a", HOSTILE], np.array([1.0]), most=4.0)}
    text = render("text.html", steps=[0], blocks=[(0, [row])], most=4.0)
    material = Material([], [Analysis(HOSTILE, toy_table)])
    path = tmp_path / "report.html"
    path.write_text(page(material, [Section(HOSTILE, [text]), *compose(material)]))
    browser = browser_at(path)
    titles = browser.execute_script(TITLES)
    assert f"{HOSTILE} ({HOSTILE}) over steps" in titles
    for title in titles:
        show(browser, title)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.querySelectorAll('img').length") == 0
    assert browser.execute_script("return document.querySelectorAll('script:not([type])').length") == 2
    assert HOSTILE in browser.execute_script("return document.querySelector('.tokens').textContent")
    assert HOSTILE in browser.execute_script("return document.querySelector('.sheet tbody').textContent")
    drawn = browser.execute_script(
        "return [...document.querySelectorAll('.plot')].map((plot) => plot.textContent).join()"
    )
    assert f"{HOSTILE} ({HOSTILE})" in drawn


def test_figures_are_drawn_for_print(toy_table: pd.DataFrame, browser_at: Browser, tmp_path: Path) -> None:
    browser = browser_at(write([], [str(tmp_path / "toy_analysis")], tmp_path / "report.html"), 390, 600, "dark")
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    assert len(printed["data"]) > 20_000
    drawn = browser.execute_script("return [...figures.values()].every((figure) => figure.drawn)")
    assert drawn
    themes = browser.execute_script(
        "return ['beforeprint', 'afterprint'].map((name) => { dispatchEvent(new Event(name)); return theme(); });"
    )
    assert themes == ["light", "dark"]


def test_everything_is_reached_by_the_keyboard_and_said_in_words(
    toy_table: pd.DataFrame, browser_at: Browser, tmp_path: Path
) -> None:
    browser = browser_at(write([], [str(tmp_path / "toy_analysis")], tmp_path / "report.html"))
    name = show(browser, "cka over steps")
    words = browser.find_element("css selector", f"#{name} .plot").get_attribute("aria-label")
    assert re.match(r"cka over steps\. 3 lines over step \(updates\).*15 values from 0\.\d+ to 0\.\d+\.", words)
    unnamed = browser.execute_script(
        "return [...document.querySelectorAll('button, input, select, a')]"
        ".filter((node) => !(node.textContent.trim() || node.getAttribute('aria-label'))).length"
    )
    assert unnamed == 0
    button = browser.find_element("css selector", f"#{name} .segments button:last-child")
    button.send_keys("\ue007")  # Enter
    assert button.get_attribute("aria-pressed") == "true"


def test_a_hundred_thousand_values_stay_usable(
    make_table: Callable[..., pd.DataFrame], browser_at: Browser, tmp_path: Path
) -> None:
    rows = circuits(range(0, 5000, 50), 24, 16)[:95000] + norms(range(0, 10000, 50), 24)
    table = make_table(rows)
    assert len(table) >= 43_000
    both = pd.concat([table, table.assign(metric=table["metric"] + "_2")], ignore_index=True)
    both = pd.concat([both, table.assign(metric=table["metric"] + "_3")], ignore_index=True)[:100_000]
    material = gather([], [str(tmp_path / "toy_analysis")])
    material.analyses[0].table = both
    began = time.perf_counter()
    path = tmp_path / "report.html"
    path.write_text(page(material, compose(material)))
    built = time.perf_counter() - began
    began = time.perf_counter()
    browser = browser_at(path)
    opened = time.perf_counter() - began
    name = show(browser, "cka over steps")
    began = time.perf_counter()
    press(browser, name, "each head")
    toggled = time.perf_counter() - began
    print(f"built {built:.1f} s, opened {opened:.1f} s, toggled {toggled:.2f} s, {path.stat().st_size / 1e6:.1f} MB")
    assert built < 60
    assert opened < 20
    assert toggled < 10
    assert path.stat().st_size < 12e6


def test_figures_become_files_with_the_look_of_the_page(
    toy_table: pd.DataFrame, browser_at: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, folder = tmp_path / "report.html", tmp_path / "figures"
    words = ["report", "--analysis", tmp_path / "toy_analysis", "-o", out, "--figures", folder]
    subprocess.run([sys.executable, "-m", "picolm", *map(str, words)], check=True, capture_output=True, timeout=200)
    assert {file.suffix for file in folder.iterdir()} == {".svg", ".pdf", ".png"}
    assert (folder / "cka-over-steps.pdf").read_bytes().startswith(b"%PDF")
    assert "layer 2" in (folder / "cka-over-steps.svg").read_text()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PicoError, match="figures as files need a browser, and none is found"):
        write([], [str(tmp_path / "toy_analysis")], out, figures=folder)
