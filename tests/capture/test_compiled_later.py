"""Modules as networks with a PyTorch that has no older exporter to ONNX, as later versions won't."""

import numpy as np
import pytest
import torch
from capture import test_compiled_loops, test_compiled_packing
from capture.test_compiled import Last, Sine, Tagger

import cellstack as cs
from cellstack.capture import compile_network


@pytest.fixture(autouse=True)
def without_the_older_exporter(monkeypatch):
    exported = torch.onnx.export

    def export(*args, dynamo=True, **options):
        if not dynamo:
            raise ValueError("dynamo=False isn't supported any more")
        return exported(*args, dynamo=dynamo, **options)

    monkeypatch.setattr(torch.onnx, "export", export)


@pytest.mark.parametrize(("module", "width"), [(Tagger(), 5), (Last(), 4)])
def test_layers_keep_their_names(module, width):
    torch.manual_seed(0)
    net = compile_network(module, torch.randn(2, 7, width))
    assert net.names[0].startswith(("lstm.", "gru."))
    x = torch.randn(3, 11, width)
    np.testing.assert_allclose(net(x.numpy()), module.eval()(x).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("name", ["LSTMCell", "backwards"])
def test_loops(name):
    test_compiled_loops.test_a_loop_over_cells_becomes_a_network_over_any_number_of_steps(name)


def test_packed_rows(capfd):
    test_compiled_packing.test_a_module_that_packs_becomes_a_network_that_takes_lengths("last h", capfd)


def test_an_unsupported_module_is_refused_with_the_first_reason():
    with pytest.raises(cs.FormatError, match="dynamo=False isn't supported"):
        compile_network(Sine(), torch.randn(2, 7, 4))
