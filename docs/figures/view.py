"""Take the pictures of the microscope for the README and the docs: `docs/figures/view-*.png`.

python docs/figures/view.py [runs/demo]    (needs Chromium: make browser)

`pico view` is started beside it and shown as a reader would see it: a wide window in either theme, and a telephone. Pictures are
reduced to 128 colours.
"""

import io
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image

from picolm.report.browser import drive, view

HERE = Path(__file__).parent
TEXT = "The people of the United States of America, and the government of the people."
# Width, height, theme, pixels per CSS pixel, what is looked at, and where the view begins: the top, or a part of the page.
VIEWS = {
    "text": (1280, 1190, "light", 1, f"step=64&token=5&text={TEXT}", ""),
    "heads": (1280, 1240, "dark", 1, f"step=300&panel=heads&layer=2&head=7&text={TEXT}", ""),
    "layers": (1280, 1000, "light", 1, f"step=64&panel=layers&text={TEXT}", ""),
    "training": (1280, 1000, "light", 1, "step=100&panel=training", ".batch h3"),
    "compare": (1280, 1150, "dark", 1, f"step=32&panel=compare&sides=0:f,0:0,0:300&text={TEXT}", ""),
    "phone": (390, 844, "light", 2, f"step=64&token=5&colour=gain&from=0&text={TEXT}", ""),
}
READY = """
const history = document.querySelector("[role=tabpanel]:not([hidden])").dataset.history;
return document.body.dataset.busy === "false" && history !== "";
"""


def main() -> None:
    run = (sys.argv[1:] or ["runs/demo"])[0]
    command = [sys.executable, "-u", "-m", "picolm", "view", run, "--no-browser"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    browser = drive()
    try:
        address = next(found[0] for line in server.stdout or () if (found := re.search(r"http://\S+", line)))
        for name, shape in VIEWS.items():
            picture = Image.open(io.BytesIO(take(browser, address, *shape)))
            picture.convert("RGB").quantize(128).save(HERE / f"view-{name}.png", optimize=True)
    finally:
        browser.quit()
        server.terminate()
        server.wait()


def take(browser: Any, address: str, width: int, height: int, theme: str, scale: float, state: str, part: str) -> bytes:
    """A picture of the page as PNG."""
    view(browser, width, height, theme, scale)
    browser.get("about:blank")
    browser.get(f"{address}#{state}")
    until = time.monotonic() + 120
    while not browser.execute_script(READY):
        if time.monotonic() > until:
            raise SystemExit(f"{state}: the page is not ready")
        time.sleep(0.1)
    if part:
        browser.execute_script("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", part)
    time.sleep(0.5)
    return bytes(browser.get_screenshot_as_png())


if __name__ == "__main__":
    main()
