"""A headless browser: it draws the figures of files, takes screenshots for the docs, and runs the page in tests."""

import shutil
from typing import Any

from picolm.errors import PicoError

BROWSERS = ("chromium", "google-chrome", "google-chrome-stable", "chrome", "chromium-browser", "microsoft-edge")
WORDS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")


def find() -> str:
    """Return the path of a browser that can draw figures. Raises PicoError that names those it searched for."""
    for name in BROWSERS:
        if (path := shutil.which(name)) is not None:
            return path
    raise PicoError(
        f"figures as files need a browser, and none is found (looked for {', '.join(BROWSERS)}): apt-get install chromium"
    )


def drive() -> Any:
    """Return a Chromium driven by selenium; end it with `.quit()`. Raises PicoError if either is missing."""
    driver = shutil.which("chromedriver")
    if driver is None:
        raise PicoError("no chromedriver here: make browser, or apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = find()
    for word in WORDS:
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chromium = webdriver.Chrome(options, webdriver.ChromeService(driver))
    chromium.set_script_timeout(120)
    return chromium


def view(chromium: Any, width: int, height: int, theme: str = "light", scale: float = 1) -> None:
    """Set the viewport, in CSS pixels, and the colour theme, light or dark; turn off animated scrolling."""
    size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 500}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = {"prefers-color-scheme": theme, "prefers-reduced-motion": "reduce"}
    media = [{"name": name, "value": value} for name, value in features.items()]
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
