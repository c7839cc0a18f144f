"""Tests whose programs aren't installed: here none is, because the PATH is an empty folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest, tools

@pytest.fixture(scope="module")
def page():
    tools.without("chromium")

def test_of_a_page(page): pass
def test_of_another_page(page): pass
def test_of_c(): tools.need("cc", "gcc")
def test_of_this_system(): pytest.skip("other systems lack it")
def test_of_nothing(): pass
"""
SAID = (
    "3 tests were skipped, which fail with CI=true: "
    "2 without chromium (apt-get install chromium, or .venv/bin/playwright install chromium), "
    "1 without cc (apt-get install gcc libc6-dev)"
)


def run(folder, *options, **environment):
    (folder / "test_programs.py").write_text(TESTS)
    environment |= {"PATH": str(folder / "empty"), "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tools", "-p", "no:cacheprovider", *options]
    kept = {name: value for name, value in os.environ.items() if name != "CI" and not name.startswith("PYTEST")}
    return subprocess.run(command, cwd=folder, env=kept | environment, capture_output=True, text=True, check=False)


@pytest.mark.long
@pytest.mark.parametrize("options", [(), ("-n1",)], ids=["one process", "xdist"])
def test_the_last_line_says_how_many_were_skipped_and_what_to_install(tmp_path, options):
    done = run(tmp_path, *options)
    assert (done.returncode, done.stderr) == (0, "")
    *_, summary, last = done.stdout.splitlines()
    assert "1 passed, 4 skipped" in summary
    assert last == SAID


@pytest.mark.long
def test_they_fail_in_continuous_integration(tmp_path):
    done = run(tmp_path, CI="true")
    assert done.returncode == 1
    assert "1 failed, 1 passed, 1 skipped, 2 errors" in done.stdout.splitlines()[-1]  # of a fixture: an error
    assert "needs cc (apt-get install gcc libc6-dev)" in done.stdout
