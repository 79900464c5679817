"""A headless Chromium for tests of pages. Tests that use it are marked `browser` and skipped where there is none."""

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_HAS_BROWSER = shutil.which("chromium") and shutil.which("chromedriver") and importlib.util.find_spec("selenium")

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


def browser_test(test):
    """Decorator marking a test that needs Chromium, its driver and selenium."""
    skip = pytest.mark.skipif(not _HAS_BROWSER, reason="needs chromium, chromedriver and selenium")
    return pytest.mark.browser(skip(test))


@contextmanager
def open_browser(folder: Path) -> Iterator["Browser"]:
    """
    Start Chromium with an empty profile in `folder`.

    Args:
        folder (`Path`):
            Folder that is not there yet.
    """
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*FLAGS, f"--user-data-dir={folder}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


class Browser:
    """
    Chromium, as wide as a phone or a desk, light or dark.

    Args:
        driver (`WebDriver`):
            selenium's driver, for everything else.
    """

    def __init__(self, driver):
        self.driver = driver

    def open(self, address: str, width: int = 1280, scheme: str = "light") -> None:
        """Open a page at a width in CSS pixels, `"light"` or `"dark"`."""
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        self.driver.get(address)

    def run(self, script: str):
        """The value of a JavaScript expression."""
        return self.driver.execute_script(f"return {script}")

    def errors(self) -> list[str]:
        """What the page complained of since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def screenshot(self, path: Path) -> Path:
        """All of the page as a PNG file."""
        import base64

        content = {"captureBeyondViewport": True, "format": "png"}
        picture = self.driver.execute_cdp_cmd("Page.captureScreenshot", content)
        path.write_bytes(base64.b64decode(picture["data"]))
        return path
