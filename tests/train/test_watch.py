"""Watching torch models: their layers' gates, with unchanged outputs and gradients."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from cellstack import inspect, layers
from cellstack.cells.gru import GRUTrace
from cellstack.cells.lstm import Trace
from cellstack.cells.rnn import RNNTrace


class Model(torch.nn.Module):
    """cellstack layers of every kind, called by a user's module."""

    def __init__(self):
        super().__init__()
        self.low = layers.LSTM(5, return_sequences=True, return_state=True)
        self.both = layers.Bidirectional(layers.GRU(4, return_sequences=True))
        cells = [layers.SimpleRNNCell(3), layers.LSTMCell(6)]
        self.top = layers.RNN(layers.StackedRNNCells(cells))
        self.head = torch.nn.Linear(6, 2)

    def forward(self, x):
        y, _, _ = self.low(x)
        return self.head(self.top(self.both(y, mask=torch.ones(y.shape[:2], dtype=torch.bool))))


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = Model()
    made(torch.randn(2, 7, 3))
    return made


def test_outputs_and_gradients_do_not_change(model):
    x = torch.randn(2, 7, 3)
    expected = model(x)
    (expected.sum()).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with inspect.watch(model) as seen:
        y = model(x)
        y.sum().backward()
    assert torch.equal(y, expected)
    assert all(torch.equal(p.grad, other) for p, other in zip(model.parameters(), gradients, strict=True))
    assert list(seen) == ["low", "both", "top"]
    assert len(seen.calls) == len(seen) == 3
    model(x)
    assert len(seen.calls) == 3  # the watch is over
    assert not model.low._forward_hooks
    assert not model.low._forward_pre_hooks


def test_records_equal_return_gates(model):
    x = torch.randn(2, 7, 3)
    with inspect.watch(model) as seen:
        model(x)
    y, h, c, trace = model.low(x, return_gates=True)
    assert isinstance(seen["low"].trace, Trace)
    assert all(torch.equal(a, b) for a, b in zip(seen["low"].trace, trace, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(seen["low"].y, (y, h, c), strict=True))
    ahead, back = seen["both"].trace
    assert isinstance(ahead, GRUTrace)
    assert back.z.shape == (2, 7, 4)
    low, high = seen["top"].trace
    assert isinstance(low, RNNTrace)
    assert torch.equal(seen["top"].y, high.h[:, -1])
    assert not seen["low"].trace.f.requires_grad


def test_gradients_flow_where_they_are_asked_for(model):
    with inspect.watch(model, detach=False) as seen:
        model(torch.randn(2, 7, 3))
    seen["low"].trace.f.sum().backward()
    assert model.low.cell.kernel.grad is not None


def test_a_caller_that_asks_for_gates_gets_them():
    layer = layers.LSTM(4)
    x = torch.randn(2, 5, 3)
    expected_y, expected = layer(x, return_gates=True)
    with inspect.watch(layer) as seen:
        for y, trace in (layer(x, return_gates=True), layer(x, None, None, None, True)):
            assert torch.equal(y, expected_y)
            assert torch.equal(trace.f, expected.f)
        plain = layer(x, None, None, None, False)
    assert torch.equal(plain, expected_y)
    assert len(seen.calls) == 3
    assert torch.equal(seen[""].trace.f, expected.f)


def test_two_watches_at_a_time(model):
    x = torch.randn(2, 7, 3)
    with inspect.watch(model) as outer, inspect.watch(model) as inner:
        y = model(x)
    assert torch.equal(y, model(x))
    assert torch.equal(outer["low"].trace.f, inner["low"].trace.f)


def test_an_exception_ends_the_watch(model):
    with pytest.raises(RuntimeError, match="unchanged error"), inspect.watch(model):
        raise RuntimeError("unchanged error")
    assert not model.low._forward_hooks
    with inspect.watch(model) as seen, pytest.raises(ValueError, match="expected"):
        model(torch.randn(2, 7, 4))
    assert not seen.calls
    assert torch.is_tensor(model(torch.randn(2, 7, 3)))


def test_uncalled_and_unknown_layers(model):
    with inspect.watch(model) as seen:
        model.low(torch.randn(1, 2, 3))
    with pytest.raises(KeyError, match="'top' wasn't called since the watch began"):
        seen["top"]
    with pytest.raises(KeyError, match="expected one of 'low', 'both', 'top', got 'bottom'"):
        seen["bottom"]
    assert repr(seen) == "Watch of 3 layers, 1 calls: 'low'"
    with pytest.raises(ValueError, match="watch: the model has no cellstack layers"):
        inspect.watch(torch.nn.Linear(2, 3))


def test_threads_share_a_watched_layer():
    layer = layers.LSTM(4)
    x = torch.randn(2, 5, 3)
    expected = layer(x)
    with inspect.watch(layer) as seen, ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda _: layer(x), range(100)))
    assert all(torch.equal(answer, expected) for answer in answers)
    assert len(seen.calls) == 100


def test_a_watch_is_active_once_and_not_in_copies():
    layer = layers.LSTM(4)
    x = torch.randn(2, 5, 3)
    expected = layer(x)
    with inspect.watch(layer) as seen:
        twin = copy.deepcopy(layer)
        with pytest.raises(RuntimeError, match="this watch is already active"):
            seen.__enter__()
        assert torch.equal(layer(x), expected)
    assert torch.equal(twin(x), expected)
    assert len(seen.calls) == 1
    with pytest.raises(TypeError, match="watch: expected a torch module, got int"):
        inspect.watch(5)
