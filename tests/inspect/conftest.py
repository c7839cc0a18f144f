"""A browser for the tests that need one."""

import os
import shutil

import pytest
from playwright.sync_api import sync_playwright


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium: the system's, or the one that Playwright has installed.

    One per module, closed after it: while it runs, no other event loop can run in this thread.
    """
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        found = shutil.which("chromium") or shutil.which("chromium-browser") or (own if os.path.exists(own) else None)
        if found is None:
            pytest.fail(
                "no Chromium found: install it with `apt-get install chromium`, or with `playwright install chromium`"
            )
        chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()
