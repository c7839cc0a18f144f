"""What the npm package knows of the kinds of cell is what Python declares."""

import runpy
from pathlib import Path

WEB = Path(__file__).parents[2] / "web"


def test_the_table_of_kinds_is_that_of_python():
    written = runpy.run_path(str(WEB / "write_kinds.py"))
    assert written["TARGET"].read_text() == written["module"](), "run `make stubs`"
