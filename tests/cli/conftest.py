"""Data that several files of these tests share."""

from importlib.resources import files

import pytest


@pytest.fixture(scope="session")
def co2_table(tmp_path_factory):
    """The last ten years of the demo's weekly measurements: training on all 44 takes several times as long."""
    head, *rows = (files("cellstack_demo") / "data" / "co2.csv").read_text(encoding="utf-8").splitlines()
    path = tmp_path_factory.mktemp("tables") / "co2.csv"
    path.write_text("\n".join([head, *rows[-520:], ""]), encoding="utf-8")
    return str(path)
