"""Take the pictures of the demo's report for the README and the docs: `docs/figures/report-{light,dark,phone}.png`.

python docs/figures/report.py [runs/demo [analysis_results/demo]]    (needs Chromium: make browser)

The report is drawn anew from the run that `make demo` left and is shown as a reader would see it: a wide window in either
theme, and a telephone. Pictures are reduced to 128 colours, which figures of this kind do not miss.
"""

import io
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from picolm.report import write
from picolm.report.browser import drive, view

HERE = Path(__file__).parent
# Width, height, theme, pixels per CSS pixel, and where the view begins: the top, or the section with a title.
VIEWS = {
    "light": (1280, 1500, "light", 1, "Training"),
    "dark": (1280, 1100, "dark", 1, "Heatmaps"),
    "phone": (390, 844, "light", 2, "Metrics over steps"),
}
DRAW = """
const done = arguments[1];
ready.then(async () => {
  const title = [...document.querySelectorAll("h2")].find((node) => node.textContent === arguments[0]);
  for (const figure of figures.values()) await draw(figure);
  if (title) scrollTo({ top: title.getBoundingClientRect().top + scrollY - 20, behavior: "instant" });
  requestAnimationFrame(() => setTimeout(done, 300));
});
"""


def main() -> None:
    run, *analyses = sys.argv[1:] or ["runs/demo", "analysis_results/demo"]
    with tempfile.TemporaryDirectory() as folder:
        page = write([run], analyses, Path(folder) / "report.html")
        browser = drive()
        try:
            for name, shape in VIEWS.items():
                picture = Image.open(io.BytesIO(take(browser, page, *shape)))
                picture.convert("RGB").quantize(128).save(HERE / f"report-{name}.png", optimize=True)
        finally:
            browser.quit()


def take(browser: Any, page: Path, width: int, height: int, theme: str, scale: float, title: str) -> bytes:
    """A picture of the page as PNG."""
    view(browser, width, height, theme, scale)
    browser.get(page.resolve().as_uri())
    browser.execute_async_script(DRAW, title)
    return bytes(browser.get_screenshot_as_png())


if __name__ == "__main__":
    main()
