"""Whole modules of PyTorch as networks: whichever way they are read, they answer as the module does, or are refused."""

import numpy as np
import pytest
import torch
from torch import nn

import cellstack as cs


class Tagger(nn.Module):
    """A class of one's own, with a forward of its own: its graph is known to the exporter alone."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 8, num_layers=2, batch_first=True, bidirectional=True)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        y, _ = self.lstm(x)
        return torch.log_softmax(self.head(self.drop(torch.relu(y))), dim=-1)


class Last(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(4, 6, batch_first=True)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        y, _ = self.gru(x)
        return self.head(y[:, -1])


class Sine(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 6, batch_first=True)

    def forward(self, x):
        return torch.erfinv(self.lstm(x)[0])


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize(("kind", "width"), [(Tagger, 5), (Last, 4)])
def test_a_class_of_ones_own_becomes_a_network(kind, width, accelerated):
    torch.manual_seed(0)
    module = kind().train()
    if accelerated:
        cs.accelerate(module)
    net = cs.compile(module, torch.randn(2, 7, width))
    assert module.training
    x = torch.randn(3, 11, width)  # another batch, another length
    expected = module.eval()(x).detach().numpy()
    np.testing.assert_allclose(net(x.numpy()), expected, atol=1e-5)


def test_what_can_be_read_as_it_is_is(monkeypatch):
    def export(*_args, **_options):
        raise AssertionError("exported")

    monkeypatch.setattr(torch.onnx, "export", export)
    module = nn.Sequential(nn.LSTM(3, 4, batch_first=True))
    x = torch.randn(2, 5, 3)
    np.testing.assert_allclose(cs.compile(module, x)(x.numpy()), module(x)[0].detach().numpy(), atol=1e-6)


def test_a_module_that_no_network_can_be_is_refused_with_the_reason_of_each_way():
    with pytest.raises(cs.FormatError, match=r"compile: Sine can't be a Network: read as it is: .*; by way of ONNX: "):
        cs.compile(Sine(), torch.randn(2, 7, 4))


class Loud(nn.Module):
    """What a trace of one example doesn't show: a branch by the numbers."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 6, batch_first=True)

    def forward(self, x):
        y, _ = self.lstm(x)
        return y * 2 if bool(x.abs().max() > 1e-3) else y


def test_a_network_that_answers_otherwise_is_refused():
    with pytest.raises(cs.FormatError, match=r"by way of ONNX: output 0 lies .* off the module's"):
        cs.compile(Loud(), torch.zeros(2, 7, 4))


def test_what_is_no_module_or_no_example_is_refused():
    with pytest.raises(TypeError, match="expected a module of PyTorch, got int"):
        cs.compile(3, torch.zeros(1))
    for example in (None, (), ([1.0],)):
        with pytest.raises(TypeError, match="expected example to be a tensor"):
            cs.compile(nn.LSTM(3, 4), example)
