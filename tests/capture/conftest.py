"""Settings of the tests of programs."""

import pytest


@pytest.fixture(autouse=True)
def _exporter_without_warnings(caplog):
    """Whatever is compiled or exported, nobody sees warnings of PyTorch's exporter about graphs that we changed."""
    yield
    records = caplog.get_records("call")
    assert not [record.getMessage() for record in records if record.name.startswith("torch.onnx")]
