"""The programs that tests run. Without one a test is skipped, and the end of the run says so; with CI=true it fails."""

import os
import shutil
from collections import Counter

import pytest

INSTALL = {  # on Debian
    "arm-none-eabi-gcc": "apt-get install gcc-arm-none-eabi libnewlib-arm-none-eabi",
    "bash": "apt-get install bash",
    "cc": "apt-get install gcc libc6-dev",
    "chromium": "apt-get install chromium, or .venv/bin/playwright install chromium",
    "espeak-ng": "apt-get install espeak-ng",
    "g++": "apt-get install g++",
    "gcc": "apt-get install gcc libc6-dev",
    "make": "apt-get install make",
    "node": "apt-get install nodejs",
    "npm": "apt-get install npm",
    "qemu-system-arm": "apt-get install qemu-system-arm",
}
NEEDS = "needs "  # the first word of the reason


def need(*programs):
    """Skip the test, or fail it where CI=true, if one of these programs isn't installed."""
    for program in programs:
        if shutil.which(program) is None:
            without(program)


def without(program):
    reason = f"{NEEDS}{program} ({INSTALL[program]})"
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def chromium(playwright):
    """Return the path of the system's Chromium, or of the one that Playwright has installed."""
    own = playwright.chromium.executable_path
    found = shutil.which("chromium") or shutil.which("chromium-browser") or (own if os.path.exists(own) else None)
    return found or without("chromium")


def pytest_unconfigure(config):
    """Say at the very end, below pytest's own summary, how many tests were skipped for want of which programs."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:  # in a worker of pytest-xdist
        return
    reasons = [report.longrepr[2] for report in reporter.stats.get("skipped", ()) if isinstance(report.longrepr, tuple)]
    counts = Counter(reason.partition(NEEDS)[2] for reason in reasons if reason.startswith(f"Skipped: {NEEDS}"))
    if counts:
        each = ", ".join(f"{count} without {program}" for program, count in counts.most_common())
        reporter.write_line(f"{counts.total()} tests were skipped, which fail with CI=true: {each}")
