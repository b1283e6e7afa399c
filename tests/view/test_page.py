"""The page of the microscope in a real browser: what it shows is what Python computes, for every kind of model."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.readers.conftest import make
from tests.view.page_driver import Page, server

from picolm.errors import PicoError
from picolm.observe.rows import Rows, tokenizer_of
from picolm.observe.subject import Subject
from picolm.readers.series import open_series
from picolm.report.browser import drive
from picolm.store import Run
from picolm.store.manifest import MANIFEST, Manifest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
KINDS = ("decoder", "gpt_neox", "statespace", "diffusion")
TEXT = "The people of the States and the people of the Union."
SAVED = "return [...document.querySelectorAll('output')].some((node) => node.textContent === 'saved')"
HOSTILE = "</script><img src=x onerror=alert(1)>${1} & “naïve”"
SMALL = [
    "data.tokenizer.vocab_size=512", "model.vocab_size=512", "model.max_seq_len=48", "data.dataloader.batch_size=4",
    "training.max_steps=8", "training.fabric.precision=32-true", "training.optimization.gradient_accumulation_steps=1",
    "training.optimization.lr_warmup_steps=2", "checkpointing.save_schedule=log", "checkpointing.learning_dynamics.max_rows=4",
    "checkpointing.learning_dynamics.positions=null", "evaluation.every_n_steps=4", "evaluation.paloma.max_rows=8",
    "monitoring.logging.log_every_n_steps=2",
]  # fmt: skip
OF_KIND = {
    "decoder": ("demo.yaml", ["model.d_model=24", "model.activation_hidden_dim=48", "model.n_layers=2"]),
    "statespace": ("pico-statespace-nano-300k.yaml", ["model.n_layers=2"]),
    "diffusion": ("pico-diffusion-nano-300k.yaml", ["model.n_layers=2"]),
}


def trained(folder: Path, kind: str, *words: str) -> Path:
    config, own = OF_KIND[kind]
    command = [sys.executable, "-m", "picolm", "train", str(ROOT / "configs" / config), *SMALL, *own, *words]
    done = subprocess.run(
        [*command, f"checkpointing.run_name={kind}"], cwd=folder, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return folder / "runs" / kind


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a kind to a run of it, made when it is first asked for."""
    folder, known = tmp_path_factory.mktemp("view"), dict[str, Path]()

    def series() -> Path:
        tokenizer = run("decoder") / "checkpoints/step_0/tokenizer.json"
        for seed, step in enumerate((1, 2, 4)):
            make("gpt_neox", seed, vocab_size=512).save_pretrained(folder / "gpt_neox" / f"step{step}")
            shutil.copy(tokenizer, folder / "gpt_neox" / f"step{step}")
        return folder / "gpt_neox"

    def run(kind: str) -> Path:
        if kind not in known:
            known[kind] = series() if kind == "gpt_neox" else trained(folder, kind)
        return known[kind]

    return run


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium that saves files to its `downloads`. Skips where there is none."""
    try:
        browser = drive()
    except PicoError as error:
        pytest.skip(str(error))
    browser.downloads = tmp_path_factory.mktemp("downloads")
    browser.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(browser.downloads)}
    )
    yield browser
    browser.quit()


@pytest.fixture(scope="session")
def page_of(made: Callable[[str], Path], chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A function from kinds to a page with a server that shows these runs; servers are ended with the session."""
    from contextlib import ExitStack

    os.environ["PICO_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    with ExitStack() as stack:
        pages = dict[tuple[str, ...], Page]()

        def of(*kinds: str) -> Page:
            if kinds not in pages:
                pages[kinds] = Page(chromium, stack.enter_context(server(*map(made, kinds))))
            return pages[kinds]

        yield of


class Truth:
    """What Python computes of a text at a step."""

    def __init__(self, place: Path, text: str = TEXT):
        run = open_series(str(place)) or Run.open(place)
        self.run, self.subject, self.tokenizer = run, Subject(run), tokenizer_of(run)[1]
        self.ids = self.tokenizer.encode(text).ids
        self.bound = self.subject.likelihood == "bound"
        self.rows = Rows(
            [torch.tensor(self.ids)], [list(range(len(self.ids) - 1))], "text", True, "text", int(not self.bound)
        )

    def at(self, step: int) -> "Truth":
        self.subject.at(self.run[step])
        return self

    def nats(self) -> list[float | None]:
        nats = self.subject.scores(self.rows, draws=0)[0].tolist()
        return [None] * (len(self.ids) - len(nats)) + nats

    def mean(self) -> float:
        nats = [value for value in self.nats() if value is not None]
        return sum(nats) / len(nats)

    def passed(self, *needs: str) -> Any:
        return self.subject.forward(self.rows.read_whole(), [0], needs)

    def mixed(self, layer: int, head: int) -> torch.Tensor:
        """What a head does with each position, [T, T]."""
        whole = self.rows.read_whole()
        if hasattr(self.subject.architecture.outline, "with_mixing"):
            return self.passed("mixing").mixing[layer].matrix_BHTT[0, head]
        pattern = list(
            self.subject.patterns(
                Rows(whole.tokens, [list(range(len(self.ids)))], "text", False, "p"), [layer]
            ).values()
        )
        return pattern[0][0, head]


def near(values: Any) -> Any:
    return pytest.approx(values, rel=2e-5, abs=2e-6)


def numbers(values: list[float | None]) -> list[float]:
    return [-1.0 if value is None else value for value in values]


@pytest.mark.parametrize("kind", KINDS)
def test_the_slider_shows_what_python_computes(kind: str, page_of: Any, made: Callable[[str], Path]) -> None:
    page, truth = page_of(kind).open().type(TEXT), Truth(made(kind))
    steps = truth.run.steps
    for key, step in (("Home", steps[0]), ("ArrowRight", steps[1]), ("End", steps[-1])):
        page.to(key)
        assert page.step() == step
        assert numbers(page.values(".text-panel .tokens span")) == near(numbers(truth.at(step).nats()))
        assert page.one(".facts-line b").text == f"{truth.mean():.3f} nats"
    words = page.ask(
        "return [...document.querySelectorAll('.text-panel .tokens span')].map((node) => node.textContent).join('')"
    )
    assert words == TEXT
    assert page.trouble() == ""
    assert page.complaints() == []


@pytest.mark.parametrize("kind", KINDS)
def test_hovering_tells_the_likeliest_tokens_and_how_the_true_one_went(
    kind: str, page_of: Any, made: Callable[[str], Path]
) -> None:
    page, truth = page_of(kind).open(text=TEXT).to("End").history("text"), Truth(made(kind))
    at = 5
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(page.chromium).move_to_element(page.all(".text-panel .tokens span")[at]).perform()
    page.until("return document.querySelector('.detail').textContent.includes('token 6 of')")
    facts = page.data(".detail .facts")[0]
    assert float(facts["nats"]) == near(truth.at(truth.run.steps[-1]).nats()[at])
    assert math.exp(-float(facts["nats"])) == near(float(facts["probability"]))
    likeliest = page.data(".likeliest tr[data-share]")[:10]
    assert len(likeliest) == 10
    if not truth.bound:
        shares = truth.passed().logits_BTV[0, at - 1].float().softmax(-1)
        assert [float(each["share"]) for each in likeliest] == near(shares.topk(10).values.tolist())
        assert int(facts["rank"]) == int((shares > shares[truth.ids[at]]).sum())
    page.until("return document.querySelectorAll('.trend .legend li').length === 2")
    for step in truth.run.steps[:2]:
        page.to("Home") if step == truth.run.steps[0] else page.to("ArrowRight")
        page.history("text").until(
            "return document.querySelector('.trend .legend li').dataset.step === arguments[0]", str(step)
        )
        probability, rank = page.values(".trend .legend li")
        nats = truth.at(step).nats()[at]
        assert nats is not None
        assert probability == near(math.exp(-nats))
        assert rank is not None
        assert rank >= 1


@pytest.mark.parametrize("kind", KINDS)
def test_heads_are_those_of_python(kind: str, page_of: Any, made: Callable[[str], Path]) -> None:
    page, truth = page_of(kind).open(text=TEXT, panel="heads", layer=1, head=1), Truth(made(kind))
    heads = page.ask("return document.querySelectorAll('.head').length")
    assert heads == truth.subject.anatomy.layers * page.ask(
        "return Number(getComputedStyle(document.querySelector('.heads-grid')).getPropertyValue('--columns'))"
    )
    for key, step in (("Home", truth.run.steps[0]), ("End", truth.run.steps[-1])):
        page.to(key)
        matrix = truth.at(step).mixed(1, 1)
        assert page.values(".reads .tokens span") == near(matrix[-1].tolist())
        page.history("heads").until("return document.querySelector('.scores .readout').dataset.value !== ''")
        previous = page.values(".scores .readout")[0]
        assert previous == near(float(matrix.diagonal(-1).mean()))
    assert (page.ask("return document.querySelector('.scale.ramp.signed') !== null")) == (kind == "statespace")
    assert bool(page.all(".order .tokens span")) == (kind == "diffusion")
    if kind == "diffusion":
        order = [int(value or 0) for value in page.values(".order .tokens span")]  # the first token is given
        assert (order[0], sorted(order)) == (0, list(range(len(truth.ids))))
    assert (page.trouble(), page.complaints()) == ("", [])


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_those_of_python(kind: str, page_of: Any, made: Callable[[str], Path]) -> None:
    page, truth = page_of(kind).open(text=TEXT, panel="layers", lens="norm").to("End"), Truth(made(kind))
    if truth.bound:
        assert page.one("#panel-layers").text != ""
        if not page.all(".lens"):
            return  # the model says why it has no lens
    hidden = truth.at(truth.run.steps[-1]).passed("hidden").hidden
    for layer, stream_BTH in enumerate(hidden):
        norms = stream_BTH[0].norm(dim=-1).tolist()
        assert page.values(f".lens td[data-row='{layer}']") == near(norms)
    page.press("prediction", "#panel-layers")
    for layer, stream_BTH in enumerate(hidden):
        with torch.no_grad():
            shares = truth.subject.readout(stream_BTH)[0].float().softmax(-1)
        assert page.values(f".lens td[data-row='{layer}']") == near(shares.max(-1).values.tolist())
    assert (page.trouble(), page.complaints()) == ("", [])


def test_training_shows_the_log_and_the_batch(page_of: Any, made: Callable[[str], Path]) -> None:
    page, truth = page_of("decoder").open(panel="training", step=4), Truth(made("decoder"))
    lines = [json.loads(line) for line in (made("decoder") / "metrics.jsonl").read_text().splitlines()]
    logged = next(line["train/loss"] for line in lines if line["step"] == 4 and "train/loss" in line)
    loss = next(each for each in page.data(".training-panel .legend li") if each["text"].startswith("train/loss"))
    assert (int(loss["step"]), float(loss["value"])) == (4, logged)
    rows = page.data(".batch .row")
    assert len(rows) == 4
    table = truth.run[4].rows("train")  # type: ignore[attr-defined]
    for shown, ids in zip(rows, table.column("input_ids").to_pylist(), strict=True):
        row = Rows([torch.tensor(ids)], [[0]], "text", True, str(shown["row"]))
        for key, step in (("before", 4), ("after", 8)):
            nats = truth.at(step).subject.scores(row)[0]
            assert float(shown[key]) == near(float(nats.mean()))
    assert (page.trouble(), page.complaints()) == ("", [])


def test_a_row_of_training_says_when_it_was_read(page_of: Any, made: Callable[[str], Path]) -> None:
    page = page_of("decoder").open(row="train:2:1", step=2)
    assert "seen at step 2" in page.one(".facts-line").text
    ids = Truth(made("decoder")).run[2].rows("train").column("input_ids").to_pylist()[1]  # type: ignore[attr-defined]
    assert len(page.all(".text-panel .tokens span")) == len(ids)
    page.ask("const kind = document.getElementById('kind'); kind.value = 'val'; kind.onchange({target: kind});")
    assert "row=val" in page.settle().ask("return location.hash")


def test_gain_is_the_difference_of_two_steps(page_of: Any, made: Callable[[str], Path]) -> None:
    page, truth = page_of("decoder").open(text=TEXT, colour="gain", **{"from": 0}).to("End"), Truth(made("decoder"))
    first, last = truth.at(0).nats(), truth.at(8).nats()
    gained = [None if a is None or b is None else a - b for a, b in zip(first, last, strict=True)]
    assert numbers(page.values(".text-panel .tokens span")) == near(numbers(gained))


def test_two_architectures_side_by_side(page_of: Any, made: Callable[[str], Path]) -> None:
    page = page_of("decoder", "statespace").open(text=TEXT, panel="compare").to("End")
    means = {each["run"]: float(each["mean"]) for each in page.data(".side")}
    for number, kind in enumerate(("decoder", "statespace")):
        assert means[str(number)] == near(Truth(made(kind)).at(8).mean())
    page.press("Add a side")
    assert [each["step"] for each in page.data(".side")] == ["8", "8", "0"]
    assert float(page.data(".side")[2]["mean"]) == near(Truth(made("decoder")).at(0).mean())
    page.history("compare").to("Home")
    assert {each["step"] for each in page.data(".side")} == {"0"}
    page.open(text=TEXT, colour="difference", other=1, step=8)
    ours, theirs = Truth(made("decoder")).at(8).nats(), Truth(made("statespace")).at(8).nats()
    expected = [None if a is None or b is None else b - a for a, b in zip(ours, theirs, strict=True)]
    assert numbers(page.values(".text-panel .tokens span")) == near(numbers(expected))
    assert (page.trouble(), page.complaints()) == ("", [])


def test_heads_and_layers_of_two_runs_are_compared(page_of: Any, made: Callable[[str], Path]) -> None:
    kinds = ("decoder", "statespace", "diffusion")
    page = page_of(*kinds).open(text=TEXT, panel="compare", beside="heads", head=1, layer=1).to("End")
    truths = [Truth(made(kind)).at(8) for kind in kinds]
    for number, truth in enumerate(truths):
        matrix_NTT = truth.mixed(1, 1)
        assert (
            len(page.all(f".side[data-run='{number}'] .head"))
            == truth.subject.anatomy.layers * truth.subject.anatomy.heads
        )
        assert page.values(f".side[data-run='{number}'] .reads .tokens span") == near(matrix_NTT[-1].tolist())
    page.ask("document.querySelectorAll('.side .head')[0].click()")  # chooses the same head of every side
    page.settle()
    for number, truth in enumerate(truths):
        assert page.values(f".side[data-run='{number}'] .reads .tokens span") == near(truth.mixed(0, 0)[-1].tolist())
    page.press("layers", "#panel-compare").press("loss of the next token", "#panel-compare")
    for number, truth in enumerate(truths[:2]):
        last = truth.subject.anatomy.layers
        shown = page.values(f".side[data-run='{number}'] td[data-row='{last}']")
        assert shown[-1] is None  # nothing comes after the last token
        assert shown[:-1] == near(truth.nats()[1:])
    why = page.one(".side[data-run='2'] .notice").text
    assert "logits" in why or "hidden" in why or "readout" in why, why
    assert (page.trouble(), page.complaints()) == ("", [])


def test_a_curve_that_leaves_steps_out_says_so(
    page_of: Any, made: Callable[[str], Path], tmp_path: Path, chromium: Any
) -> None:
    run = Run.open(shutil.copytree(made("decoder"), tmp_path / "many"))
    last = run.steps[-1]
    source = run.path / "checkpoints" / f"step_{last}"
    manifest = Manifest.from_bytes((source / MANIFEST).read_bytes(), str(source))
    for step in range(last + 1, last + 241):
        folder = shutil.copytree(source, source.with_name(f"step_{step}"), copy_function=os.link)
        (folder / MANIFEST).unlink()
        (folder / MANIFEST).write_bytes(replace(manifest, step=step).to_bytes())
    count = len(run.step_directories())
    with server(run.path) as address:
        page = Page(chromium, address).open(text=TEXT).history("text")
        drawn = int(page.ask("return document.getElementById('panel-text').dataset.history"))
        assert drawn < count
        page.until(
            "return document.querySelector('.mean h4').textContent.endsWith(arguments[0])",
            f", at {drawn} of {count} steps",
        )
        assert page.to("End").step() == last + 240
        assert (page.trouble(), page.complaints()) == ("", [])


def test_a_link_restores_the_state(page_of: Any) -> None:
    page = page_of("decoder", "statespace").open().type("one two three").panel("heads").to("Home").to("ArrowRight")
    page.ask("document.querySelectorAll('.head')[3].click()")
    page.settle().press("induction", "#panel-heads").press("linear")
    link, shown = page.ask("return location.href"), page.data(".reads .tokens span")
    page.chromium.get("about:blank")
    page.chromium.get(link)
    page.settle()
    assert page.ask("return location.href") == link
    assert (page.step(), page.data(".reads .tokens span")) == (1, shown)
    assert page.one("#text").get_attribute("value") == "one two three"
    pressed = page.ask(
        "return [...document.querySelectorAll('[aria-pressed=true]')].map((node) => node.ariaLabel || node.textContent)"
    )
    assert {"linear", "induction", "layer 0, head 3"} <= set(pressed)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_page_opens_from_the_disk_and_asks_nobody(kind: str, page_of: Any, made: Callable[[str], Path]) -> None:
    page, truth = page_of(kind).open(text=TEXT).to("End").panel("save"), Truth(made(kind))
    page.press("Save as page")
    page.until(SAVED)
    file = newest(page.chromium.downloads, ".html")
    saved = Page(page.chromium, file.resolve().as_uri())
    saved.open()
    for key, step in (("Home", truth.run.steps[0]), ("End", truth.run.steps[-1])):
        saved.panel("text").to(key)
        assert numbers(saved.values(".text-panel .tokens span")) == near(numbers(truth.at(step).nats()))
        saved.panel("heads")
        assert saved.values(".reads .tokens span") == near(truth.mixed(0, 0)[-1].tolist())
    assert saved.trouble() == ""
    assert bool(saved.all("#tab-layers")) == (not truth.bound)  # a panel without answers is not there
    for tab in saved.all("[role=tab]"):
        saved.panel(tab.get_attribute("id").removeprefix("tab-"))
        assert saved.trouble() == ""
    assert saved.requests() == [file.resolve().as_uri()]
    assert saved.complaints() == []
    file.unlink()


def newest(folder: Path, suffix: str) -> Path:
    import time

    for _ in range(200):
        if found := [file for file in folder.iterdir() if file.suffix == suffix]:
            return max(found, key=lambda file: file.stat().st_mtime)
        time.sleep(0.05)
    raise AssertionError(f"no {suffix} was saved")


def test_figures_and_an_animation_are_taken_away(page_of: Any) -> None:
    page = page_of("decoder").open(text=TEXT)
    page.press("SVG", "#panel-text .controls")
    drawn = newest(page.chromium.downloads, ".svg").read_text()
    assert TEXT in re.sub("<[^>]+>", "", drawn)
    assert "var(--" not in drawn
    page.press("PNG", "#panel-text .controls")
    assert newest(page.chromium.downloads, ".png").read_bytes().startswith(b"\x89PNG")
    from PIL import Image

    for figure, form, frames in (("text", "WebP", 5), ("head", "GIF", 5)):
        page.panel("save").press(figure, "#panel-save").press(form, "#panel-save").press(
            "Make animation", "#panel-save"
        )
        page.until(SAVED)
        with Image.open(newest(page.chromium.downloads, f".{form.lower()}")) as picture:
            assert picture.n_frames == frames  # type: ignore[attr-defined]
    assert page.complaints() == []


def test_hostile_names_and_texts_are_text(
    made: Callable[[str], Path], chromium: Any, tmp_path: Path, page_of: Any
) -> None:
    evil = tmp_path / "evil"
    shutil.copytree(made("decoder"), evil, symlinks=True)
    described = json.loads((evil / "run.json").read_text()) | {"run_name": HOSTILE}
    (evil / "run.json").write_text(json.dumps(described))
    with server(evil) as address:
        page = Page(chromium, address).open(380, 844).type(HOSTILE)
        assert page.one("#text").get_attribute("value") == HOSTILE
        for panel in ("text", "heads", "layers", "training", "compare", "save"):
            page.panel(panel)
            assert page.ask("return document.querySelectorAll('img, body script').length") == 0
            assert page.ask("return document.documentElement.scrollWidth") <= 380
            assert page.trouble() == ""
        assert page.complaints() == []
        page.press("Save as page")
        page.until(SAVED)
        file = newest(chromium.downloads, ".html")
        saved = Page(chromium, file.resolve().as_uri()).open()
        assert saved.ask("return document.querySelectorAll('img').length") == 0
        assert (saved.one("#text").get_attribute("value"), saved.complaints()) == (HOSTILE, [])
        file.unlink()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [380, 1280])
