"""A real browser for tests of pages: started once per module, with its logs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if CHROMIUM is None or DRIVER is None:
    pytest.skip("no Chromium on this machine: apt-get install chromium chromium-driver", allow_module_level=True)

from selenium.webdriver import Chrome  # noqa: E402
from selenium.webdriver.chrome.options import Options  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@contextmanager
def started(profile: Path, logs: Sequence[str]) -> Iterator[Chrome]:
    """A browser with a fresh profile. logs: which of its logs are kept, such as "browser" and "performance"."""
    options = Options()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", dict.fromkeys(logs, "ALL"))
    browser = Chrome(options=options, service=Service(DRIVER))
    browser.set_script_timeout(60)
    try:
        yield browser
    finally:
        browser.quit()


def visit(browser: Chrome, page: Path, size: tuple[int, int], scheme: str) -> None:
    """Open a file in a window of this size (a phone below 500 pixels) and colour scheme."""
    width, height = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    browser.get(page.as_uri())
