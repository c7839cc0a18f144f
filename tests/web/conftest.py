import pytest
from javascript import Package

from cellstack import _kernel


@pytest.fixture
def package(tmp_path):
    return Package(tmp_path)


@pytest.fixture
def baseline():
    """Compute on the baseline instruction set, which rounds products and sums separately, as WebAssembly does."""
    _kernel.set_isa("baseline")
    yield
    _kernel.set_isa("")