def test_no_panel_is_wider_than_the_window(width: int, theme: str, page_of: Any, tmp_path: Path) -> None:
    artefacts = Path(os.environ.get("PICO_ARTEFACTS", tmp_path))
    page = page_of("decoder", "statespace").open(width, 844, theme, text=TEXT, step=4)
    for panel in ("text", "heads", "layers", "training", "compare", "save"):
        page.panel(panel)
        assert page.ask("return document.documentElement.scrollWidth") <= width
        page.chromium.save_screenshot(str(artefacts / f"view-{panel}-{width}-{theme}.png"))
    back = page.ask("return getComputedStyle(document.body).backgroundColor")
    assert back == ("rgb(244, 246, 249)" if theme == "light" else "rgb(15, 19, 27)")


def test_everything_is_reached_by_keys(page_of: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    page = page_of("decoder").open(text=TEXT)
    reached = list[str]()
    for _ in range(60):
        page.keys(Keys.TAB)
        reached.append(page.ask("const a = document.activeElement; return a.id || a.ariaLabel || a.textContent"))
        visible = page.ask(
            "const a = document.activeElement; return a === document.body || getComputedStyle(a).outlineStyle !== 'none'"
        )
        assert visible, reached[-1]
        if reached[-1] == "tab-text":
            break
    assert {"theme", "play", "track", "kind", "text", "tab-text"} <= set(reached)
    page.keys(Keys.ARROW_RIGHT)
    assert page.ask("return document.activeElement.id") == "tab-heads"
    while page.ask("return !document.activeElement.classList.contains('head')"):
        page.keys(Keys.TAB)
    page.keys(Keys.ARROW_RIGHT, Keys.ENTER)
    assert "head=1" in page.ask("return location.hash")
    page.panel("text")
    page.ask("document.querySelector('.tokens span[tabindex=\"0\"]').focus()")
    page.keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert page.one(".detail small").text.startswith("token 4 of")
    page.to("Home").keys(Keys.SPACE)  # plays from here to the end
    page.until("return document.getElementById('track').getAttribute('aria-valuenow') === '8'")
    page.until("return document.getElementById('play').getAttribute('aria-pressed') === 'false'")
    assert re.fullmatch(
        r"step 8: \d+\.\d{3} nats per token", page.settle().ask("return document.getElementById('status').textContent")
    )


def test_an_older_question_is_given_up(page_of: Any, made: Callable[[str], Path]) -> None:
    page = page_of("decoder").open(text=TEXT)
    page.ask(
        "const track = document.getElementById('track');"
        "const key = (name) => track.dispatchEvent(new KeyboardEvent('keydown', {key: name}));"
        "for (let at = 0; at < 9; at++) { key('Home'); key('ArrowRight'); key('ArrowRight'); }"
    )
    page.settle()
    step = page.step()
    assert step == 2
    assert numbers(page.values(".text-panel .tokens span")) == near(numbers(Truth(made("decoder")).at(step).nats()))
    assert page.complaints() == []


def test_the_page_works_in_the_frame_of_a_notebook(made: Callable[[str], Path], chromium: Any, tmp_path: Path) -> None:
    import picolm

    shown = picolm.view(made("decoder"), text=TEXT, steps=[0, 8])
    (tmp_path / "notebook.html").write_text(f"<!doctype html><meta charset=utf-8><body>{shown._repr_html_()}")
    notebook = Page(chromium, (tmp_path / "notebook.html").as_uri())
    chromium.get("about:blank")
    notebook.complaints()
    chromium.get(notebook.address)
    chromium.switch_to.frame(0)
    try:
        truth = Truth(made("decoder"))
        for key, step in (("Home", 0), ("End", 8)):
            notebook.settle().to(key)
            assert numbers(notebook.values(".text-panel .tokens span")) == near(numbers(truth.at(step).nats()))
        notebook.panel("heads")
        assert (notebook.trouble(), notebook.complaints()) == ("", [])
    finally:
        chromium.switch_to.default_content()


def test_a_step_between_is_made_on_demand(page_of: Any, made: Callable[[str], Path]) -> None:
    page = page_of("decoder").open(text=TEXT)
    before = sorted(place.name for place in (made("decoder") / "checkpoints").iterdir())
    page.ask("document.getElementById('replay').open = true")
    page.one("#replay input").send_keys("6")
    page.press("How long?", "#replay")
    page.until("return [...document.querySelectorAll('#replay button')].some((node) => node.textContent === 'Make it')")
    assert "Step 6 is 2 updates after step 4" in page.one("#replay output").text
    page.press("Make it", "#replay")
    page.until("return document.getElementById('track').getAttribute('aria-valuenow') === '6'").settle()
    assert "made by replay" in page.one("#where").text
    loss = float(page.one(".facts-line b").text.split()[0])
    assert Truth(made("decoder")).at(8).mean() < loss < Truth(made("decoder")).at(4).mean()
    assert sorted(place.name for place in (made("decoder") / "checkpoints").iterdir()) == before
    assert (page.trouble(), page.complaints()) == ("", [])
